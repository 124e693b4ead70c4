"""Layers that are no plain linear map: they run as ever, with the masked weight in the place of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import PSTConfig
from .module import PSTModule
from .offloading import at_hand, not_offloading
from .sharding import is_partitioned, whole_shape


@contextmanager
def in_place_of_own(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other weights than its own for one call.

    Args:
        module: any module.
        weights: tensors of the shapes of its parameters, by their names; they may have a graph behind them.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> with in_place_of_own(linear, {"weight": torch.tensor([[1.0, 2.0]])}):
        ...     y = linear(torch.ones(2))
        >>> y.item(), type(linear.weight).__name__
        (3.0, 'Parameter')
    """
    parameters: dict[str, Any] = module._parameters
    if any(is_partitioned(parameter) for parameter in map(parameters.get, weights) if parameter is not None):
        # DeepSpeed goes through the parameters when the module is called, and knows only its own.
        places = dict.fromkeys(weights, vars(module))
    else:
        # A plain attribute is found before a parameter; FSDP1 makes one of each parameter while the module runs.
        places = {name: vars(module) if name in vars(module) else parameters for name in weights}
    before = {name: place[name] for name, place in places.items() if name in place}
    for name, weight in weights.items():
        places[name][name] = weight  # where the parameter stands already, so that their order stays
    try:
        yield
    finally:
        for name, place in places.items():
            if name in before:
                place[name] = before[name]
            else:
                del place[name]


class PSTSwapped(PSTModule):
    """PST on a layer that is called with its masked weight in place, so that all its options and hooks hold."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._names_in_force()
        if not names:
            return self.base_layer(*args, **kwargs)
        with self.loading_once(), self._loaded_in_place(self._as_stored(self._weight_in_force(names))):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _loaded_in_place(self, weight: Tensor) -> Iterator[None]:
        base = self._base
        weights: dict[str, Any] = {
            name: at_hand(base, name) for name, own in base._parameters.items() if own is not None
        }
        with in_place_of_own(base, {**weights, "weight": weight}), not_offloading(base):
            yield


class PSTConv(PSTSwapped):
    """PST on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: a row for each output channel.

    The matrix is (out_channels, in_channels / groups * kernel size): the weight with all dimensions but the first made
    one. Stride, padding of every mode, dilation and groups are the base layer's own.
    """

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        stored = self._stored
        weight = matrix.reshape(whole_shape(stored))
        if stored.is_contiguous():
            return weight
        # Channels last, or whatever order of dimensions the base has in memory.
        order = sorted(range(weight.dim()), key=stored.stride, reverse=True)
        return weight.permute(order).contiguous().permute([order.index(i) for i in range(weight.dim())])


class PSTEmbedding(PSTSwapped):
    """PST on `nn.Embedding`: a row for each token, a column for each dimension; (num_embeddings, embedding_dim).

    Rows take no part in a product here, so a zero is a dimension that a token does without; R is the importance of
    tokens, C that of dimensions. A token that no batch holds gets no gradient, and is ranked by its magnitudes, the
    update that V gives it and C. The row of `padding_idx` gets no gradient and no update, but is pruned as any other.

    V and B start at random here, and U and A at zero, so that each token learns for itself from where it is.
    """

    random_factors = ("pst_V", "pst_B")

    @torch.no_grad()
    def _reset_parameters(self, adapter_name: str, config: PSTConfig) -> None:
        super()._reset_parameters(adapter_name, config)
        padding, factors = self._base.padding_idx, cast("nn.ParameterDict", self.pst_U)
        if padding is not None and adapter_name in factors:
            # Its gradient is zero for ever, so it stays where it starts.
            factors[adapter_name][padding] = 0.0
