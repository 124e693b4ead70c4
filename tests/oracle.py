"""The method once more, from its formulas, in plain autograd: slow, obvious, and sharing no code with the package.

    W = W0 + beta U V + residual              S = |W| + alpha1 A B + alpha2 (R 1' + 1 C')
    M = 0 at the `count` lowest S, else 1     y = x (M * W)' + b

The residual is a dense matrix here: `S` at the flat `positions`, row-major, and zero elsewhere.
Matrices are (out, in). Everything is computed in the dtype of the tensors that come in, so float64 is a matter of
passing float64. With several adapters the updates add up, each mask is selected from its own adapter's scores, and an
entry is zero where any of them prunes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Adapter:
    """The trainable tensors of one adapter (None where a part is switched off), its scales and its number of zeros."""

    U: Tensor | None = None
    V: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    S: Tensor | None = None
    positions: Tensor | None = None
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    count: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name in "UVABRCS" if (tensor := getattr(self, name)) is not None}


def update(adapter: Adapter, weight: Tensor) -> Tensor:
    total = torch.zeros_like(weight)
    if adapter.U is not None and adapter.V is not None:
        total = total + adapter.beta * (adapter.U @ adapter.V)
    if adapter.S is not None and adapter.positions is not None:
        total = total + total.new_zeros(total.numel()).scatter(0, adapter.positions, adapter.S).reshape(total.shape)
    return total


def scores(weight: Tensor, adapter: Adapter) -> Tensor:
    total = (weight + update(adapter, weight)).abs()
    if adapter.A is not None and adapter.B is not None:
        total = total + adapter.alpha1 * (adapter.A @ adapter.B)
    if adapter.R is not None and adapter.C is not None:
        total = total + adapter.alpha2 * (adapter.R[:, None] + adapter.C[None, :])
    return total


def mask(scores: Tensor, count: int) -> Tensor:
    """True = keep. A stable full sort: of equal scores the earlier in row-major order is pruned."""
    order = torch.argsort(scores.detach().flatten(), stable=True)
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:count]] = False
    return keep.reshape(scores.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: Tensor) -> Tensor:
        return keep.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def effective_weight(weight: Tensor, adapters: Sequence[Adapter], masks: Sequence[Tensor] | None = None) -> Tensor:
    """M * W. `masks` replaces the selection, to compare gradients where rounding may move an entry across the cut."""
    result = weight
    for adapter in adapters:
        result = result + update(adapter, weight)
    for index, adapter in enumerate(adapters):
        importance = scores(weight, adapter)
        keep = mask(importance, adapter.count) if masks is None else masks[index]
        result = result * _StraightThrough.apply(importance, keep)
    return result


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    y = x @ effective_weight(weight, adapters, masks).T
    return y if bias is None else y + bias
