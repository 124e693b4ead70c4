"""What merging a model takes in memory, measured in a process of its own: run with a way and a folder, prints bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from peft import get_peft_model
from torch import nn

from peft_pst import PSTConfig
from peft_pst.linear import PSTLinear

LAYERS, WIDTH = 12, 1024
LAYER_BYTES = 4 * WIDTH * WIDTH


def memory(field: str) -> int:
    """A line of Linux's account of this process, in bytes; RssAnon is what no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(way: str, folder: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))})
    if way == "disk":
        disk_offload(model, folder, torch.device("cpu"))
    elif way == "host":
        cpu_offload(model, torch.device("cpu"))
    adapted = get_peft_model(model, PSTConfig(target_modules="all-linear", initial_sparsity=0.5, init_weights=False))
    highest = before = memory("RssAnon")
    merge = PSTLinear.merge

    def watched(layer: PSTLinear, *arguments: Any, **options: Any) -> None:
        nonlocal highest
        merge(layer, *arguments, **options)
        highest = max(highest, memory("RssAnon"))

    PSTLinear.merge = watched  # type: ignore[method-assign]
    adapted.merge_and_unload()
    print(highest - before, memory("RssAnon") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
