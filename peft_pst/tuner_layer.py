"""What every layer that PST puts into a model has in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from .offloading import computing_device, fetch_back, offload_hook
from .scoring import score_dtype
from .sharding import is_copied_for_forward, is_sharded, replace_values


class PSTWrapper(BaseTunerLayer):
    """What stands in the place of a module of the base model, and no other tuner may stand over."""

    module_name: str  # of the base layer, in the plain model
    # PEFT's `disable_input_dtype_casting` sets this. Inputs are never cast here, as the base layer does not.
    cast_input_dtype_enabled = True


class PSTTunerLayer(PSTWrapper):
    """A layer with PST adapters, whether it prunes or not; PEFT switches, deletes and freezes all of them alike."""

    _dense_weight: Tensor | None  # the base weight while an adapter is merged
    buffer_names: tuple[str, ...] = ()  # what an adapter's state holds beside `adapter_layer_names`

    @property
    def _base(self) -> Any:
        # Typed loosely: for a type checker, every attribute of an `nn.Module` may be a tensor or a module.
        return self.get_base_layer()

    @property
    def _stored(self) -> Tensor:
        """The tensor of the base layer that is adapted."""
        return self._base.weight

    @contextmanager
    def refusing_damage(self, adapter_name: str) -> Iterator[None]:
        """Say in which layer, and what to do, when stored tensors are refused by the block."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"Layer {self.module_name}, adapter {adapter_name!r}: {error} The adapter file is damaged or belongs "
                "to another model; load the one that was saved for this base."
            ) from error

    def check_loaded(self, adapter_name: str, tensors: Iterable[Tensor | None]) -> None:
        """Refuse to compute with tensors of an adapter that have no data yet.

        Raises:
            RuntimeError: saying how they get some.
        """
        if any(tensor is not None and tensor.is_meta for tensor in tensors):
            raise RuntimeError(
                f"Layer {self.module_name}: adapter {adapter_name!r} has no data (meta device). Load its tensors with "
                f"set_peft_model_state_dict(model, tensors, {adapter_name!r}, low_cpu_mem_usage=True), or make it "
                "without low_cpu_mem_usage."
            )

    @property
    def _device(self) -> torch.device:
        """Where the layer computes."""
        return computing_device(self._base) if self._is_offloaded else self._stored.device

    @property
    def _is_offloaded(self) -> bool:
        return self._stored.is_meta and offload_hook(self._base) is not None

    @property
    def _base_has_data(self) -> bool:
        return not self._stored.is_meta or self._is_offloaded

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would round the adapter to the dtype of its base, also what a file holds in float32, and the least
        # differences between scores decide which weights are pruned.
        if device is None:
            # An offloaded base computes elsewhere than its weight is said to be; one to be loaded is not there yet.
            device = self._device if self._base_has_data else torch.get_default_device()
        self._convert_adapter(adapter_name, device, score_dtype(self._stored.dtype))

    def lower_adapter(self, adapter_name: str) -> None:
        """Round an adapter to the dtype of its base, as PEFT does where `autocast_adapter_dtype=False` asks for it."""
        dtype = getattr(self._base, "compute_dtype", self._stored.dtype)
        if dtype.is_floating_point:
            self._convert_adapter(adapter_name, None, dtype)

    def _convert_adapter(self, adapter_name: str, device: torch.device | None, dtype: torch.dtype) -> None:
        for name in (*self.adapter_layer_names, *self.buffer_names):
            tensors = getattr(self, name)
            if adapter_name not in tensors or tensors[adapter_name].is_meta:
                continue
            tensor = tensors[adapter_name]
            own = tensor.detach().to(device or tensor.device, dtype if tensor.is_floating_point() else tensor.dtype)
            if (own.device, own.dtype) != (tensor.device, tensor.dtype):
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[adapter_name] = nn.Parameter(own, tensor.requires_grad) if is_parameter else own

    def keep_adapters_at_hand(self) -> None:
        """Fetch back what `accelerate.dispatch_model` has offloaded of the adapters: it is small, and trained."""
        if hasattr(self._base, "_hf_hook"):
            for part in (*self.adapter_layer_names, *self.buffer_names):
                fetch_back(getattr(self, part))

    def _check_writable(self) -> None:
        if is_copied_for_forward(self._base) and not is_sharded(self._stored):
            raise RuntimeError(
                f"Layer {self.module_name}: the base weight is a copy that FSDP gathered for a forward, so merging and "
                "unmerging would be lost; call reshard() on the modules given to fully_shard() first."
            )

    def unmerge(self) -> None:
        """Restore the dense base weight, bit for bit."""
        if self._dense_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._is_offloaded:
            with onload_layer(self):
                self.unmerge()
            return
        self._check_writable()
        self._restore(self._dense_weight)
        self._dense_weight = None
        self.merged_adapters = []

    def dense_state(self) -> dict[str, Tensor]:
        """What the layer's `state_dict` would hold of the base while nothing is merged, where something is."""
        if self._dense_weight is None or is_sharded(self._dense_weight):  # which no process can gather alone
            return {}
        return {"base_layer.weight": self._dense_weight.to(self._stored.dtype)}

    def _restore(self, dense: Tensor) -> None:
        """Put the dense weight back in its place."""
        replace_values(self._stored, dense.to(self._stored.device, self._stored.dtype))


def broken_message(adapter_name: str, module_name: str) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: layer {module_name} "
        "would not be finite."
    )
