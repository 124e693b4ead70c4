"""What training on a quantised base takes in memory, PST beside LoRA, and beside the same base before it was quantised.

    python benchmarks/quantised_memory.py --output benchmarks/results/quantised_memory      # the CPU (five minutes)
    python benchmarks/quantised_memory.py --device cuda --precision bf16 \\
        --width 4096 --intermediate 11008 --layers 8 --tokens 2048

A few steps of a Llama's blocks, each base and method in a process of its own and, as QLoRA has it, every block
checkpointed, unless --no-checkpointing says otherwise. Memory is the peak of a step with the base in it: the
allocator's own count on a GPU, the resident set on a CPU (Linux). docs/quantisation.md has the formula that PST is
compared with.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cost.memory import resident
from benchmarks.cost.methods import METHODS, Run, base_model, synchronize, with_method
from benchmarks.cost.quantisation import QUANTISATIONS, quantise_linears
from benchmarks.scale import SCRATCH, Layer, Llama
from benchmarks.training_cost import setting
from peft_pst import PSTLayer
from peft_pst.json_file import write_json

PLAIN = "not quantised"
COMPARED = ("lora", "ours")
# By name, since HQQ's layers are no `nn.Linear`.
TARGETS = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
STEPS = 2


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pairs = [(base, method) for base in options.bases for method in COMPARED]
    measured = {pair: in_own_process(*pair, options) for pair in tqdm(pairs, leave=False)}
    rows = []
    for (base, method), found in measured.items():
        peak, plain, lora = (measured[key]["peak"] for key in ((base, method), (PLAIN, method), (base, "lora")))
        rows.append(
            {
                "base": base,
                "method": method,
                **{f"{name}_mib": None if value is None else value / 2**20 for name, value in found.items()},
                "over_plain": peak / plain,
                "over_lora": peak / lora,
                "over_predicted": found["predicted"] and peak / found["predicted"],
            }
        )
    return {**setting(options), "rows": rows}


def in_own_process(base: str, method: str, options: argparse.Namespace) -> dict[str, int | None]:
    """Forked, so that what is imported is imported once; this process itself computes nothing."""
    own = argparse.Namespace(**{**vars(options), "base": base, "method": method})
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=give_back_what_is_freed) as process:
        return process.submit(memory_of, own).result()


def give_back_what_is_freed() -> None:
    """Have every tensor in pages of its own, which go back to the system when it does; that costs time (Linux)."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD in glibc's malloc.h
    ctypes.CDLL(None).mallopt(mmap_threshold, 65536)


def memory_of(options: argparse.Namespace) -> dict[str, int | None]:
    """Bytes of the base, of the peak with it, and what the formula says of that; called in a fresh process."""
    # Libraries load code and spin up threads at their first use: let a small run pay for that before the count starts.
    small = argparse.Namespace(**{**vars(options), "width": 128, "intermediate": 128, "layers": 1, "tokens": 8})
    train(quantised_base(small), small)
    before = in_use(options.device)
    base = quantised_base(options)
    base_bytes = in_use(options.device) - before
    model, peak = train(base, options)
    predicted = predict(model, base_bytes, options) if options.method == "ours" else None
    return {"base": base_bytes, "peak": peak - before, "predicted": predicted}


def quantised_base(options: argparse.Namespace) -> nn.Module:
    base = base_model(options).to(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    if options.base != PLAIN:
        quantise_linears(base, options.base)
    if options.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def train(base: nn.Module, options: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model after a few steps, and the peak of the last of them."""
    run = Run(options.method, options, with_method(base, options.method, options, TARGETS))
    run.step()
    synchronize(options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    for _ in range(STEPS):
        run.step()
    return run.model, torch.cuda.max_memory_allocated() if options.device == "cuda" else resident("VmHWM")


def in_use(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def predict(model: nn.Module, base_bytes: int, options: argparse.Namespace) -> int:
    """Bytes: the base, what PST keeps of every layer, one layer's temporary tensors, and the activations."""
    element, tokens = (2 if options.precision == "bf16" else 4), options.batch * options.tokens
    adapted = [module for module in model.modules() if isinstance(module, PSTLayer)]
    layers = [Layer(layer.out_features, layer.in_features, tokens) for layer in adapted]
    temporary = max(layer.temporary(element) + dequantised(layer, element, options.base) for layer in layers)
    scratch = 0 if options.device == "cuda" else SCRATCH
    shape = Llama("", options.width, options.intermediate, options.layers, keys=0, vocabulary=0)
    activations = shape.activations(tokens, element, checkpointed=options.checkpointing)
    return base_bytes + sum(layer.state() for layer in layers) + temporary + scratch + activations


def dequantised(layer: Layer, element: int, base: str) -> int:
    """Bytes of the layer's dense weight where it is made anew for every product."""
    return 0 if base == PLAIN else element * layer.weights


# Output


def table(result: dict[str, Any]) -> str:
    base = f"base, {result['settings']['precision']}"
    lines = [
        f"| {base} | method | base, MiB | peak, MiB | over plain | over LoRA | predicted, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["base"], METHODS[row["method"]], f"{row['base_mib']:.0f}", f"{row['peak_mib']:.0f}"]
        cells += [f"{row['over_plain']:.2f}", f"{row['over_lora']:.2f}"]
        cells += ["" if row["predicted_mib"] is None else f"{row['predicted_mib']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="that the layers compute in")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="a sequence")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    installed = [how for how in QUANTISATIONS if importlib.util.find_spec(how.split("-")[0])]
    parser.add_argument("--bases", nargs="+", choices=installed, default=installed, help="beside the plain one")
    parser.add_argument("--output", type=Path, help="folder for JSON and table; by default the table is printed only")
    options = parser.parse_args(arguments)
    options.bases = [PLAIN, *options.bases]
    options.model, options.accumulate, options.mask_interval = "llama", 1, 1
    return options


def main() -> None:
    options = parse()
    result = measure(options)
    print(table(result))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"{options.device}-{options.precision}-{options.layers}x{options.width}-{options.batch}x{options.tokens}"
        name += "" if options.checkpointing else "-no-checkpointing"
        write_json(options.output / f"{name}.json", result)


if __name__ == "__main__":
    main()
