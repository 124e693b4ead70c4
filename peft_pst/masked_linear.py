"""The masked weight and the masked linear map as differentiable operations with a hand-written backward.

Forward and backward keep one bit per weight, the small factors, and the linear map its input. Everything else of the
layer's size is made again when it is needed, by the same functions that merging and reporting use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .blocks import CACHE_NUMEL, is_large, on_eager_cpu, row_blocks
from .masking import masked_weight
from .patterns import Size, reduce_to_blocks
from .scoring import Factors, add_update, locate, score_dtype

Settings = tuple[float, float, float, Size]  # beta, alpha1, alpha2, and the size of a block


class Pruner(NamedTuple):
    """One active adapter of a layer.

    Attributes:
        factors: what trains.
        mask: what its scores selected, packed to one bit per weight.
        size: rows and columns of the blocks to whose mean the scores were reduced before.
    """

    factors: Factors
    mask: Tensor
    size: Size = (1, 1)

    @property
    def settings(self) -> Settings:
        """What is no tensor."""
        return *self.factors.scales, self.size


def effective_weight(weight: Tensor, pruners: Sequence[Pruner], dtype: torch.dtype | None = None) -> Tensor:
    """The weight that multiplies the input: (W0 + sum_i (beta_i U_i V_i + S_i)), zero where any adapter prunes.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        pruners: the active adapters, at least one; their order does not matter beyond the rounding of the sum.
        dtype: what to round the result to once it has been rounded to the dtype of `weight`; by default nothing.

    Returns:
        (out, in), in the dtype of `weight` or in `dtype`, with +0.0 at every pruned entry.

    Source: Li et al. 2022 (arXiv 2205.11005), y = x (M * W)' + b, for one adapter; the product of masks for several.

    Example:
        >>> from peft_pst.masking import pack_mask
        >>> factors = Factors(U=torch.ones(2, 1), V=torch.tensor([[0.5, 0.0]]))
        >>> pruner = Pruner(factors, pack_mask(torch.tensor([[True, False], [True, True]])))
        >>> effective_weight(torch.ones(2, 2), [pruner])
        tensor([[1.5000, 0.0000],
                [1.5000, 1.0000]])
    """
    dtype = dtype or weight.dtype
    if _has_kernels(weight, pruners) and dtype in kernels.SUPPORTED:
        from .kernels import weights  # imports Triton

        return weights.effective_weight(weight, pruners[0].factors, pruners[0].mask, dtype)
    if not is_large(weight):
        return _effective_rows(weight, pruners).to(dtype)
    effective = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for block in row_blocks(0, weight.shape[0], weight.shape[1], CACHE_NUMEL):
        effective[block] = _effective_rows(weight[block], [_rows(pruner, block, weight.shape[1]) for pruner in pruners])
    return effective


def _effective_rows(weight: Tensor, pruners: Sequence[Pruner]) -> Tensor:
    mask = _intersection([pruner.mask for pruner in pruners])
    return masked_weight(_updated(weight, pruners), mask).to(weight.dtype)


def _has_kernels(weight: Tensor, pruners: Sequence[Pruner]) -> bool:
    return len(pruners) == 1 and pruners[0].factors.S is None and kernels.available(weight)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pruners: Sequence[Pruner],
    remake: Callable[[], Tensor] | None = None,
) -> Tensor:
    """y = x W_eff' + b, differentiable in x, b, and every factor of every adapter.

    The mask is straight-through (dM/dS = 1), so with G = dL/dW_eff and one adapter

        dS = G * W                    dW = G * M + dS * sign(W)
        dU = beta dW V'               dV = beta U' dW
        dA = alpha1 dS B'             dB = alpha1 A' dS
        dR = alpha2 dS 1              dC = alpha2 dS' 1

    and the gradient of a sparse residual's values is dW at their positions. Where scores are reduced to the mean of
    their block before the selection, so is dS.

    With several, each mask's gradient is that of a product: dS_i = G * W * prod_{j != i} M_j.

    Args:
        x: input, (..., in); the dtype of `weight`, or any floating dtype under autocast.
        weight: base weight, (out, in), normally frozen; it gets a gradient only when it requires one.
        bias: (out,), or None.
        pruners: the active adapters, at least one.
        remake: makes `weight` anew for the backward, which then is not kept for it; None keeps it.

    Returns:
        (..., out), in the dtype of `x`, or of autocast where that is on.

    Raises:
        RuntimeError: when differentiated twice; the straight-through estimator has no second derivative.

    Source: Li et al. 2022 (arXiv 2205.11005); the gradient runs through |W| as in the authors' training.

    Example:
        >>> from peft_pst.masking import pack_mask
        >>> R, C = torch.zeros(1, requires_grad=True), torch.zeros(2)
        >>> pruner = Pruner(Factors(R=R, C=C), pack_mask(torch.tensor([[True, False]])))
        >>> y = masked_linear(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]), None, [pruner])
        >>> y.backward(); y.item(), R.grad.item()
        (2.0, 5.0)
    """
    settings = tuple(pruner.settings for pruner in pruners)
    tensors = _flat(pruners)
    device_type = x.device.type
    autocast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return _MaskedLinear.apply(x, weight, bias, autocast_dtype, settings, remake, *tensors)


def straight_through_weight(weight: Tensor, pruners: Sequence[Pruner]) -> Tensor:
    """`effective_weight`, differentiable in every factor of every adapter, with the gradients of `masked_linear`.

    For layers that are no plain linear map, or whose weight is read by the code around them. What uses the weight may
    keep it until its backward, which `masked_linear` does not; and its gradient is made whole.

    Args:
        weight: base weight, (out, in), normally frozen; it gets a gradient only when it requires one.
        pruners: the active adapters, at least one.

    Returns:
        (out, in), in the dtype of `weight`, with +0.0 at every pruned entry.

    Raises:
        RuntimeError: when differentiated twice; the straight-through estimator has no second derivative.

    Source: Li et al. 2022 (arXiv 2205.11005); the gradient runs through |W| as in the authors' training.

    Example:
        >>> from peft_pst.masking import pack_mask
        >>> R, C = torch.zeros(1, requires_grad=True), torch.zeros(2)
        >>> pruner = Pruner(Factors(R=R, C=C), pack_mask(torch.tensor([[True, False]])))
        >>> masked = straight_through_weight(torch.tensor([[2.0, 3.0]]), [pruner])
        >>> masked.sum().backward(); masked.tolist(), R.grad.item()
        ([[2.0, 0.0]], 5.0)
    """
    settings = tuple(pruner.settings for pruner in pruners)
    return _StraightThroughWeight.apply(weight, settings, *_flat(pruners))


def _flat(pruners: Sequence[Pruner]) -> list[Tensor | None]:
    """One row of tensors after another, as autograd's calling convention asks; mask and positions have no gradient."""
    return [tensor for pruner in pruners for tensor in (pruner.mask, pruner.factors.positions, *pruner.factors.tensors)]


def _pruners(tensors: Sequence[Any], settings: Sequence[Settings]) -> list[Pruner]:
    """The inverse of `_flat`."""
    width = len(tensors) // len(settings)
    rows = [tensors[i : i + width] for i in range(0, len(tensors), width)]
    return [
        Pruner(Factors._make((*trained, positions, *scales)), mask, size)
        for (mask, positions, *trained), (*scales, size) in zip(rows, settings, strict=True)
    ]


def _updated(weight: Tensor, pruners: Sequence[Pruner]) -> Tensor:
    """W0 + sum_i (beta_i U_i V_i + S_i) in score precision."""
    return reduce(
        lambda total, pruner: add_update(total, pruner.factors), pruners, weight.to(score_dtype(weight.dtype))
    )


def _intersection(masks: Sequence[Tensor]) -> Tensor:
    """Keep what every packed mask keeps, packed."""
    return reduce(torch.bitwise_and, masks)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        autocast_dtype: torch.dtype | None,
        settings: tuple[Settings, ...],
        remake: Callable[[], Tensor] | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            ctx.input_dtype = x.dtype
            dtype = None if x.dtype == torch.float64 else autocast_dtype
            effective = effective_weight(weight, _pruners(tensors, settings), dtype)
            if dtype is not None:
                x = x.to(dtype)
                bias = bias if bias is None else bias.to(dtype)
            output = F.linear(x, effective, bias)
        ctx.settings, ctx.remake = settings, remake
        # No layer-sized tensor but the frozen base weight, where it lives anyway, and the packed masks.
        ctx.save_for_backward(x, weight if remake is None else None, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative()
        return _linear_backward(ctx, grad_output)


class _StraightThroughWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, settings: tuple[Settings, ...], *tensors: Tensor | None) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            effective = effective_weight(weight, _pruners(tensors, settings))
        ctx.settings = settings
        ctx.save_for_backward(weight, *tensors)
        return effective

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative()
        return _weight_backward(ctx, grad_output)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Only with create_graph=True. torch's own `once_differentiable` lets a second derivative pass as zero where
        # the gradient of the output is constant.
        raise RuntimeError(
            "A PST layer cannot be differentiated twice, since its straight-through mask has no second derivative; "
            "leave out create_graph=True, or disable the adapter where a second derivative is needed."
        )


@torch.no_grad()
def _linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    x, weight, *tensors = ctx.saved_tensors
    if ctx.remake is not None:
        weight = ctx.remake()
    pruners = _pruners(tensors, ctx.settings)
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    wants_factors = ctx.needs_input_grad[6:]  # after x, weight, bias, autocast dtype, settings, remake
    grad_x = grad_weight = grad_bias = None
    grad_factors: Sequence[Tensor | None] = [None] * len(tensors)
    with torch.autocast(grad_output.device.type, enabled=False):
        grad_output = grad_output.to(x.dtype)
        if wants_x:
            grad_x = (grad_output @ effective_weight(weight, pruners, x.dtype)).to(ctx.input_dtype)
        rows = grad_output.reshape(-1, weight.shape[0])
        if wants_bias:
            grad_bias = rows.sum(0)
        if wants_weight or any(wants_factors):
            x = x.reshape(-1, weight.shape[1])
            # In large blocks of rows, so that the product is efficient and G need not exist as a whole.
            products = ((block, rows[:, block].T @ x) for block in _product_blocks(weight, pruners))
            grad_weight, grad_factors = _parameter_gradients(products, weight, pruners, wants_weight, wants_factors)
    return grad_x, grad_weight, grad_bias, None, None, None, *grad_factors


@torch.no_grad()
def _weight_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    weight, *tensors = ctx.saved_tensors
    wants_weight, _, *wants_factors = ctx.needs_input_grad
    grad_output = grad_output.contiguous()  # a sum hands on one number, expanded
    pruners = _pruners(tensors, ctx.settings)
    blocks = ((block, grad_output[block]) for block in _product_blocks(weight, pruners))
    with torch.autocast(grad_output.device.type, enabled=False):
        grad_weight, grad_factors = _parameter_gradients(blocks, weight, pruners, wants_weight, wants_factors)
    return grad_weight, None, *grad_factors


def _product_blocks(weight: Tensor, pruners: Sequence[Pruner]) -> Iterator[slice]:
    return row_blocks(0, weight.shape[0], weight.shape[1], _PRODUCT_NUMEL, _together(pruners))


def _together(pruners: Sequence[Pruner]) -> int:
    """Rows whose scores were reduced to one, and whose gradients therefore are."""
    return math.lcm(*(pruner.size[0] for pruner in pruners))


def _parameter_gradients(
    dense_gradient: Iterable[tuple[slice, Tensor]],
    weight: Tensor,
    pruners: Sequence[Pruner],
    wants_weight: bool,
    wants_factors: Sequence[bool],
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """Gradients of the base weight and of every factor, from G = dL/dW_eff, given in blocks of rows.

    They are reduced in smaller blocks, so that the passes over them stay in the processor's cache.
    """
    dtype = score_dtype(weight.dtype)
    tensors = _flat(pruners)
    totals = [
        torch.zeros_like(cast("Tensor", tensor), dtype=dtype) if want else None
        for tensor, want in zip(tensors, wants_factors, strict=True)
    ]
    grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
    total_factors = [pruner.factors for pruner in _pruners(totals, [pruner.settings for pruner in pruners])]
    for rows, grad in dense_gradient:
        _add_rows(grad, weight, pruners, rows, grad_weight, total_factors)
    cast_totals = [
        None if total is None else total.to(cast("Tensor", tensor).dtype)
        for total, tensor in zip(totals, tensors, strict=True)
    ]
    return None if grad_weight is None else grad_weight.to(weight.dtype), cast_totals


def _add_rows(
    grad: Tensor,
    weight: Tensor,
    pruners: Sequence[Pruner],
    rows: slice,
    total_weight: Tensor | None,
    totals: Sequence[Factors],
) -> None:
    """Add what G = `grad`, (rows, in), contributes to all gradients; `weight` and `pruners` are of all rows."""
    width = weight.shape[1]
    entrywise = all(pruner.size == (1, 1) for pruner in pruners)
    if total_weight is None and entrywise and _has_kernels(weight, pruners) and grad.dtype in kernels.SUPPORTED:
        from .kernels import gradients  # imports Triton

        if gradients.supports(pruners[0].factors):
            own, total = _rows(pruners[0], rows, width), totals[0].rows(rows, width)
            gradients.add_gradients(grad, weight[rows], own.factors, own.mask, total)
            return
    numel = CACHE_NUMEL if on_eager_cpu(weight) else _PRODUCT_NUMEL
    for block in row_blocks(rows.start, rows.stop, width, numel, _together(pruners)):
        part = grad[block.start - rows.start : block.stop - rows.start].to(score_dtype(weight.dtype))
        selected = [_rows(pruner, block, width) for pruner in pruners]
        _add_block(part, weight[block], selected, block, None if total_weight is None else total_weight[block], totals)


_PRODUCT_NUMEL = 1 << 24  # bounds a block of G at 64 MiB in float32


def _rows(pruner: Pruner, block: slice, width: int) -> Pruner:
    """The part of an adapter that concerns some rows of the matrix."""
    mask = pruner.mask[block.start * width // 8 : (block.stop * width + 7) // 8]
    return pruner._replace(factors=pruner.factors.rows(block, width), mask=mask)


def _add_block(
    grad: Tensor,
    weight: Tensor,
    pruners: Sequence[Pruner],
    block: slice,
    total_weight: Tensor | None,
    totals: Sequence[Factors],
) -> None:
    """Add what G = `grad`, (rows, in), contributes to all gradients; `weight` and `pruners` are of the same rows."""
    masks = [pruner.mask for pruner in pruners]
    updated = _updated(weight, pruners)
    grad_updated = masked_weight(grad, _intersection(masks))
    grad_mask = grad * updated
    if total_weight is not None:
        total_weight += grad_updated
    for i, (pruner, total) in enumerate(zip(pruners, totals, strict=True)):
        others = masks[:i] + masks[i + 1 :]
        grad_scores = masked_weight(grad_mask, _intersection(others)) if others else grad_mask
        grad_scores = reduce_to_blocks(grad_scores, pruner.size)
        own = add_update(weight.to(updated.dtype), pruner.factors) if others else updated
        sign = own.sign()
        if total_weight is not None:
            total_weight.addcmul_(grad_scores, sign)
        grad_weight = torch.addcmul(grad_updated, grad_scores, sign)
        _add_factor_gradients(grad_weight, grad_scores, pruner.factors, block, total)


def _add_factor_gradients(
    grad_weight: Tensor, grad_scores: Tensor, factors: Factors, block: slice, total: Factors
) -> None:
    """Add the gradients of all factors that follow from some rows of dW and dS, each (rows, in)."""
    U, V, A, B = (None if tensor is None else tensor.to(grad_scores.dtype) for tensor in factors.tensors[:4])
    if total.U is not None and V is not None:
        total.U[block].addmm_(grad_weight, V.T, alpha=factors.beta)
    if total.V is not None and U is not None:
        total.V.addmm_(U.T, grad_weight, alpha=factors.beta)
    if total.A is not None and B is not None:
        total.A[block].addmm_(grad_scores, B.T, alpha=factors.alpha1)
    if total.B is not None and A is not None:
        total.B.addmm_(A.T, grad_scores, alpha=factors.alpha1)
    if total.R is not None:
        total.R[block].add_(grad_scores.sum(1), alpha=factors.alpha2)
    if total.C is not None:
        total.C.add_(grad_scores.sum(0), alpha=factors.alpha2)
    if total.S is not None and factors.positions is not None:
        index, inside = locate(factors.positions, grad_weight.numel())
        total.S.add_(grad_weight.take(index).where(inside, 0))
