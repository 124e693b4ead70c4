"""The peak of one step beyond the base model, each method in a fresh process."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .methods import Run, base_model


def peak_memory(options: argparse.Namespace, method: str) -> int:
    """Bytes; called in a fresh process. The allocator's count on a GPU, the resident set on a CPU (Linux)."""
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
