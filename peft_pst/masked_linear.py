"""The masked linear map as one differentiable operation with a hand-written backward.

Forward and backward keep the input, one bit per weight and the small factors. Everything else of the layer's size is
made again when it is needed, by the same functions that merging and reporting use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .masking import masked_weight, unpack_mask
from .scoring import Factors, add_update, score_dtype


class Pruner(NamedTuple):
    """One active adapter of a layer: its factors and the mask they selected, packed to one bit per weight."""

    factors: Factors
    mask: Tensor


def effective_weight(weight: Tensor, pruners: Sequence[Pruner]) -> Tensor:
    """The weight that multiplies the input: (W0 + sum_i beta_i U_i V_i), zero where any adapter prunes.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        pruners: the active adapters, at least one; their order does not matter beyond the rounding of the sum.

    Returns:
        (out, in), in the dtype of `weight`, with +0.0 at every pruned entry.

    Source: Li et al. 2022 (arXiv 2205.11005), y = x (M * W)' + b, for one adapter; the product of masks for several.

    Example:
        >>> from peft_pst.masking import pack_mask
        >>> factors = Factors(U=torch.ones(2, 1), V=torch.tensor([[0.5, 0.0]]))
        >>> pruner = Pruner(factors, pack_mask(torch.tensor([[True, False], [True, True]])))
        >>> effective_weight(torch.ones(2, 2), [pruner])
        tensor([[1.5000, 0.0000],
                [1.5000, 1.0000]])
    """
    masks = [unpack_mask(pruner.mask, weight.shape) for pruner in pruners]
    return masked_weight(_updated(weight, pruners), _intersection(masks)).to(weight.dtype)


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pruners: Sequence[Pruner]) -> Tensor:
    """y = x W_eff' + b, differentiable in x, b, and every factor of every adapter.

    The mask is straight-through (dM/dS = 1), so with G = dL/dW_eff and one adapter

        dS = G * W                    dW = G * M + dS * sign(W)
        dU = beta dW V'               dV = beta U' dW
        dA = alpha1 dS B'             dB = alpha1 A' dS
        dR = alpha2 dS 1              dC = alpha2 dS' 1

    With several, each mask's gradient is that of a product: dS_i = G * W * prod_{j != i} M_j.

    Args:
        x: input, (..., in); the dtype of `weight`, or any floating dtype under autocast.
        weight: base weight, (out, in), normally frozen; it gets a gradient only when it requires one.
        bias: (out,), or None.
        pruners: the active adapters, at least one.

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
    scales = tuple(pruner.factors[6:] for pruner in pruners)
    tensors = [tensor for pruner in pruners for tensor in (pruner.mask, *pruner.factors.tensors)]
    device_type = x.device.type
    autocast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return _MaskedLinear.apply(x, weight, bias, autocast_dtype, scales, *tensors)


_TENSORS_PER_PRUNER = 7  # the mask and the six factors
_FIXED_INPUTS = 5  # x, weight, bias, autocast dtype, scales


def _pruners(tensors: Sequence[Any], scales: Sequence[tuple[float, ...]]) -> list[Pruner]:
    """The inverse of the flattening that autograd's calling convention asks for."""
    rows = [tensors[i : i + _TENSORS_PER_PRUNER] for i in range(0, len(tensors), _TENSORS_PER_PRUNER)]
    return [Pruner(Factors(*row[1:], *scale), row[0]) for row, scale in zip(rows, scales, strict=True)]


def _updated(weight: Tensor, pruners: Sequence[Pruner]) -> Tensor:
    """W0 + sum_i beta_i U_i V_i in score precision."""
    return reduce(
        lambda total, pruner: add_update(total, pruner.factors), pruners, weight.to(score_dtype(weight.dtype))
    )


def _intersection(masks: Sequence[Tensor]) -> Tensor:
    return reduce(torch.logical_and, masks)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        autocast_dtype: torch.dtype | None,
        scales: tuple[tuple[float, ...], ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            effective = effective_weight(weight, _pruners(tensors, scales))
            ctx.input_dtype = x.dtype
            if autocast_dtype is not None and x.dtype != torch.float64:
                x, effective = x.to(autocast_dtype), effective.to(autocast_dtype)
                bias = bias if bias is None else bias.to(autocast_dtype)
            output = F.linear(x, effective, bias)
        ctx.scales = scales
        # No layer-sized tensor but the frozen base weight, which lives anyway, and the packed masks.
        ctx.save_for_backward(x, weight, *tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, *tensors = ctx.saved_tensors
        pruners = _pruners(tensors, ctx.scales)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_factors = ctx.needs_input_grad[_FIXED_INPUTS:]
        grad_x = grad_weight = grad_bias = None
        grad_factors: list[Tensor | None] = [None] * len(tensors)
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_output = grad_output.to(x.dtype)
            if wants_x:
                effective = effective_weight(weight, pruners).to(x.dtype)
                grad_x = (grad_output @ effective).to(ctx.input_dtype)
                del effective
            rows = grad_output.reshape(-1, weight.shape[0])
            if wants_bias:
                grad_bias = rows.sum(0)
            if wants_weight or any(wants_factors):
                grad = (rows.T @ x.reshape(-1, weight.shape[1])).to(score_dtype(weight.dtype))
                grad_weight, grad_factors = _reduce_gradient(grad, weight, pruners, wants_weight, wants_factors)
        return grad_x, grad_weight, grad_bias, None, None, *grad_factors


def _reduce_gradient(
    grad: Tensor, weight: Tensor, pruners: Sequence[Pruner], wants_weight: bool, wants: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """From G = dL/dW_eff, (out, in), to the gradients of the base weight and of every factor."""
    masks = [unpack_mask(pruner.mask, weight.shape) for pruner in pruners]
    updated = _updated(weight, pruners)
    grad_updated = masked_weight(grad, _intersection(masks))
    grad_mask = grad * updated
    grad_weight = grad_updated.clone() if wants_weight else None
    grad_factors: list[Tensor | None] = []
    for i, pruner in enumerate(pruners):
        others = masks[:i] + masks[i + 1 :]
        grad_scores = masked_weight(grad_mask, _intersection(others)) if others else grad_mask
        own = add_update(weight.to(updated.dtype), pruner.factors) if others else updated
        through_magnitude = grad_scores * own.sign()
        if grad_weight is not None:
            grad_weight += through_magnitude
        wanted = wants[i * _TENSORS_PER_PRUNER + 1 : (i + 1) * _TENSORS_PER_PRUNER]
        grad_factors += [
            None,
            *_factor_gradients(pruner.factors, grad_updated + through_magnitude, grad_scores, wanted),
        ]
    return None if grad_weight is None else grad_weight.to(weight.dtype), grad_factors


def _factor_gradients(
    factors: Factors, grad_weight: Tensor, grad_scores: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of U, V, A, B, R, C from dW and dS, each (out, in)."""
    U, V, A, B, R, C = (None if t is None else t.to(grad_scores.dtype) for t in factors.tensors)
    formulas = (
        lambda: factors.beta * (grad_weight @ V.T),
        lambda: factors.beta * (U.T @ grad_weight),
        lambda: factors.alpha1 * (grad_scores @ B.T),
        lambda: factors.alpha1 * (A.T @ grad_scores),
        lambda: factors.alpha2 * grad_scores.sum(1),
        lambda: factors.alpha2 * grad_scores.sum(0),
    )
    return [
        formula().to(tensor.dtype) if want and tensor is not None else None
        for formula, tensor, want in zip(formulas, factors.tensors, wanted, strict=True)
    ]
