"""One tensor as packed mask bits and kept values, bit for bit: what a compact checkpoint stores of a sparse matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .masking import count_zeros, pack_mask, unpack_mask

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 22  # entries at a time, a multiple of 8, so that every block starts at a whole byte of the mask


class Packed(NamedTuple):
    """A tensor without its zeros.

    Attributes:
        mask: uint8, (ceil(n / 8),) for n entries, one bit an entry in row-major order as `pack_mask` stores them; 1
            where a value follows.
        values: the dtype of the tensor, (kept,), in row-major order. Every entry is kept whose bits are not all zero;
            so -0.0 is a value, and only +0.0 is left out.
    """

    mask: Tensor
    values: Tensor


def compact_ratio(bits: int, sparsity: float) -> float:
    """What a packed tensor takes of its dense size: 1 / bits for the mask, and the values that are kept.

    Args:
        bits: of one entry, 8, 16, 32 or 64.
        sparsity: fraction of zeros, in [0, 1].

    Example:
        >>> compact_ratio(16, 0.5)
        0.5625
    """
    return 1 / bits + (1 - sparsity)


def packed_bytes(numel: int, kept: int, bits: int) -> int:
    """Bytes of the mask and of the kept values of a tensor.

    Example:
        >>> packed_bytes(1000, 100, bits=16)
        325
    """
    return math.ceil(numel / 8) + kept * bits // 8


def kept_values(tensor: Tensor) -> int:
    """How many values `pack_tensor` keeps.

    Example:
        >>> kept_values(torch.tensor([[0.0, 3.0], [-0.0, 0.0]]))
        2
    """
    return int(_words(tensor.reshape(-1)).count_nonzero())


def num_negative_zeros(tensor: Tensor) -> int:
    """How many entries are -0.0, which `pack_tensor` keeps.

    Example:
        >>> num_negative_zeros(torch.tensor([0.0, -0.0, -1.0]))
        1
    """
    return kept_values(tensor) - (tensor.numel() - count_zeros(tensor))


def without_negative_zeros(tensor: Tensor) -> Tensor:
    """A copy with 0.0 for -0.0, and every other bit as it was.

    Example:
        >>> without_negative_zeros(torch.tensor([0.0, -0.0, -1.0]))
        tensor([ 0.,  0., -1.])
    """
    flat = tensor.reshape(-1)
    zero = (flat.float() if flat.element_size() == 1 else flat) == 0  # torch compares no 8-bit floats
    return _words(flat).masked_fill(zero, 0).view(tensor.dtype).view(tensor.shape)


def pack_tensor(tensor: Tensor) -> Packed:
    """Leave out what is +0.0.

    Args:
        tensor: any shape, on the CPU, any dtype of 8, 16, 32 or 64 bits.

    Example:
        >>> packed = pack_tensor(torch.tensor([[0.0, 3.0], [-0.0, 0.0]]))
        >>> packed.values, int(packed.mask)
        (tensor([3., -0.]), 6)
    """
    masks, values = [], []
    for block in _words(tensor.reshape(-1)).split(_BLOCK):
        keep = block != 0
        masks.append(pack_mask(keep))
        values.append(block[keep])
    return Packed(torch.cat(masks), torch.cat(values).view(tensor.dtype))


def unpack_tensor(packed: Packed, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_tensor`: the same bits.

    Args:
        packed: of a tensor of that shape; what it holds may come from a file, and is not trusted.
        shape: shape of the tensor.

    Returns:
        The dense tensor, in the dtype of the values.

    Raises:
        ValueError: if mask and values do not fit the shape or each other.

    Example:
        >>> unpack_tensor(pack_tensor(torch.tensor([[0.0, 3.0], [-0.0, 0.0]])), (2, 2))
        tensor([[0., 3.],
                [-0., 0.]])
    """
    numel, count = math.prod(shape), packed.values.numel()
    check_packed(packed, numel)
    values = _words(packed.values)
    dense = torch.zeros(numel, dtype=values.dtype)
    taken = 0
    for start in range(0, numel, _BLOCK):
        block = dense[start : start + _BLOCK]
        keep = unpack_mask(packed.mask[start // 8 : (start + _BLOCK) // 8], block.shape)
        here = int(keep.count_nonzero())
        if taken + here <= count:
            block.masked_scatter_(keep, values[taken : taken + here])
        taken += here
    if taken != count:
        raise ValueError(f"its mask keeps {taken} values, but {count} are stored.")
    return dense.view(packed.values.dtype).view(shape)


def check_packed(packed: Packed, numel: int) -> None:
    """Refuse what cannot be a packed tensor of so many entries, short of counting the bits of its mask.

    Raises:
        ValueError: saying what is wrong.

    Example:
        >>> check_packed(pack_tensor(torch.ones(4)), numel=20)
        Traceback (most recent call last):
        ...
        ValueError: its mask is torch.uint8 of shape (1,) instead of torch.uint8 of shape (3,).
    """
    mask, size = packed.mask, (math.ceil(numel / 8),)
    if mask.dtype != torch.uint8 or mask.shape != size:
        raise ValueError(
            f"its mask is {mask.dtype} of shape {tuple(mask.shape)} instead of torch.uint8 of shape {size}."
        )
    if packed.values.dim() != 1 or packed.values.element_size() not in _INTEGERS:
        raise ValueError(
            f"its values are {packed.values.dtype} of shape {tuple(packed.values.shape)}, not of one axis."
        )
    if numel % 8 and int(mask[-1]) >> numel % 8:
        raise ValueError(f"its mask has bits beyond its {numel} entries.")


def _words(flat: Tensor) -> Tensor:
    """The same bits as integers, of which copies and comparisons change and confuse none."""
    return flat.view(_INTEGERS[flat.element_size()])
