"""What PST costs a layer and a model by formula, the formula against this machine, and what it predicts for large ones.

    python benchmarks/scale.py --output benchmarks/results/scale       # under two minutes on an idle CPU core

docs/scale.md explains the formula. Time is predicted from two figures that one shape gives: the speed of a matrix
product, and the seconds that the passes over one weight take. Everything else is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cost.memory import resident
from peft_pst import PSTConfig
from peft_pst.blocks import CACHE_NUMEL
from peft_pst.masked_linear import _PRODUCT_NUMEL

RANK = 8  # of the update and of the scores, as by default
SHAPES = ((1024, 1024, 1024), (768, 3072, 1024), (3072, 768, 1024), (2048, 2048, 1024), (2048, 2048, 4096))
GIB = 2**30
SCRATCH = 10 * 4 * CACHE_NUMEL  # on a CPU; about ten blocks at a time, counted in measurements and not in the code


@dataclass(frozen=True)
class Layer:
    """One adapted matrix, and the tokens of a step that go through it."""

    out: int
    in_: int
    tokens: int

    @property
    def weights(self) -> int:
        return self.out * self.in_

    @property
    def trained(self) -> int:
        """U, V, A, B, R and C."""
        return (2 * RANK + 1) * (self.out + self.in_)

    @property
    def products(self) -> int:
        """FLOPs of output, input gradient and weight gradient."""
        return 3 * 2 * self.tokens * self.weights

    def state(self) -> int:
        """Bytes that stay: parameters, gradients and Adam's two moments in float32, and a bit for each weight."""
        return 16 * self.trained + self.weights // 8

    def temporary(self, element: int) -> int:
        """Bytes of one layer at a time: the masked weight, or after it a block of the dense gradient."""
        return max(element * self.weights, element * min(self.weights, _PRODUCT_NUMEL))

    def step_bytes(self, element: int) -> int:
        """Bytes that a step on this layer alone needs beyond base weight, input and gradient of the output."""
        passing = element * self.tokens * (self.out + self.in_)  # the output, and the gradient of the input
        return self.state() + self.temporary(element) + SCRATCH + passing


# Large models


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama; `vocabulary` rows are embedded, and again predicted unless `tied`."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    keys: int
    vocabulary: int
    tied: bool = False

    def layers(self, tokens: int) -> list[Layer]:
        """The adapted matrices of one block."""
        attention = [(self.hidden, self.hidden)] * 2 + [(self.keys, self.hidden)] * 2
        feed_forward = [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return [Layer(out, in_, tokens) for out, in_ in (*attention, *feed_forward)]

    @property
    def other_weights(self) -> int:
        """Embeddings, the prediction layer, and norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.blocks + 1) * self.hidden

    def activations(self, tokens: int, element: int = 2, checkpointed: bool = True) -> int:
        """Bytes: with a checkpoint a block its input and one block's own, else all blocks' own; float32 logits."""
        one_block = element * tokens * (8 * self.hidden + 4 * self.intermediate)
        blocks = element * tokens * self.hidden * self.blocks + one_block if checkpointed else one_block * self.blocks
        return blocks + 8 * tokens * self.vocabulary


LLAMAS = (
    Llama("1B", 2048, 8192, 16, 512, 128256, tied=True),
    Llama("7B", 4096, 11008, 32, 4096, 32000),
    Llama("70B", 8192, 28672, 80, 1024, 32000),
)


def predict(model: Llama, gpus: int, sharded: bool, tokens: int) -> dict[str, Any]:
    """Memory of one GPU and what it receives in one step; bf16 base, float32 adapter."""
    block = model.layers(tokens)
    adapted = model.blocks * sum(layer.weights for layer in block)
    trained = model.blocks * sum(layer.trained for layer in block)
    base, share = 2 * (adapted + model.other_weights), gpus if sharded else 1
    gathered = 2 * 2 * sum(layer.weights for layer in block) if sharded and gpus > 1 else 0  # this block and the next
    buckets = 4 * trained if not sharded and gpus > 1 else 0  # DDP's copy of the gradients
    memory = (
        base / share
        + 16 * trained / share
        + adapted / 8
        + gathered
        + buckets
        + max(layer.temporary(element=2) for layer in block)
        + model.activations(tokens)
    )
    ring = (gpus - 1) / gpus
    return {
        "model": model.name,
        "gpus": gpus,
        "way": "one" if gpus == 1 else "FSDP2" if sharded else "DDP",
        "base_weights": adapted + model.other_weights,
        "adapted_weights": adapted,
        "trained": trained,
        "memory_gib": memory / GIB,
        "of_which_base_gib": base / share / GIB,
        "full_fine_tuning_state_gib": 16 * base / 2 / share / GIB,
        "adapter_traffic_gib": (2 if not sharded else 3) * 4 * trained * ring / GIB,
        "base_traffic_gib": 2 * base * ring / GIB if sharded else 0.0,  # once forward, once backward, by any method
        "petaflops": 6 * adapted * tokens / 1e15,
    }


# This machine


def measure(layer: Layer) -> dict[str, float]:
    """Median seconds of a step and of a plain product, and the peak of a step in bytes, each in a fresh process."""
    results: dict[str, float] = {}
    for what in MEASURES:
        # For memory, every tensor in pages of its own, which go back to the system when it does; that costs time.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} if what == "memory" else dict(os.environ)
        command = [sys.executable, __file__, "--measure", what, *map(str, (layer.out, layer.in_, layer.tokens))]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        results |= json.loads(finished.stdout)
    return results


def measure_memory(layer: Layer) -> dict[str, float]:
    _Step(Layer(64, 64, 8)).run(1)  # libraries load what they need at their first use
    step = _Step(layer)
    before = resident("VmRSS")
    step.adapt()
    step.run(1)
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    step.run(2)
    return {"bytes": resident("VmHWM") - before}


def measure_time(layer: Layer, repeats: int = 7) -> dict[str, float]:
    step = _Step(layer)
    step.run(1)
    seconds = [step.run(number) for number in range(2, 2 + repeats)]
    x, weight = step.x.detach(), step.base.weight.detach()
    products = [_seconds(lambda: nn.functional.linear(x, weight)) for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "product_seconds": statistics.median(products)}


MEASURES: dict[str, Callable[[Layer], dict[str, float]]] = {"time": measure_time, "memory": measure_memory}


class _Step:
    """A training step of one layer; what a network would hand it, input and gradient, is there from the start."""

    def __init__(self, layer: Layer) -> None:
        torch.manual_seed(0)
        self.base = nn.Linear(layer.in_, layer.out, bias=False)
        self.x = torch.randn(layer.tokens, layer.in_, requires_grad=True)
        self.gradient = torch.randn(layer.tokens, layer.out)
        self.model: Any = None

    def adapt(self) -> None:
        config = PSTConfig(target_modules=["0"], target_sparsity=0.9, initial_sparsity=0.9, r=RANK, score_rank=RANK)
        self.model = get_peft_model(nn.Sequential(self.base), config)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    def run(self, number: int) -> float:
        if self.model is None:
            self.adapt()

        def step() -> None:
            self.x.grad = None
            self.model(self.x).backward(self.gradient)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
            self.model.update_sparsity(number, 1000)

        return _seconds(step)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare() -> dict[str, Any]:
    """Predicted beside measured; the first shape gives the speeds, the others only check them."""
    rows: list[dict[str, Any]] = []
    product_speed = seconds_per_weight = 0.0
    for shape in SHAPES:
        layer = Layer(*shape)
        measured = measure(layer)
        if not rows:
            product_speed = layer.products / 3 / measured["product_seconds"]
            seconds_per_weight = (measured["seconds"] - layer.products / product_speed) / layer.weights
        seconds = layer.products / product_speed + seconds_per_weight * layer.weights
        rows.append(
            {
                "out": layer.out,
                "in": layer.in_,
                "tokens": layer.tokens,
                "predicted_mib": layer.step_bytes(element=4) / 2**20,
                "measured_mib": measured["bytes"] / 2**20,
                "memory_ratio": measured["bytes"] / layer.step_bytes(element=4),
                "predicted_ms": 1000 * seconds,
                "measured_ms": 1000 * measured["seconds"],
                "time_ratio": measured["seconds"] / seconds,
                "fitted": not rows,
            }
        )
    return {"gflops": product_speed / 1e9, "ns_per_weight": 1e9 * seconds_per_weight, "rows": rows}


# Output


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a column for each key."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for scale.json and scale.md")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a GPU and step (%(default)s)")
    parser.add_argument("--measure", nargs=4, metavar=("WHAT", "OUT", "IN", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, *shape = options.measure
        print(json.dumps(MEASURES[what](Layer(*map(int, shape)))))
        return
    ways = [(1, False), (8, False), (8, True), (64, False), (64, True)]
    predicted = [predict(model, *way, options.tokens) for model in LLAMAS for way in ways]
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "checked": compare()}
    results |= {"tokens": options.tokens, "predicted": predicted}
    text = f"{table(results['checked']['rows'])}\n\n{table(predicted)}\n"
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "scale.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (options.output / "scale.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
