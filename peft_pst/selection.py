"""Selecting the mask of an adapter: from the formula of its scores, which need not exist as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .blocks import CACHE_NUMEL, is_large, on_eager_cpu, row_blocks
from .masking import NAN_MESSAGE, count_zeros, pack_mask, select_mask, select_packed_mask, unpack_mask
from .patterns import UNSTRUCTURED, Pattern, Size, block_means, expand_groups
from .scoring import Factors, base_scores, rank_zeros_lowest

_SAMPLE = 128  # rows and columns whose scores are looked at first
_DEVIATIONS = 4.5  # of the sample's cut, to either side
_MOST_INSIDE = 0.15  # of the scores, each of which costs an index of eight bytes


def select_adapter_mask(
    weight: Tensor,
    factors: Factors,
    counts: Sequence[int],
    pattern: Pattern = UNSTRUCTURED,
    *,
    keep_zeros: bool = False,
) -> Tensor:
    """The mask that an adapter's scores select in each part of a matrix, by a pattern.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        factors: the adapter.
        counts: number of entries to prune in each part; the parts are equally many rows, one below the other.
        pattern: what is pruned together.
        keep_zeros: whether the zeros of the base weight are pruned before everything else; they are whole groups then,
            and each count is at least their number.

    Returns:
        uint8, (ceil(out * in / 8),), the mask as `pack_mask` stores it: part by part what `select_pattern_mask` makes
        of `selection_scores(weight, factors)`.

    Raises:
        ValueError: as `select_mask` does.

    Example:
        >>> factors = Factors(R=torch.tensor([0.0, 3.0]), C=torch.zeros(2))
        >>> weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
        >>> select_adapter_mask(weight, factors, [2]), select_adapter_mask(weight, factors, [1, 1])
        (tensor([12], dtype=torch.uint8), tensor([10], dtype=torch.uint8))
    """
    if len(counts) == 1:
        return _select_part(weight, factors, counts[0], pattern, keep_zeros)
    height, width = weight.shape[0] // len(counts), weight.shape[1]
    parts = [slice(start, start + height) for start in range(0, weight.shape[0], height)]
    packed = [
        _select_part(weight[rows], factors.rows(rows, width), count, pattern, keep_zeros)
        for rows, count in zip(parts, counts, strict=True)
    ]
    if height * width % 8 == 0:
        return torch.cat(packed)
    return pack_mask(torch.cat([unpack_mask(part, (height, width)) for part in packed]))


def _select_part(weight: Tensor, factors: Factors, count: int, pattern: Pattern, keep_zeros: bool) -> Tensor:
    if pattern == UNSTRUCTURED:
        return select_unstructured(weight, factors, count, keep_zeros=keep_zeros)
    size = pattern.size((weight.shape[0], weight.shape[1]))
    scores = torch.cat(list(group_scores(weight, factors, size, keep_zeros=keep_zeros)))
    return pack_mask(expand_groups(pattern.select(scores, count // (size[0] * size[1])), size))


def group_scores(weight: Tensor, factors: Factors, size: Size, *, keep_zeros: bool = False) -> Iterator[Tensor]:
    """Mean of `selection_scores(weight, factors)` over each block of a matrix, in pieces if it is large.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        factors: the adapter.
        size: rows and columns of a block.
        keep_zeros: whether the zeros of the base weight rank lowest.

    Yields:
        The next rows of the (out / rows, in / columns) means, in score precision.

    Example:
        >>> list(group_scores(torch.tensor([[1.0, -3.0]]), Factors(), (1, 2)))
        [tensor([[2.]])]
    """
    height, width = weight.shape
    blocks = row_blocks(0, height, width, CACHE_NUMEL, size[0]) if is_large(weight) else [slice(0, height)]
    for rows in blocks:
        scores = selection_scores(weight[rows], factors.rows(rows, width), keep_zeros=keep_zeros)
        yield scores if size == (1, 1) else block_means(scores, size)


def select_unstructured(weight: Tensor, factors: Factors, count: int, *, keep_zeros: bool = False) -> Tensor:
    """The `count` lowest scores pruned: `select_packed_mask(selection_scores(weight, factors), count)`.

    On the CPU, the scores of a large matrix are made block by block. A sample encloses the cut between two values; what
    lies above them is kept, what lies below is pruned, and only the few between are held and selected from. Where whole
    rows or columns decide, or most scores tie, they are not few, and all are selected from at once.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        factors: the adapter.
        count: number of entries to prune, in [0, weight.numel()].
        keep_zeros: whether the zeros of the base weight are pruned before everything else; `count` is at least their
            number then.

    Returns:
        uint8, (ceil(out * in / 8),), the mask as `pack_mask` stores it, with exactly `count` zeros.

    Raises:
        ValueError: as `select_mask` does.

    Example:
        >>> factors = Factors(R=torch.tensor([0.0, 3.0]), C=torch.zeros(2))
        >>> select_unstructured(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), factors, count=2)
        tensor([12], dtype=torch.uint8)
    """
    if keep_zeros and on_eager_cpu(weight) and count == count_zeros(weight):
        return pack_mask(weight != 0)  # nothing is left to be ranked; elsewhere, counting would stall the host
    if is_large(weight) and 0 < count < weight.numel():
        bracket = _bracket(weight, factors, count, keep_zeros)
        packed = None if bracket is None else _select_between(weight, factors, count, *bracket, keep_zeros)
        if packed is not None:
            return packed
    return select_packed_mask(selection_scores(weight, factors, keep_zeros=keep_zeros), count)


def selection_scores(weight: Tensor, factors: Factors, *, keep_zeros: bool = False) -> Tensor:
    """What a mask is selected by: `base_scores`, in which zeros that are to be kept rank lowest.

    Example:
        >>> factors = Factors(R=torch.tensor([3.0]), C=torch.zeros(3))
        >>> selection_scores(torch.tensor([[0.0, 1.0, -2.0]]), factors, keep_zeros=True)
        tensor([[-inf, 4., 5.]])
    """
    scores = base_scores(weight, factors)
    return rank_zeros_lowest(scores, weight) if keep_zeros else scores


def _bracket(weight: Tensor, factors: Factors, count: int, keep_zeros: bool = False) -> tuple[float, float] | None:
    """Two values between which the cut lies, most likely; None where too much would lie between them to be worth it."""
    # Chosen at random, since neighbours are alike, but always the same, since a selection is reproducible.
    generator = torch.Generator("cpu").manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator, device="cpu")[:_SAMPLE] for size in weight.shape)
    sampled = weight[rows[:, None], columns]
    sample = selection_scores(sampled, factors.at(rows, columns), keep_zeros=keep_zeros)
    ranked = sample.flatten().sort().values
    share = count / weight.numel()
    pruned = (sample <= ranked[min(int(share * len(ranked)), len(ranked) - 1)]).double()
    # Scores of one row or column are alike, so the sample is worth as many rows and columns as entries, at worst.
    variance = sum(pruned.mean(axis).var(correction=0) / pruned.shape[1 - axis] for axis in (0, 1))
    margin = _DEVIATIONS * math.sqrt(float(variance)) + 1 / len(ranked)
    low, high = math.floor((share - margin) * len(ranked)), math.ceil((share + margin) * len(ranked))
    lowest = -math.inf if low < 0 else float(ranked[low])
    highest = math.inf if high >= len(ranked) else float(ranked[high])
    inside = torch.count_nonzero((ranked >= lowest) & (ranked <= highest))
    return None if inside > _MOST_INSIDE * len(ranked) else (lowest, highest)


def _select_between(
    weight: Tensor, factors: Factors, count: int, low: float, high: float, keep_zeros: bool = False
) -> Tensor | None:
    """The packed mask, or None if the cut does not lie between `low` and `high`."""
    height, width = weight.shape
    packed, inside, values, lowest, below = [], [], [], [], 0
    for block in row_blocks(0, height, width, CACHE_NUMEL):
        rows = factors.rows(block, width)
        scores = selection_scores(weight[block], rows, keep_zeros=keep_zeros).reshape(-1)
        lowest.append(scores.amin())
        above = scores > high
        positions = ((scores >= low) ^ above).nonzero().squeeze(1)
        inside.append(positions)
        values.append(scores[positions])
        packed.append(pack_mask(above))
        below += scores.numel() - int(torch.count_nonzero(above)) - len(positions)
    if torch.stack(lowest).isnan().any():  # a minimum hands on a NaN, which every comparison denies
        raise ValueError(NAN_MESSAGE)
    between = torch.cat(values)
    if not 0 <= count - below <= len(between):
        return None
    kept = select_mask(between, count - below).split([len(positions) for positions in inside])
    return torch.cat([_with_kept(*parts) for parts in zip(packed, inside, kept, strict=True)])


def _with_kept(packed: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
    """A packed mask that keeps further entries."""
    chosen = positions[kept]
    bits = torch.ones_like(chosen, dtype=torch.uint8) << (chosen % 8).to(torch.uint8)
    # No two of them mean the same bit, so adding up sets them all.
    return packed.index_add_(0, chosen // 8, bits)
