"""What a training step costs: full fine-tuning, LoRA, PST as plain autograd with a full sort, and this package.

    python benchmarks/training_cost.py                                # BERT-base shapes, float32, the CPU
    python benchmarks/training_cost.py --precision bf16               # under autocast
    python benchmarks/training_cost.py --device cuda --model llama --precision bf16 --layers 2

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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import oracle

from peft_pst import PSTConfig, PSTLayer, create_pst_optimizer, update_sparsity
from peft_pst.masking import num_pruned
from peft_pst.targets import find_block_linears

METHODS = {
    "full": "full fine-tuning, AdamW",
    "lora": "LoRA, r = 8",
    "autograd": "PST, plain autograd and sort",
    "ours": "PST, this package",
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_scaled_dot_product")
RANK = 8


class AutogradLinear(nn.Module):
    """The tests' oracle as a layer: the formulas in autograd, sorted in full at every forward."""

    def __init__(self, base: nn.Linear, sparsity: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        out, in_ = base.weight.shape
        shapes = {"U": (out, RANK), "V": (RANK, in_), "A": (out, RANK), "B": (RANK, in_), "R": (out,), "C": (in_,)}
        for name, shape in shapes.items():
            start = torch.randn(shape) * in_**-0.5 if name in "UA" else torch.zeros(shape)
            self.register_parameter(name, nn.Parameter(start.to(base.weight.device)))
        self.count = num_pruned(base.weight.numel(), sparsity)

    def forward(self, x: Tensor) -> Tensor:
        factors = {name: getattr(self, name) for name in "UVABRC"}
        weight = self.base.weight.float()
        adapter = oracle.Adapter(**factors, count=self.count)
        bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
        return oracle.linear(x, oracle_weight(weight, x.dtype), bias, [adapter])


def oracle_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # Without autocast a half-precision input meets a float32 weight; the oracle then computes in float32.
    return weight if torch.is_autocast_enabled(weight.device.type) else weight.to(dtype)


def base_model(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
        "vocab_size": 64,
    }
    if options.model == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model: nn.Module = BertModel(BertConfig(**sizes, **dropout), add_pooling_layer=False)
    else:
        model = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=options.width // 128, use_cache=False))
    dtype = torch.bfloat16 if options.device == "cuda" and options.precision == "bf16" else torch.float32
    return model.to(options.device, dtype)


def with_method(base: nn.Module, method: str, options: argparse.Namespace) -> nn.Module:
    targets = find_block_linears(base)
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=RANK, target_modules=targets))
    if method == "ours":
        return get_peft_model(base, PSTConfig(r=RANK, score_rank=RANK, target_sparsity=options.sparsity))
    if method == "autograd":
        base.requires_grad_(False)
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in targets):
                base.set_submodule(name, AutogradLinear(module, options.sparsity))
    return base


class Run:
    """One method's model, optimizer and step."""

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        self.method, self.options = method, options
        self.model = with_method(base_model(options), method, options).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        ours = method == "ours"
        self.optimizer = (
            create_pst_optimizer(self.model, torch.optim.AdamW, lr=1e-4)
            if ours
            else torch.optim.AdamW(trained, lr=1e-4)
        )
        self.ids = torch.randint(0, 64, (options.batch, options.tokens), device=options.device)
        if ours:
            update_sparsity(self.model, 1, 1)

    def step(self) -> None:
        autocast = self.options.precision == "bf16" and self.options.device == "cpu"
        for _ in range(self.options.accumulate):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = self.model(input_ids=self.ids).last_hidden_state.float().square().mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method == "ours":
            update_sparsity(self.model, 1, 1)

    def timed_step(self) -> float:
        synchronize(self.options.device)
        start = time.perf_counter()
        self.step()
        synchronize(self.options.device)
        return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def timed_selection(device: str) -> Iterator[list[float]]:
    """Seconds spent on scores and selection, a number a layer."""
    seconds: list[float] = []
    original: Callable[..., Tensor] = PSTLayer._select

    def select(self: PSTLayer, adapter_name: str) -> Tensor:
        synchronize(device)
        start = time.perf_counter()
        result = original(self, adapter_name)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        return result

    PSTLayer._select = select  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        PSTLayer._select = original  # type: ignore[method-assign]


def split(run: Run) -> dict[str, float]:
    """Shares of our step: matrix products, selection, and the rest."""
    with timed_selection(run.options.device) as seconds:
        total = statistics.median(run.timed_step() for _ in range(3))
        selection = sum(seconds) / 3
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.options.device == "cuda" else [])
    with profile(activities=activities) as profiled:
        run.timed_step()
    field = "self_device_time_total" if run.options.device == "cuda" else "self_cpu_time_total"
    products = sum(getattr(event, field) for event in profiled.key_averages() if event.key.startswith(PRODUCTS)) / 1e6
    return {
        "products": products / total,
        "selection": selection / total,
        "rest": max(0.0, 1 - (products + selection) / total),
    }


def peak_memory(options: argparse.Namespace, method: str) -> int:
    """Bytes at the peak of one step beyond the base model; called in a fresh process."""
    base_bytes = sum(tensor.nbytes for tensor in base_model(options).state_dict().values())
    if options.device == "cuda":
        run = Run(method, options)
        run.step()
        torch.cuda.reset_peak_memory_stats()
        run.step()
        return torch.cuda.max_memory_allocated() - base_bytes
    # Libraries load code and spin up threads at their first use: let a small run pay for that before the count starts.
    small = argparse.Namespace(**{**vars(options), "width": 128, "intermediate": 128, "batch": 1, "layers": 1})
    Run(method, small).step()
    before = resident("VmRSS")
    run = Run(method, options)
    run.step()
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    run.step()
    return resident("VmHWM") - before - base_bytes


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(options: argparse.Namespace) -> dict[str, Any]:
    runs = {method: Run(method, options) for method in options.methods}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for run in runs.values():
        run.step()
    for _ in tqdm(range(options.repeats), desc="rounds"):
        for method, run in runs.items():
            seconds[method].append(run.timed_step())
    memory = {method: memory_in_fresh_process(method) for method in tqdm(runs, desc="memory")}
    rows = [
        {
            "method": method,
            "trained": run.trained,
            "seconds": statistics.median(seconds[method]),
            "step_over_full": ratio(seconds[method], seconds.get("full")),
            "step_over_autograd": ratio(seconds[method], seconds.get("autograd")),
            "memory_bytes": memory[method],
            "memory_over_lora": memory[method] / memory["lora"] if "lora" in memory else None,
        }
        for method, run in runs.items()
    ]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "memory_of")}
    report = {"settings": settings, "machine": machine, "platform": platform.machine(), "torch": torch.__version__}
    return {**report, "rows": rows, "our_step": split(runs["ours"]) if "ours" in runs else None}


def ratio(ours: list[float], theirs: list[float] | None) -> float | None:
    """Median of the ratios round by round: neighbours in time meet the same machine."""
    return None if theirs is None else statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def memory_in_fresh_process(method: str) -> int:
    command = [sys.executable, *sys.argv, "--memory_of", method]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def table(result: dict[str, Any]) -> str:
    lines = [
        "| method | trained | s a step | over full | over autograd | memory, MiB | over LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = [row["step_over_full"], row["step_over_autograd"]]
        cells = [METHODS[row["method"]], f"{row['trained']:,}", f"{row['seconds']:.3f}"]
        cells += ["" if value is None else f"{value:.2f}" for value in ratios]
        cells += [f"{row['memory_bytes'] / 2**20:.0f}"]
        cells += ["" if row["memory_over_lora"] is None else f"{row['memory_over_lora']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if result["our_step"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in result["our_step"].items())
        lines += ["", f"Our step: {shares}."]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("bert", "llama"), default="bert")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast on a CPU")
    parser.add_argument("--width", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path, help="folder for the JSON file; by default it is only printed")
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
    result = measure(options)
    print(table(result))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = (
            f"{options.model}-{options.device}-{options.precision}-{options.width}-accumulate{options.accumulate}.json"
        )
        (options.output / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
