"""One budget of zeros over many matrices: where the cut lies when all their scores are ranked together.

The scores of a whole model are never held at once. They are counted by their bit patterns, first by the upper and then
by the lower half of the bits, so that two passes find the cut exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .masking import NAN_MESSAGE, num_pruned

_HALF = 16
_BINS = 1 << _HALF


class Place(NamedTuple):
    """Where groups lie that share a sparsity with those of other places.

    Attributes:
        groups: how many, at least 1.
        size: entries of each, at least 1.
    """

    groups: int
    size: int


class Ranked(NamedTuple):
    """A matrix that competes with others for what is kept.

    Attributes:
        scores: makes the scores of its groups, in pieces of any shape, real, comparable between matrices; called twice.
        size: entries of a group, at least 1.
        most: groups that may be pruned at most; the best ones beyond that stay whatever the others score.
        name: what an error calls it.
    """

    scores: Callable[[], Iterable[Tensor]]
    size: int
    most: int
    name: str = "A matrix"


def most_pruned(groups: int, min_kept: float) -> int:
    """How many of some groups may be pruned if a fraction of them stays, rounded down, and one at least.

    Example:
        >>> most_pruned(100, 0.05), most_pruned(4, 0.05)
        (95, 3)
    """
    return groups - max(1, int(min_kept * groups))


def shared_budget(places: Iterable[Place], sparsity: float) -> int:
    """Entries to prune, if all places together reach a sparsity in [0, 1).

    Example:
        >>> shared_budget([Place(4, 10), Place(6, 10)], 0.25)
        25
    """
    return num_pruned(sum(place.groups * place.size for place in places), sparsity)


def shared_reach(places: Sequence[Place], sparsity: float) -> range:
    """Numbers of zeros that `split_budget` may come to: the budget, less what no whole group fits into.

    Example:
        >>> shared_reach([Place(4, 10), Place(6, 10)], 0.25)
        range(16, 26)
    """
    budget = shared_budget(places, sparsity)
    return range(budget - max(place.size for place in places) + 1, budget + 1)


def check_reachable(places: Sequence[Place], sparsity: float, min_kept: float, kind: str) -> None:
    """Refuse a sparsity that what each place keeps puts out of reach, before anything is trained for it.

    Args:
        places: what shares the sparsity.
        sparsity: fraction of zeros over all of them, in [0, 1).
        min_kept: fraction of its groups that each keeps, at least one group.
        kind: what they are called in the error, such as "matrices".

    Raises:
        ValueError: naming the highest sparsity.

    Example:
        >>> check_reachable([Place(4, 1), Place(6, 1)], 0.9, 0.01, "matrices")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: target_sparsity=0.9 cannot be reached over all matrices: ... 0.8 is the most; lower one of the two.
    """
    most = sum(most_pruned(place.groups, min_kept) * place.size for place in places)
    if shared_budget(places, sparsity) > most:
        weights = sum(place.groups * place.size for place in places)
        raise ValueError(
            f"target_sparsity={sparsity} cannot be reached over all {kind}: with min_kept={min_kept} of the groups of "
            f"each, and one at least, {most / weights:.4g} is the most; lower one of the two."
        )


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
    upper = torch.stack([_histogram(matrix, _upper) for matrix in matrices])
    before, bin_ = _find_bin(matrices, torch.zeros(len(matrices), dtype=torch.int64), upper, total)
    lower = torch.stack([_histogram(matrix, lambda keys: _lower(keys, bin_)) for matrix in matrices])
    before, last = _find_bin(matrices, before, lower, total)
    return _share_ties(matrices, before.tolist(), lower[:, last].tolist(), total)


def _histogram(matrix: Ranked, key: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each of 2**16 keys occurs, int64, on the CPU."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for piece in matrix.scores():
        if piece.isnan().any():
            raise ValueError(f"{matrix.name}: {NAN_MESSAGE}")
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
