"""PST on linear maps: `nn.Linear`, and transformers' `Conv1D`, which stores its matrix transposed.

What only multiplies is multiplied here, so that no masked weight lives until the backward; a subclass with a forward of
its own is called, with the masked weight in the place of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .callers import users_level
from .masked_linear import masked_linear
from .module import PSTModule
from .offloading import at_hand
from .sharding import is_partitioned
from .swapped import PSTSwapped


class _LinearMatrix(PSTModule):
    """How a linear map stores its matrix."""

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T if isinstance(self._base, Conv1D) else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if isinstance(self._base, Conv1D) else matrix


class PSTLinear(_LinearMatrix):
    """PST on an `nn.Linear` or a transformers `Conv1D` that multiplies and does no more."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        names = self._names_in_force()
        if not names:
            return self.base_layer(*args, **kwargs)
        x = self._only_input(args, kwargs)
        self._warn_about_hooks()
        with self.loading_once():
            return self._product(x.to(self._device), names)

    def _only_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = (*args, *kwargs.values())
        if len(given) != 1 or not kwargs.keys() <= {"input", "x"}:
            raise TypeError(
                f"Layer {self.module_name} takes its input and nothing else, as {type(self._base).__name__} does, but "
                f"was called with {len(args)} positional arguments and {sorted(kwargs)} by name; leave the rest out."
            )
        return given[0]

    def _product(self, x: Tensor, names: list[str]) -> Tensor:
        bias = self._base.bias if self._base.bias is None else at_hand(self._base, "bias")
        if not (torch.is_grad_enabled() and self._trains(names)):
            return F.linear(x, self._inference_weight(names), bias)
        weight, pruners = self._dense(), self._pruners(names)
        # Read or gathered again for the backward, or all weights of the model would be in memory when it starts.
        goes_meanwhile = self._is_offloaded or is_partitioned(self._stored)
        return masked_linear(x, weight, bias, pruners, self._dense if goes_meanwhile else None)

    def _warn_about_hooks(self) -> None:
        base = self._base
        if is_partitioned(self._stored):
            return  # DeepSpeed's own, which run on this layer as well
        if self._warned_about_hooks or not (
            base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        ):
            return
        self._warned_about_hooks = True
        warnings.warn(
            f"Hooks on the base layer of {self.module_name} do not run: the adapter multiplies by the masked weight "
            "itself. Register them on the adapted layer instead.",
            stacklevel=users_level(),
        )


class PSTStoredLinear(PSTLinear):
    """PST on a linear layer whose weight is read by what holds it, so that the weight read is the one in force."""

    @property
    def weight(self) -> Tensor:
        """The masked weight, differentiable where it trains; the base's own where no adapter is in force."""
        names = self._names_in_force()
        return self._as_stored(self._weight_in_force(names)) if names else self._stored


class PSTCalledLinear(_LinearMatrix, PSTSwapped):
    """PST on a linear layer whose class has a forward of its own, which runs as ever, whatever it takes and returns."""


# Classes whose product differs from torch's only where there is a bias, which they add in a step of its own.
_PRODUCTS_WITHOUT_BIAS = {"transformers.models.falcon.modeling_falcon.FalconLinear.forward"}


def only_multiplies(linear: nn.Module) -> bool:
    """Whether a linear layer computes x W' + b, bit for bit as torch does, and no more.

    Example:
        >>> class Clamped(nn.Linear):
        ...     def forward(self, input):
        ...         return super().forward(input).clamp(-1, 1)
        >>> only_multiplies(nn.Linear(2, 2)), only_multiplies(Clamped(2, 2))
        (True, False)
    """
    forward: Any = getattr(linear, "_old_forward", linear.forward)  # behind a hook of accelerate's
    function = getattr(forward, "__func__", forward)
    if function in (nn.Linear.forward, Conv1D.forward):
        return True
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    return linear.bias is None and name in _PRODUCTS_WITHOUT_BIAS


def is_linear(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module is a linear map of its own, and not a store of weights that its parent reads past any adapter.

    The latter are the output projection of `nn.MultiheadAttention`, which has a class of its own, and the linears of
    `nn.TransformerEncoderLayer`, which it does not call in evaluation.
    """
    projection = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    stored = projection or isinstance(parent, nn.TransformerEncoderLayer)
    return isinstance(module, (nn.Linear, Conv1D)) and not stored
