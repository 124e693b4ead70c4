"""From a sparsity to a count, and from scores to a mask with exactly that many zeros."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import available
from .schedule import check_sparsity

NAN_MESSAGE = "The scores hold a NaN, which has no rank; look for a NaN in the weights, the adapter or the loss."


def num_pruned(numel: int, sparsity: float) -> int:
    """How many of `numel` weights are zero at a sparsity: floor(numel * sparsity), exactly.

    The sparsity means the number that was written: 0.29 of 100 is 29, although the nearest float64 lies a little
    below 0.29 and its product with 100 is 28.999999999999996. A product within rounding of an integer is that integer.

    Args:
        numel: number of weights, at least 0.
        sparsity: fraction of zeros, in [0, 1); 0.9 keeps one weight in ten.

    Returns:
        The count, in [0, numel).

    Raises:
        ValueError: if `numel` is negative or `sparsity` lies outside [0, 1).

    Source: Li et al. 2022 (arXiv 2205.11005), the mask M.

    Example:
        >>> num_pruned(1000, 0.9), num_pruned(100, 0.29), num_pruned(7, 0.5), num_pruned(3, 1 / 3)
        (900, 29, 3, 1)
    """
    if numel < 0:
        raise ValueError(f"numel={numel} is negative; pass the number of weights.")
    check_sparsity("sparsity", sparsity)
    product = numel * sparsity
    nearest = round(product)
    # Decimal fraction, rounded to float64, times an integer, rounded again: two roundings of half an ulp each.
    count = nearest if abs(product - nearest) <= 2 * math.ulp(product) else math.floor(product)
    return min(count, max(numel - 1, 0))


def count_zeros(weight: Tensor) -> int:
    """Entries that are exactly zero; -0.0 is one of them.

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1e-30]))
        2
    """
    weight = weight.float() if weight.element_size() == 1 else weight  # torch counts no 8-bit floats
    return weight.numel() - int(torch.count_nonzero(weight))


def check_num_pruned(count: int, numel: int) -> None:
    """Refuse a stored number of zeros that the matrix cannot have.

    Raises:
        ValueError: if `count` is outside [0, numel).

    Example:
        >>> check_num_pruned(8, numel=8)
        Traceback (most recent call last):
        ...
        ValueError: pst_num_pruned=8 is outside [0, 8), the number of weights.
    """
    if not 0 <= count < numel:
        raise ValueError(f"pst_num_pruned={count} is outside [0, {numel}), the number of weights.")


def check_zeros(packed: Tensor, count: int, numel: int) -> None:
    """Refuse a stored mask that does not prune as many weights as the number of zeros stored with it says.

    Raises:
        ValueError: if the two differ.

    Example:
        >>> check_zeros(pack_mask(torch.tensor([True, False])), 2, numel=2)
        Traceback (most recent call last):
        ...
        ValueError: pst_mask prunes 1 weights, but pst_num_pruned=2.
    """
    zeros = numel - int(unpack_mask(packed, (numel,)).sum())
    if zeros != count:
        raise ValueError(f"pst_mask prunes {zeros} weights, but pst_num_pruned={count}.")


def select_mask(scores: Tensor, count: int) -> Tensor:
    """Mask out exactly the `count` lowest scores.

    Linear time: one introselect on the CPU (NumPy's, through a zero-copy view), counts of keys on a GPU with Triton, a
    radix selection elsewhere. Nothing is read back from a device to the host.

    Args:
        scores: importance of each weight, any shape, any real scale; higher is kept.
        count: number of entries to prune, in [0, scores.numel()].

    Returns:
        Boolean mask of the shape and device of `scores`, True = keep. Exactly `count` entries are False, also when
        scores tie: of two equal entries the earlier in row-major order is pruned.

    Raises:
        ValueError: if `count` is out of range, or, on the CPU and for 0 < count, if a score is NaN. Elsewhere a NaN is
            kept, and found by `merge(safe_merge=True)`.

    Example:
        >>> select_mask(torch.tensor([[0.1, 3.0], [0.1, 0.1]]), 2)
        tensor([[False,  True],
                [False,  True]])
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(f"count={count} is outside [0, {scores.numel()}], the number of scores.")
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if available(scores):
        return unpack_mask(select_packed_mask(scores, count), scores.shape)
    flat = scores.detach().reshape(-1)
    select = _select_on_cpu if flat.device.type == "cpu" else _select_on_device
    return select(flat, count).reshape(scores.shape)


def select_packed_mask(scores: Tensor, count: int) -> Tensor:
    """`pack_mask(select_mask(scores, count))`, which a GPU with Triton writes without the boolean mask between.

    Args:
        scores: as for `select_mask`.
        count: as for `select_mask`.

    Returns:
        uint8, (ceil(scores.numel() / 8),), to be read by `unpack_mask`.

    Raises:
        ValueError: as `select_mask` does.

    Example:
        >>> unpack_mask(select_packed_mask(torch.tensor([0.1, 3.0, 0.1]), 1), (3,))
        tensor([False,  True,  True])
    """
    if not 0 < count <= scores.numel() or not available(scores):
        return pack_mask(select_mask(scores, count))
    from .kernels import selection  # imports Triton

    return selection.select_packed_mask(scores, count)


def _select_on_cpu(flat: Tensor, count: int) -> Tensor:
    # A copy, because partitioning reorders in place; half precisions, which NumPy lacks, widen without rounding.
    work = flat.to(torch.float32, copy=True) if flat.element_size() < 4 else flat.clone()
    work.numpy().partition(count - 1)
    if work[count - 1 :].isnan().any():  # NumPy puts NaN last
        raise ValueError(NAN_MESSAGE)
    threshold = work[count - 1]
    mask = flat > threshold
    missing = flat.numel() - count - int(torch.count_nonzero(mask))
    if missing:
        mask[(flat == threshold).nonzero().squeeze(1)[-missing:]] = True
    return mask


def _select_on_device(flat: Tensor, count: int) -> Tensor:
    """The same without a word to the host: looking for ties costs a scan, asking whether there are any a stall.

    Nor can a NaN be refused without asking; it is kept, as the highest score, so that the count holds.
    """
    flat = flat.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    keys = flat.float() if flat.element_size() < 4 else flat
    kept = flat.numel() - count
    if kept == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    # Unlike `kthvalue`, which runs on one multiprocessor, `topk` spreads its radix selection over all; the smaller side
    # is the cheaper to write. Either way no score above the threshold is pruned, and none below is kept.
    if kept < count:
        threshold = keys.topk(kept, sorted=False).values.amin()
    else:
        threshold = keys.topk(count, largest=False, sorted=False).values.amax()
    mask = flat > threshold
    ties = flat == threshold
    position = ties.cumsum(0, dtype=torch.int32 if flat.numel() < 2**31 else torch.int64)
    return mask | (ties & (position > position[-1] - (kept - mask.sum())))


# One multiplication gathers the low bits of eight bytes in the top byte, another spreads a byte over eight.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_BITS = 0x8040201008040201 - (1 << 64)  # as a signed 64-bit integer


def pack_mask(mask: Tensor) -> Tensor:
    """Store a boolean mask in one bit per entry.

    Args:
        mask: boolean, any shape.

    Returns:
        uint8, (ceil(mask.numel() / 8),), to be read by `unpack_mask`.

    Example:
        >>> pack_mask(torch.ones(20, dtype=torch.bool)).shape
        torch.Size([3])
    """
    # Padding copies, also by nothing, and so aligns what is read eight bytes at a time.
    flat = F.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    words = flat.view(torch.uint8).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Read a mask written by `pack_mask`.

    Args:
        packed: uint8, (ceil(n / 8),), where n is the number of entries of `shape`.
        shape: shape of the mask.

    Returns:
        Boolean mask of that shape.

    Example:
        >>> mask = torch.tensor([[True, False, True], [False, False, True]])
        >>> torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)
        True
    """
    spread = (packed.to(torch.int64) * _SPREAD) & _BITS
    return spread.view(torch.uint8)[: math.prod(shape)].view(shape).ne(0)


def masked_weight(weight: Tensor, packed: Tensor) -> Tensor:
    """Zero the pruned entries: W where the mask is True, +0.0 elsewhere.

    A product with the mask would leave -0.0 behind and turn infinities into NaN.

    Args:
        weight: any shape and floating dtype.
        packed: uint8, the mask of that shape as `pack_mask` stores it.

    Returns:
        A new tensor of the shape and dtype of `weight`.

    Example:
        >>> masked_weight(torch.tensor([-1.0, 2.0]), pack_mask(torch.tensor([False, True])))
        tensor([0., 2.])
    """
    integer = {4: torch.int32, 8: torch.int64}.get(weight.element_size())
    if integer is None or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(unpack_mask(packed, weight.shape), weight, 0)
    # On the CPU a choice by booleans is not vectorised and takes five times as long as this: each byte of the mask is
    # looked up as eight words of all ones or all zeros, which a bitwise "and" turns into the weights or into +0.0.
    words = _words(integer).index_select(0, packed.int()).view(-1)[: weight.numel()].view(weight.shape)
    return words.bitwise_and_(weight.view(integer)).view(weight.dtype)


@cache
def _words(integer: torch.dtype) -> Tensor:
    """Row b: for each bit of the byte b, lowest first, a word of that bit alone; (256, 8)."""
    # Named, because the table outlives whatever device is the default now.
    bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
    return bits.neg().to(integer)
