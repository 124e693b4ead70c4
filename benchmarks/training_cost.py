"""What a training step costs: full fine-tuning, LoRA, PST as plain autograd with a full sort, and this package.

    python benchmarks/training_cost.py                                # BERT-base shapes, float32, the CPU
    python benchmarks/training_cost.py --precision bf16               # under autocast
    python benchmarks/training_cost.py --scaling                      # over width, tokens, layers, micro-batches
    python benchmarks/training_cost.py --device cuda --model llama --precision bf16

All methods take turns within one run, so that their ratios hold on a machine whose speed drifts; medians are printed.
Memory is measured in a fresh process a method, as the peak over one step less what the process held with the base
model alone: the allocator's own count on a GPU, the resident set on a CPU (Linux).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cost.memory import peak_memory
from benchmarks.cost.methods import METHODS, RANK, Run, timed_selection
from benchmarks.cost.picture import draw_scaling

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_scaled_dot_product")
# Along each axis all else is as the options say, except what stands beside it.
SCALING: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "width": ((512, 1024, 2048, 4096), {"layers": 1, "batch": 4}),
    "batch": ((2, 8, 32), {"layers": 1}),
    "layers": ((1, 2, 4), {"batch": 4}),
    "accumulate": ((1, 2, 4, 8), {"layers": 1, "methods": ["products", "full", "ours"], "memory": False}),
    "mask_interval": ((1, 4, 16), {"layers": 1, "methods": ["products", "full", "ours"], "memory": False}),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    runs = {method: Run(method, options) for method in options.methods}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for run in runs.values():
        run.step()
    for _ in tqdm(range(options.repeats), desc="rounds", leave=False):
        for method, run in runs.items():
            seconds[method].append(run.timed_step())
    our_step = split(runs["ours"]) if "ours" in runs else None
    trained = {method: run.trained for method, run in runs.items()}
    runs.clear()
    measured = tqdm(trained, desc="memory", leave=False) if options.memory else ()
    memory = {method: memory_in_fresh_process(method, options) for method in measured if method != "products"}
    rows = [
        {
            "method": method,
            "trained": trained[method],
            "seconds": statistics.median(seconds[method]),
            "step_over_products": ratio(seconds[method], seconds.get("products")),
            "step_over_full": ratio(seconds[method], seconds.get("full")),
            "step_over_autograd": ratio(seconds[method], seconds.get("autograd")),
            "memory_bytes": memory.get(method),
            "memory_over_lora": memory[method] / memory["lora"] if {method, "lora"} <= memory.keys() else None,
        }
        for method in trained
    ]
    return {**setting(options), "rows": rows, "our_step": our_step}


def setting(options: argparse.Namespace) -> dict[str, Any]:
    machine = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "memory_of", "scaling")}
    return {"settings": settings, "machine": machine, "torch": torch.__version__}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads of {names[0] if names else platform.processor() or platform.machine()}"


def ratio(ours: list[float], theirs: list[float] | None) -> float | None:
    """Median of the ratios round by round: neighbours in time meet the same machine."""
    return None if theirs is None else statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def split(run: Run) -> dict[str, float]:
    """Shares of our step: matrix products, selection, and the rest."""
    with timed_selection(run.options.device) as seconds:
        total = statistics.median(run.timed_step() for _ in range(3))
        selection = sum(seconds) / 3 / run.options.mask_interval
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.options.device == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiled:
        run.step()
    field = "self_device_time_total" if run.options.device == "cuda" else "self_cpu_time_total"
    events = profiled.key_averages(group_by_input_shape=True)
    products = sum(getattr(event, field) for event in events if is_product(event)) / 1e6
    return {
        "products": products / total,
        "selection": selection / total,
        "rest": 1 - (products + selection) / total,
    }


def is_product(event: Any) -> bool:
    """Whether the profiler saw a matrix product of the model's own, and not one of an adapter's rank."""
    sizes = [size for shape in event.input_shapes if len(shape) > 1 for size in shape]
    return event.key.startswith(PRODUCTS) and min(sizes, default=0) > RANK


def memory_in_fresh_process(method: str, options: argparse.Namespace) -> int:
    shape = ["width", "intermediate", "layers", "batch", "tokens"]
    names = ["device", "model", "precision", *shape, "accumulate", "mask_interval", "sparsity"]
    arguments = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, __file__, *arguments, "--memory_of", method]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def table(result: dict[str, Any]) -> str:
    lines = [
        "| method | trained | s a step | over products | over full | over autograd | memory, MiB | over LoRA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = [row[f"step_over_{other}"] for other in ("products", "full", "autograd")]
        cells = [METHODS[row["method"]], f"{row['trained']:,}", f"{row['seconds']:.3f}", *map(number, ratios)]
        cells += ["" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join([*cells, number(row["memory_over_lora"])]) + " |")
    if result["our_step"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in result["our_step"].items())
        lines += ["", f"Our step: {shares}."]
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def scale(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    axes: dict[str, list[dict[str, Any]]] = {axis: [] for axis in SCALING}
    points = [(axis, value, rest) for axis, (values, rest) in SCALING.items() for value in values]
    for axis, value, rest in tqdm(points, desc="scaling"):
        changed: dict[str, Any] = {**vars(options), **rest, axis: value}
        if axis == "width":
            changed["intermediate"] = value * options.intermediate // options.width
            if value > 2048:  # a sort of so many scores takes the better part of a minute
                changed["methods"] = [method for method in options.methods if method != "autograd"]
        result = measure(argparse.Namespace(**changed))
        axes[axis].append(result)
        tqdm.write(f"\n{axis} = {value}\n\n{table(result)}")
    return axes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("bert", "llama"), default="bert")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast on a CPU")
    parser.add_argument("--width", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="a sequence")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--mask_interval", type=int, default=1, help="steps a selection")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scaling", action="store_true", help="along every axis, with a picture")
    parser.add_argument("--output", type=Path, help="folder for JSON and picture; by default the table is printed only")
    parser.add_argument("--memory_of", choices=tuple(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shapes = {"bert": (768, 3072), "llama": (4096, 11008)}[options.model]
    options.width = options.width or shapes[0]
    options.intermediate = options.intermediate or shapes[1]
    return options


def main() -> None:
    options = parse()
    if options.memory_of:
        print(peak_memory(options, options.memory_of))
        return
    result: Any = scale(options) if options.scaling else measure(options)
    if not options.scaling:
        print(table(result))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"{'scaling-' if options.scaling else ''}{options.model}-{options.device}-{options.precision}"
        name += "" if options.scaling else f"-{options.layers}x{options.width}-{options.batch}x{options.tokens}"
        name += f"-accumulate{options.accumulate}" if options.accumulate > 1 else ""
        name += f"-interval{options.mask_interval}" if options.mask_interval > 1 else ""
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        if options.scaling:
            machine = next(iter(result.values()))[0]["machine"]
            subtitle = f"{options.model} shapes, {options.precision}, {options.sparsity:.0%} zeros, {machine}"
            draw_scaling(result, options.output / f"{name}.png", subtitle)


if __name__ == "__main__":
    main()
