"""Greedy bilateral decomposition of a matrix into a low-rank and a sparse part.

Source: Zhou & Tao, "Greedy Bilateral Sketch, Completion & Smoothing", AISTATS 2013 (GreBsmo).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .masking import masked_weight, num_pruned, pack_mask, select_mask
from .scoring import score_dtype


class LowRankPlusSparse(NamedTuple):
    """W ~ left @ right + sparse.

    Attributes:
        left: (out, rank), with orthonormal columns.
        right: (rank, in).
        sparse: (out, in), with an exact number of entries that may differ from zero.
    """

    left: Tensor
    right: Tensor
    sparse: Tensor


@torch.no_grad()
def grebsmo(
    weight: Tensor,
    rank: int,
    sparsity: float,
    *,
    rank_step: int = 1,
    iterations: int = 3,
    generator: torch.Generator | None = None,
) -> LowRankPlusSparse:
    """Split a matrix into low-rank plus sparse, W ~ U V + S, by alternating three cheap updates.

    The rank grows greedily: every stage adds to V a random sketch of what is not explained yet, and then alternates

        U = the orthonormal basis of (W - S) V'        V = U' (W - S)        S = the largest entries of W - U V

    Costs two products of the matrix with rank vectors, a thin QR and a linear-time selection an iteration, and no
    singular value decomposition.

    Args:
        weight: W, (out, in), any floating dtype; computed in float32, or float64 where it has that.
        rank: rank of U V, in [0, min(out, in)].
        sparsity: fraction of zeros in S, in [0, 1); exactly `num_pruned(W.numel(), sparsity)` entries are zero.
        rank_step: how much the rank grows a stage, at least 1; more is faster and recovers a planted S less well.
        iterations: alternations a stage, at least 1.
        generator: of the random sketches, on the CPU, so that every device draws the same; the global one when None.

    Returns:
        U, V and S in the precision above.

    Raises:
        ValueError: if an argument is out of its range, or, on the CPU, if the matrix holds a NaN.

    Source: Zhou & Tao 2013, algorithm GreBsmo. The paper shrinks S by a threshold lambda; here the number of its
    entries is given instead, as DSEE (Chen et al., ACL 2023, arXiv 2111.00160) asks for.

    Example:
        >>> weight = torch.outer(torch.arange(1.0, 5.0), torch.ones(4))
        >>> weight[2, 1] += 50.0
        >>> parts = grebsmo(weight, rank=1, sparsity=15 / 16, generator=torch.Generator().manual_seed(0))
        >>> parts.sparse.nonzero().tolist(), round(parts.sparse[2, 1].item())
        ([[2, 1]], 50)
    """
    _check(weight, rank, rank_step, iterations)
    weight = weight.to(score_dtype(weight.dtype))
    count = num_pruned(weight.numel(), sparsity)
    left, right = weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
    sparse = _largest_entries(weight, count)
    while right.shape[0] < rank:
        step = min(rank_step, rank - right.shape[0])
        sketch = torch.randn(step, weight.shape[0], generator=generator, dtype=weight.dtype).to(weight.device)
        right = torch.cat([right, sketch @ (weight - sparse - left @ right)])
        for _ in range(iterations):
            smooth = weight - sparse
            left = torch.linalg.qr(smooth @ right.T).Q
            right = left.T @ smooth
            sparse = _largest_entries(weight - left @ right, count)
    return LowRankPlusSparse(left, right, sparse)


def _largest_entries(matrix: Tensor, num_zeros: int) -> Tensor:
    """The matrix with its `num_zeros` smallest magnitudes set to zero."""
    return masked_weight(matrix, pack_mask(select_mask(matrix.abs(), num_zeros)))


def _check(weight: Tensor, rank: int, rank_step: int, iterations: int) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass one matrix, (out, in).")
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} is outside [0, {min(weight.shape)}], the smaller side of {tuple(weight.shape)}.")
    for name, value in (("rank_step", rank_step), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1.")
