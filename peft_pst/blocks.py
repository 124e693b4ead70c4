"""Going through a large matrix in blocks of rows, so that temporaries stay small and in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Above 8 MiB in float32, a temporary of the matrix's size comes from the system anew each time, page by page, which
# takes longer than what is computed in it.
LARGE_NUMEL = 1 << 21
CACHE_NUMEL = 1 << 18  # a megabyte in float32, a few of which fit the caches


def on_eager_cpu(matrix: Tensor) -> bool:
    """Whether small blocks pay: elsewhere launches cost more than passes, and a compiler fuses the passes itself."""
    return matrix.device.type == "cpu" and not torch.compiler.is_compiling()


def is_large(matrix: Tensor) -> bool:
    """Whether temporaries of this size should not be made whole."""
    return on_eager_cpu(matrix) and matrix.numel() > LARGE_NUMEL


def row_blocks(start: int, stop: int, width: int, numel: int, together: int = 1) -> Iterator[slice]:
    """Blocks of about `numel` entries, each starting at a multiple of 8 rows, hence at a whole byte of a packed mask.

    Args:
        start: first row.
        stop: one past the last row.
        width: entries of a row.
        numel: entries of a block, more or less; a block has at least 8 rows, where there are so many.
        together: rows that stay in one block, counted from `start`.

    Example:
        >>> list(row_blocks(0, 20, width=100, numel=1000))
        [slice(0, 8, None), slice(8, 16, None), slice(16, 20, None)]
    """
    least = math.lcm(8, together)
    height = max(least, numel // width // least * least)
    return (slice(row, min(row + height, stop)) for row in range(start, stop, height))
