"""The effective weight and the scores, each in one pass: the base weight is read once, the result written once.

Everything is computed in float32, as the torch functions do, whatever the base weight is stored in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scoring import Factors

ROWS, COLUMNS = 16, 256  # of a tile


def effective_weight(weight: Tensor, factors: Factors, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """W0 + beta U V where the mask keeps, +0.0 elsewhere, rounded to the dtype of `weight` and then to `dtype`.

    Args:
        weight: base weight W0, (out, in), any strides; float32, bfloat16 or float16, on a CUDA device.
        factors: U (out, r) and V (r, in) are read, or nothing is added when they are None; S has to be None.
        packed: the mask, as `pack_mask` stores it.
        dtype: of the result; float32, bfloat16 or float16.

    Returns:
        (out, in), contiguous.
    """
    effective = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        _effective_weight[_grid(weight)](
            weight, *weight.stride(), *as_arguments(factors.U, factors.V, weight), float(factors.beta), packed,
            effective, *weight.shape, HAS_UPDATE=factors.U is not None, WHOLE_BYTES=weight.shape[1] % 8 == 0,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return effective


def importance_scores(weight: Tensor, factors: Factors) -> Tensor:
    """S = |W| + alpha1 A B + alpha2 (R 1' + 1 C') with W = W0 + beta U V.

    Args:
        weight: base weight W0, (out, in), any strides; float32, bfloat16 or float16, on a CUDA device.
        factors: the adapter; each part may be None, and S has to be.

    Returns:
        S, (out, in), float32, contiguous.
    """
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    structured = factors.R is not None
    R, C = (tensor.contiguous() if tensor is not None else weight for tensor in (factors.R, factors.C))
    with torch.cuda.device_of(weight):
        _importance_scores[_grid(weight)](
            weight, *weight.stride(), *as_arguments(factors.U, factors.V, weight), float(factors.beta),
            *as_arguments(factors.A, factors.B, weight), float(factors.alpha1),
            R, C, float(factors.alpha2), scores, *weight.shape,
            HAS_UPDATE=factors.U is not None, HAS_LOW_RANK=factors.A is not None, HAS_STRUCTURED=structured,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return scores


def _grid(weight: Tensor) -> tuple[int, int]:
    return triton.cdiv(weight.shape[0], ROWS), triton.cdiv(weight.shape[1], COLUMNS)


def as_arguments(left: Tensor | None, right: Tensor | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int]:
    """The factors of a product and its rank, as kernels take them; a part that is absent is never read."""
    if left is None or right is None:
        return stand_in, stand_in, 0
    return left.contiguous(), right.contiguous(), left.shape[1]


@triton.jit
def add_product(total, left, right, rank, scale, row, column, height, width):
    """`total` + scale * left @ right, for one tile; left (height, rank) and right (rank, width) are contiguous.

    As outer products, one after another: at such ranks a matrix product proper would be padded to twice its size.
    """
    for k in range(rank):
        a = tl.load(left + row * rank + k, mask=row < height, other=0).to(tl.float32) * scale
        b = tl.load(right + k * width + column, mask=column < width, other=0).to(tl.float32)
        total = tl.fma(a[:, None], b[None, :], total)  # whatever the compiler's setting for fusing the two
    return total


@triton.jit
def load_mask(packed, row, first_column, height, width, WHOLE_BYTES: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries are kept, 0 or 1, of the tile of `row` and `COLUMNS` columns from a multiple of 8 on.

    Where rows are whole bytes, as they nearly always are, each byte is loaded once, and not once for each of its bits.
    """
    if WHOLE_BYTES:
        byte_column = first_column // 8 + tl.arange(0, COLUMNS // 8)
        inside = (row[:, None] < height) & (byte_column[None, :] < width // 8)
        byte = tl.load(packed + row[:, None] * (width // 8) + byte_column[None, :], mask=inside, other=0).to(tl.int32)
        bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        bits = tl.reshape(bits, (row.shape[0], COLUMNS))
    else:
        column = first_column + tl.arange(0, COLUMNS)
        inside = (row[:, None] < height) & (column[None, :] < width)
        position = row[:, None] * width + column[None, :]
        byte = tl.load(packed + (position >> 3), mask=inside, other=0).to(tl.int32)
        bits = (byte >> (position & 7)) & 1
    return bits


@triton.jit
def _effective_weight(
    weight, row_stride, column_stride, U, V, rank, beta, packed, effective, height, width,
    HAS_UPDATE: tl.constexpr, WHOLE_BYTES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < height) & (column[None, :] < width)
    base = tl.load(weight + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0)
    total = base.to(tl.float32)
    if HAS_UPDATE:
        total = add_product(total, U, V, rank, beta, row, column, height, width)
    kept = load_mask(packed, row, tl.program_id(1) * COLUMNS, height, width, WHOLE_BYTES, COLUMNS)
    total = tl.where(kept != 0, total, 0.0)
    rounded = total.to(base.dtype).to(effective.dtype.element_ty)
    tl.store(effective + row[:, None] * width + column[None, :], rounded, mask=inside)


@triton.jit
def _importance_scores(
    weight, row_stride, column_stride, U, V, rank, beta, A, B, score_rank, alpha1, R, C, alpha2, scores, height, width,
    HAS_UPDATE: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_STRUCTURED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < height) & (column[None, :] < width)
    base = tl.load(weight + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0)
    total = base.to(tl.float32)
    if HAS_UPDATE:
        total = add_product(total, U, V, rank, beta, row, column, height, width)
    total = tl.abs(total)
    if HAS_LOW_RANK:
        total = add_product(total, A, B, score_rank, alpha1, row, column, height, width)
    if HAS_STRUCTURED:
        total += (tl.load(R + row, mask=row < height, other=0).to(tl.float32) * alpha2)[:, None]
        total += (tl.load(C + column, mask=column < width, other=0).to(tl.float32) * alpha2)[None, :]
    tl.store(scores + row[:, None] * width + column[None, :], total, mask=inside)
