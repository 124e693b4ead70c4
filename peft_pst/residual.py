"""Where the sparse residual of a weight update stands: chosen once from the base weight, and checked when loaded.

Source: DSEE (Chen et al., ACL 2023, arXiv 2111.00160): y = (W0 + U V + S2) x, where S2 has N entries a matrix, whose
positions are fixed before training and whose values learn from zero.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .grebsmo import grebsmo
from .masking import select_mask
from .scoring import score_dtype


def residual_positions(weight: Tensor, count: int, method: str, *, rank: int) -> Tensor:
    """Choose the entries of a matrix that get a residual of their own.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        count: how many, in [1, W0.numel()].
        method: "grebsmo": the largest |S| of W0 ~ L + S, where L has the given rank, that is, what a low-rank update
            can least express; the same each time, without touching the global random numbers. "magnitude": the largest
            |W0|. "random": drawn anew each time from PyTorch's global generator.
        rank: of L, normally that of the update U V; cut to what the matrix allows. Only "grebsmo" reads it.

    Returns:
        int64 (count,), row * in + column, ascending, no two alike, on the device of `weight`.

    Raises:
        ValueError: if `count` is out of its range, or, on the CPU, if the weight holds a NaN.

    Source: Chen et al. 2023: GreBsmo is their choice, the other two are its controls.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, -3.0], [0.5, 2.0, 0.0]])
        >>> residual_positions(weight, 2, "magnitude", rank=1)
        tensor([2, 4])
    """
    numel = weight.numel()
    if not 1 <= count <= numel:
        raise ValueError(
            f"residual={count} is outside [1, {numel}], the number of weights; lower it, here by residual_pattern."
        )
    if method == "random":
        # A sample without a permutation of the whole matrix, from the generator that also draws the start values.
        draw = random.Random(int(torch.randint(2**62, ())))
        return torch.tensor(sorted(draw.sample(range(numel), count)), device=weight.device)
    weight = weight.detach().to(score_dtype(weight.dtype))
    if method == "grebsmo":
        rank, sketches = min(rank, *weight.shape), torch.Generator().manual_seed(0)
        # In four stages: growing by one is a little more exact, and takes minutes for a model.
        weight = grebsmo(weight, rank, 1 - count / numel, rank_step=max(1, rank // 4), generator=sketches).sparse
    return select_mask(weight.abs(), numel - count).flatten().nonzero().squeeze(1)


def check_positions(positions: Tensor, numel: int) -> None:
    """Refuse positions that do not lie within a matrix, or not in strictly ascending order.

    Raises:
        ValueError: saying which of the two.

    Example:
        >>> check_positions(torch.tensor([0, 3, 3]), numel=4)
        Traceback (most recent call last):
        ...
        ValueError: pst_positions is not strictly ascending; entry 2 is 3, after 3.
    """
    outside = (positions < 0) | (positions >= numel)
    if outside.any():
        raise ValueError(f"pst_positions={int(positions[outside][0])} is outside [0, {numel}), the number of weights.")
    falls = (positions.diff() <= 0).nonzero()
    if len(falls):
        first = int(falls[0])
        raise ValueError(
            f"pst_positions is not strictly ascending; entry {first + 1} is {int(positions[first + 1])}, after "
            f"{int(positions[first])}."
        )
