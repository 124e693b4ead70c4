"""One budget of zeros over many matrices: where the cut lies when all their scores are ranked together.

The scores of a whole model are never held at once. They are counted by their bit patterns, first by the upper and then
by the lower half of the bits, so that two passes find the cut exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .masking import NAN_MESSAGE

_HALF = 16
_BINS = 1 << _HALF


class Ranked(NamedTuple):
    """A matrix that competes with others for what is kept.

    Attributes:
        scores: makes the scores of its groups, in pieces of any shape, real, comparable between matrices; called twice.
        size: entries of a group, at least 1.
        most: groups that may be pruned at most; the best ones beyond that stay whatever the others score.
    """

    scores: Callable[[], Iterable[Tensor]]
    size: int
    most: int


def most_pruned(groups: int, min_kept: float) -> int:
    """How many of some groups may be pruned if a fraction of them stays, rounded down, and one at least.

    Example:
        >>> most_pruned(100, 0.05), most_pruned(4, 0.05)
        (95, 3)
    """
    return groups - max(1, int(min_kept * groups))


def split_budget(matrices: Sequence[Ranked], total: int) -> list[int]:
    """How many groups of each matrix are pruned, if the lowest scores of all go until `total` entries are zero.

    Args:
        matrices: what is ranked together.
        total: entries to prune, in [0, sum of most * size].

    Returns:
        The number of groups for each matrix, in [0, most]. With groups of one entry they sum to `total` exactly; of
        larger ones as many go as fit. Of equal scores, those of the earlier matrix are pruned first.

    Raises:
        ValueError: if the matrices cannot give so many, or a score is NaN.

    Example:
        >>> low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 5.0, 6.0])
        >>> split_budget([Ranked(lambda: [low], 1, 3), Ranked(lambda: [high], 1, 3)], total=3)
        [2, 1]
        >>> split_budget([Ranked(lambda: [low], 1, 1), Ranked(lambda: [high], 1, 3)], total=3)
        [1, 2]
    """
    available = sum(matrix.most * matrix.size for matrix in matrices)
    if not 0 <= total <= available:
        raise ValueError(
            f"{total} zeros were asked for, but at most {available} fit into these matrices with what each keeps; "
            "lower the sparsity or `min_kept`."
        )
    if total == 0:
        return [0] * len(matrices)
    upper = torch.stack([_histogram(matrix.scores(), _upper) for matrix in matrices])
    before, bin_ = _find_bin(matrices, torch.zeros(len(matrices), dtype=torch.int64), upper, total)
    lower = torch.stack([_histogram(matrix.scores(), lambda keys: _lower(keys, bin_)) for matrix in matrices])
    before, last = _find_bin(matrices, before, lower, total)
    return _share_ties(matrices, before.tolist(), lower[:, last].tolist(), total)


def _histogram(pieces: Iterable[Tensor], key: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each of 2**16 keys occurs, int64, on the CPU."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for piece in pieces:
        if piece.isnan().any():
            raise ValueError(NAN_MESSAGE)
        counts += torch.bincount(key(_sortable(piece)), minlength=_BINS).cpu()
    return counts


def _sortable(scores: Tensor) -> Tensor:
    """Integers in the order of the scores, which count in float32; -0.0 and 0.0 are one."""
    bits = (scores.detach().reshape(-1).float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper(keys: Tensor) -> Tensor:
    return (keys >> _HALF) + _BINS // 2


def _lower(keys: Tensor, bin_: int) -> Tensor:
    return keys[_upper(keys) == bin_] & (_BINS - 1)


def _find_bin(matrices: Sequence[Ranked], before: Tensor, counts: Tensor, total: int) -> tuple[Tensor, int]:
    """The bin in which the budget is spent, and how many scores of each matrix lie before it.

    Args:
        matrices: as above.
        before: scores of each matrix that lie before the first bin, (matrices,).
        counts: scores in each bin, (matrices, bins).
        total: entries to prune.
    """
    most = torch.tensor([matrix.most for matrix in matrices])[:, None]
    sizes = torch.tensor([matrix.size for matrix in matrices])[:, None]
    reached = before[:, None] + counts.cumsum(1)
    pruned = (reached.clamp(max=most) * sizes).sum(0)
    bin_ = int(torch.searchsorted(pruned, total))
    return reached[:, bin_] - counts[:, bin_], bin_


def _share_ties(matrices: Sequence[Ranked], before: Sequence[int], ties: Sequence[int], total: int) -> list[int]:
    pruned = [min(count, matrix.most) for matrix, count in zip(matrices, before, strict=True)]
    left = total - sum(count * matrix.size for matrix, count in zip(matrices, pruned, strict=True))
    for index, (matrix, tied) in enumerate(zip(matrices, ties, strict=True)):
        more = min(tied, matrix.most - pruned[index], left // matrix.size)
        pruned[index] += more
        left -= more * matrix.size
    return pruned
