"""What every kind of adapted layer shares as a module: when it prunes, trains, and makes its weight again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import PSTConfig
from .fingerprint import fingerprint
from .graph import register_layer
from .layer import PSTLayer
from .masked_linear import effective_weight, straight_through_weight
from .plan import ScheduleStatus
from .sharding import is_gathered_for_forward


class PSTModule(nn.Module, PSTLayer):
    """A base layer with PST adapters, in its place in the model. Subclasses say how it runs forward."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PSTConfig, status: ScheduleStatus, module_name: str
    ) -> None:
        super().__init__()
        PSTLayer.__init__(self, base_layer, module_name)
        self.register_load_state_dict_post_hook(_forget_what_was_made)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, status)

    def __getstate__(self) -> dict[str, Any]:
        # What is made from other tensors would bloat a copy or a pickle, and could not be recognised there.
        made = ("_counts", "_checked_positions", "_masks", "_checked_masks")
        return {**self.__dict__, **{name: {} for name in made}, "_masked_weight": None, "_zeros": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called on a copied or unpickled layer, whose handle would still mean the original.
        super().__setstate__(state)
        self._handle = register_layer(self)

    def _names_in_force(self) -> list[str]:
        """The adapters that a forward has to apply now; none where the base layer is right as it is."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return []
        if not self.training and not torch.compiler.is_compiling():
            self._warn_if_never_pruned(names, "Evaluating")
        return names

    def _weight_in_force(self, adapter_names: list[str]) -> Tensor:
        """The masked weight, (out, in), for code that multiplies by it itself; differentiable where it trains."""
        if torch.is_grad_enabled() and self._trains(adapter_names):
            return straight_through_weight(self._dense(), self._pruners(adapter_names))
        return self._inference_weight(adapter_names)

    def _trains(self, adapter_names: Sequence[str]) -> bool:
        parameters = (getattr(self, part).get(name) for name in adapter_names for part in self.adapter_layer_names)
        return self._stored.requires_grad or any(p is not None and p.requires_grad for p in parameters)

    def _inference_weight(self, adapter_names: list[str]) -> Tensor:
        if torch.compiler.is_compiling():
            return effective_weight(self._dense(), self._pruners(adapter_names))
        if not self._may_keep_weight():
            return self.get_masked_weight(adapter_names)
        origin = self._weight_origin(adapter_names)
        if self._masked_weight is None or self._masked_weight[0] != origin:
            self._masked_weight = (origin, self.get_masked_weight(adapter_names))
        return self._masked_weight[1]

    def _may_keep_weight(self) -> bool:
        """Whether the masked weight may be kept for the next forward.

        In a forward without gradient in mid-training (the first pass of a checkpointed block, a reference model), or
        where the base is sharded or offloaded, a dense copy would cost the memory of the whole model.
        """
        return not self.training and not is_gathered_for_forward(self._base) and not self._is_offloaded

    def _weight_origin(self, adapter_names: Sequence[str]) -> object:
        """A value that differs once the masked weight of these adapters may be another one."""
        tensors = (tensor for name in adapter_names for tensor in self._origin(name, self.get_factors(name)))
        return tuple(adapter_names), fingerprint(tensors)

    def train(self, mode: bool = True) -> PSTModule:
        self.keep_adapters_at_hand()
        if mode:
            self._masked_weight = None
        return super().train(mode)

    def __repr__(self) -> str:
        return "pst." + super().__repr__()


def _forget_what_was_made(layer: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(layer, PSTLayer)
    layer.forget_all()  # the shards of a sharded parameter are written behind the backs of its gathered copies
