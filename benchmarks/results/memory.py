"""The peak of the memory that training takes, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


class PeakMemory:
    """Counts from its creation, when model and data are loaded and nothing is trained.

    What is counted is the model and whatever training adds: on a GPU the allocator's own peak; on a CPU the resident
    set's (Linux), less what the process held beside the model when the count began. The resident set includes the
    libraries' code that training is the first to touch, the same for every method.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        self.device = device
        self.beside = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            own = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
            self.beside = _resident("VmRSS") - own
            Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew

    def bytes(self) -> int:
        """The peak so far."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM") - self.beside


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
