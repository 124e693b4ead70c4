"""Which kernel is fastest for a matrix on this machine: all take turns, and meet the caches as within a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .sparse_kernels import KERNELS, LinearKernel

_MOST_EVICTED = 256 * 2**20  # bytes; more than the caches of most processors hold


def time_kernels(
    weight: Tensor, bias: Tensor | None, rows: int, names: Iterable[str], *, other_bytes: int = 0, repeats: int = 9
) -> dict[str, float]:
    """Time kernels on one matrix with random input, in turns.

    Within a model the weights of all other layers pass through the caches between two calls of one layer, while the
    code of the kernel stays there. So before each timed call on a CPU `other_bytes` of other data are read, and then
    the same kernel is called on a small matrix.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        rows: rows of the input, that is batch x tokens.
        names: of `KERNELS`, each one that takes this matrix.
        other_bytes: size of the model's other weights; 0 leaves the matrix in the cache, if it fits there.
        repeats: timed calls of each kernel.

    Returns:
        Seconds of one call, the median, by name. Kernels are packed anew here and dropped again.

    Example:
        >>> sorted(time_kernels(torch.eye(64), None, 1, ["dense", "csr"], repeats=1))
        ['csr', 'dense']
    """
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    packed = {name: KERNELS[name](weight, rows) for name in names}
    small = {name: _small_twin(type(kernel), weight, rows) for name, kernel in packed.items()}
    others = torch.ones(min(other_bytes, _MOST_EVICTED) if weight.device.type == "cpu" else 0, dtype=torch.uint8)
    others = others[: len(others) // 4 * 4].view(torch.int32)

    def call(name: str) -> Callable[[], object]:
        return lambda: packed[name](x, bias)

    def before(name: str) -> None:
        if len(others):
            others.max()
            small[name]()

    return time_in_turns({name: call(name) for name in packed}, repeats=repeats, before=before, device=weight.device)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    before: Callable[[str], None] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that a machine whose speed drifts drifts for all.

    Args:
        calls: what to time, by name; each is called once before.
        repeats: rounds, at least 1.
        before: called with the name before each timed call, and not timed.
        device: whose work has to be finished before a clock is read.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}, but at least 1 round has to be timed.")
    is_cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(repeats):
            for name, call in calls.items():
                if before is not None:
                    before(name)
                if is_cuda:
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                call()
                if is_cuda:
                    torch.cuda.synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _small_twin(kernel: type[LinearKernel], weight: Tensor, rows: int) -> Callable[[], object]:
    """The same kernel on a matrix of 128 x 128, a quarter of it kept in one block; a few rows, but one for one."""
    small = torch.zeros(128, 128, dtype=weight.dtype, device=weight.device)
    small[:64, :64] = 1
    if weight.device.type != "cpu":
        return lambda: None
    twin, x = kernel(small, rows), small[: min(rows, 8)]
    return lambda: twin(x, None)
