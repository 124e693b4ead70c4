"""From the dense gradient of some rows to the gradients of all factors, reading it and the base weight once.

With G = dL/dW_eff, W = W0 + beta U V and the mask M

    dS = G * W          dW = G * M + dS * sign(W) = G * M + G * |W|
    dU = beta dW V'     dV = beta U' dW
    dA = alpha1 dS B'   dB = alpha1 A' dS   dR = alpha2 dS 1   dC = alpha2 dS' 1

dS and dW exist only as tiles in registers. A program goes along `STRIP` columns of `ROWS` rows and leaves what it
contributes in arrays of its own. These are added up afterwards, always in the same order, so that the result is the
same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scoring import Factors
from .weights import add_product, as_arguments, load_mask

ROWS, STRIP = 64, 512
COLUMNS = {2: 64, 4: 32}  # of a tile, by the bytes of an entry of G: exact products in float32 take more registers
LARGEST_RANK = 64


def supports(factors: Factors) -> bool:
    """Whether the ranks are small enough for a tile to fit the registers."""
    return all(tensor is None or tensor.shape[1] <= LARGEST_RANK for tensor in (factors.U, factors.A))


def add_gradients(grad: Tensor, weight: Tensor, factors: Factors, packed: Tensor, total: Factors) -> None:
    """Add what some rows contribute to the gradients of the factors.

    Args:
        grad: G, (rows, in), float32, bfloat16 or float16.
        weight: the base weight of these rows, (rows, in), any strides.
        factors: the adapter, with U (rows, r), A (rows, score_rank) and R (rows,) of these rows; any part may be None,
            and S has to be.
        packed: the mask of these rows, as `pack_mask` stores it.
        total: what to add to, in the shapes of `factors`, float32; None where no gradient is wanted.
    """
    height, width = weight.shape
    row_strips, column_strips = triton.cdiv(height, ROWS), triton.cdiv(width, STRIP)
    totals = (total.U, total.V, total.A, total.B, total.R, total.C)
    parts = [
        None if tensor is None else torch.empty((strips, *tensor.shape), dtype=torch.float32, device=weight.device)
        for tensor, strips in zip(totals, (column_strips, row_strips) * 3, strict=True)
    ]
    *update, rank = as_arguments(factors.U, factors.V, weight)
    *low_rank, score_rank = as_arguments(factors.A, factors.B, weight)
    wanted = {f"WANTS_{letter}": part is not None for letter, part in zip("UVABRC", parts, strict=True)}
    with torch.cuda.device_of(weight):
        _reduce[(row_strips, column_strips)](
            grad.contiguous(), weight, *weight.stride(), *update, rank, float(factors.beta), *low_rank, score_rank,
            packed, *(weight if part is None else part for part in parts), height, width,
            HAS_UPDATE=rank > 0, WHOLE_BYTES=width % 8 == 0, RANK=_padded(rank), SCORE_RANK=_padded(score_rank),
            **wanted, ROWS=ROWS, COLUMNS=COLUMNS[grad.element_size()], STRIP=STRIP,
            IN_HALVES=grad.element_size() < 4, num_warps=4,
        )  # fmt: skip
    scales = (factors.beta, factors.beta, factors.alpha1, factors.alpha1, factors.alpha2, factors.alpha2)
    for tensor, part, scale in zip(totals, parts, scales, strict=True):
        if tensor is not None and part is not None:
            tensor.add_(part.sum(0), alpha=scale)


def _padded(rank: int) -> int:
    """The least width of a matrix product in Triton is 16."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _dot(left, right, IN_HALVES: tl.constexpr):
    """A matrix product by three products on the tensor cores: of the leading parts, and of each with the other's rest.

    With parts in tf32 the error is about that of float32. A gradient that is stored in halves, with a relative error of
    2^-9 or 2^-12 already, is well served by parts in bfloat16, which leave 2^-16 and take half the work.
    """
    if IN_HALVES:
        left_high = left.to(tl.bfloat16)
        left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
        right_high = right.to(tl.bfloat16)
        right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(left_low, right_high)
        product = tl.dot(left_high, right_low, product)
        product = tl.dot(left_high, right_high, product)
    else:
        product = tl.dot(left, right, input_precision="tf32x3")
    return product


@triton.jit
def _load_columns(matrix, rank, column, width, RANK: tl.constexpr):
    """Some columns of a (rank, width) matrix, transposed and padded: (columns, RANK)."""
    k = tl.arange(0, RANK)
    inside = (k[None, :] < rank) & (column[:, None] < width)
    return tl.load(matrix + k[None, :] * width + column[:, None], mask=inside, other=0).to(tl.float32)


@triton.jit
def _load_rows(matrix, rank, row, height, RANK: tl.constexpr):
    """Some rows of a (height, rank) matrix, padded: (rows, RANK)."""
    k = tl.arange(0, RANK)
    inside = (k[None, :] < rank) & (row[:, None] < height)
    return tl.load(matrix + row[:, None] * rank + k[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _store_columns(part, values, rank, column, width, RANK: tl.constexpr):
    """The inverse of `_load_columns`."""
    k = tl.arange(0, RANK)
    inside = (k[None, :] < rank) & (column[:, None] < width)
    tl.store(part + k[None, :] * width + column[:, None], values, mask=inside)


@triton.jit
def _store_rows(part, values, rank, row, height, RANK: tl.constexpr):
    """The inverse of `_load_rows`."""
    k = tl.arange(0, RANK)
    inside = (k[None, :] < rank) & (row[:, None] < height)
    tl.store(part + row[:, None] * rank + k[None, :], values, mask=inside)


@triton.jit
def _reduce(
    grad, weight, row_stride, column_stride, U, V, rank, beta, A, B, score_rank, packed,
    part_U, part_V, part_A, part_B, part_R, part_C, height, width,
    HAS_UPDATE: tl.constexpr, WHOLE_BYTES: tl.constexpr, RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
    WANTS_U: tl.constexpr, WANTS_V: tl.constexpr, WANTS_A: tl.constexpr, WANTS_B: tl.constexpr,
    WANTS_R: tl.constexpr, WANTS_C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, IN_HALVES: tl.constexpr,
):  # fmt: skip
    row_strip = tl.program_id(0)
    column_strip = tl.program_id(1)
    row = row_strip * ROWS + tl.arange(0, ROWS)
    sum_U = tl.zeros((ROWS, RANK), tl.float32)
    sum_A = tl.zeros((ROWS, SCORE_RANK), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    for start in range(0, STRIP, COLUMNS):
        column = column_strip * STRIP + start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < height) & (column[None, :] < width)
        base = tl.load(weight + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0)
        updated = base.to(tl.float32)
        if HAS_UPDATE:
            updated = add_product(updated, U, V, rank, beta, row, column, height, width)
        g = tl.load(grad + row[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
        bits = load_mask(packed, row, column_strip * STRIP + start, height, width, WHOLE_BYTES, COLUMNS)
        kept = tl.where(bits != 0, g, 0.0)
        grad_scores = g * updated
        grad_weight = kept + g * tl.abs(updated)
        if WANTS_U:
            sum_U += _dot(grad_weight, _load_columns(V, rank, column, width, RANK), IN_HALVES)
        if WANTS_V:
            sums = _dot(tl.trans(grad_weight), _load_rows(U, rank, row, height, RANK), IN_HALVES)
            _store_columns(part_V + row_strip * rank * width, sums, rank, column, width, RANK)
        if WANTS_A:
            sum_A += _dot(grad_scores, _load_columns(B, score_rank, column, width, SCORE_RANK), IN_HALVES)
        if WANTS_B:
            sums = _dot(tl.trans(grad_scores), _load_rows(A, score_rank, row, height, SCORE_RANK), IN_HALVES)
            _store_columns(part_B + row_strip * score_rank * width, sums, score_rank, column, width, SCORE_RANK)
        if WANTS_R:
            sum_R += tl.sum(grad_scores, 1)
        if WANTS_C:
            tl.store(part_C + row_strip * width + column, tl.sum(grad_scores, 0), mask=column < width)
    if WANTS_U:
        _store_rows(part_U + column_strip * height * rank, sum_U, rank, row, height, RANK)
    if WANTS_A:
        _store_rows(part_A + column_strip * height * score_rank, sum_A, score_rank, row, height, SCORE_RANK)
    if WANTS_R:
        tl.store(part_R + column_strip * height + row, sum_R, mask=row < height)
