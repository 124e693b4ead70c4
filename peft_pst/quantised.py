"""Base layers whose weights are stored in fewer bits: dequantised when they are needed, requantised when merged.

What a quantisation is like is known to PEFT alone, through its `QuantizationBackend`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from .config import PSTConfig
from .layer import outside_any_graph
from .linear import PSTLinear
from .masked_linear import masked_linear
from .plan import ScheduleStatus


def backend_of(model: nn.Module, module: nn.Module) -> QuantizationBackend | None:
    """How a module's weight is quantised; None if it is not.

    Args:
        model: the model that holds the module; transformers keeps there how it was quantised.
        module: any module.

    Example:
        >>> backend_of(nn.Sequential(), nn.Linear(2, 2)) is None
        True
    """
    weight = getattr(module, "weight", None)
    if type(weight) is nn.Parameter and weight.dtype.is_floating_point:
        return None  # without importing whatever quantises
    known = get_quantization_kwargs(model)
    return resolve_quantization_backend(module, **{"get_apply_tensor_subclass": _unknown_quantisation, **known})


def _unknown_quantisation() -> Any:
    raise ValueError(
        "How torchao quantised this layer is known only of models that transformers quantised or loaded, so the merged "
        "weight cannot be quantised again; call merge_and_unload(dequantize=True) for a dense result."
    )


def dequantised(backend: QuantizationBackend, module: Any) -> Tensor:
    """The weight of a quantised linear layer, (out, in), in the precision that the layer computes in."""
    _undo_packing(module)
    weight = backend.get_base_weight(module).detach()
    return weight.to(getattr(module, "compute_dtype", None) or weight.dtype)


def _undo_packing(module: Any) -> None:
    """Give a 4-bit layer back the layout in which it is dequantised, if bitsandbytes packed it for a CPU's kernel."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        module.state_dict()  # bitsandbytes unpacks a weight to save it
        state = module.weight.quant_state
    if state is not None and state.absmax.dim() == 2:
        # And leaves the scales as the kernel has them, a column a row; packed once more, they would be beyond repair.
        state.absmax = state.absmax.T.reshape(-1).float()


@torch.no_grad()
def dense_linear(base: Any, weight: Tensor) -> nn.Linear:
    """A plain linear layer with this weight, (out, in), and the bias of a quantised one."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().to(weight.dtype), requires_grad=False)
    return linear.train(base.training)


def dequantise_the_rest(model: Any) -> None:
    """Put plain linear layers in the place of all quantised ones, and forget that the model was quantised."""
    backends = [(name, module, backend_of(model, module)) for name, module in model.named_modules()]
    for name, module, backend in backends:
        if backend is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense_linear(module, dequantised(backend, module)))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


class PSTQuantisedLinear(PSTLinear):
    """PST on a linear layer whose weight is quantised by bitsandbytes, HQQ or torchao.

    The dense weight exists while it is multiplied by, forward and backward, and no longer. Merging quantises the masked
    weight again; `unmerge` puts the original, quantised one back.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PSTConfig,
        status: ScheduleStatus,
        module_name: str,
        backend: QuantizationBackend,
    ) -> None:
        # Before the start of the module, which asks for the shape of the matrix.
        self.__dict__ |= {"quantization_backend": backend, "_before_merge": None}
        super().__init__(base_layer, adapter_name, config, status, module_name)

    # The base layer from before a merge, in a tuple, because a module of its own would stand in the state dict.
    _before_merge: tuple[nn.Module] | None

    @property
    def stored_name(self) -> str:
        return "weight" if hasattr(self._base, "weight") else "W_q"  # as HQQ has it

    def _matrix_shape(self) -> tuple[int, int]:
        return self._base.out_features, self._base.in_features

    def _dense(self) -> Tensor:
        if self._loaded_weight is not None:
            return self._loaded_weight
        return self._dequantised(self._base if self._before_merge is None else self._before_merge[0])

    def get_stored_weight(self) -> Tensor:
        return self._dequantised(self._base)

    def _dequantised(self, base: Any) -> Tensor:
        assert self.quantization_backend is not None
        with outside_any_graph(self._device):
            return dequantised(self.quantization_backend, base)

    def _may_keep_weight(self) -> bool:
        return False  # it would take what quantisation saves

    @contextmanager
    def loading_once(self) -> Iterator[None]:
        """Within the block the weight is dequantised but once."""
        if self._loaded_weight is not None:
            yield
            return
        self._loaded_weight = self._dense()
        try:
            yield
        finally:
            self._loaded_weight = None

    def _product(self, x: Tensor, names: list[str]) -> Tensor:
        # Under autocast the product is made in its precision, whatever that of the weight.
        dtype = self._dense().dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = self._base.bias
        return masked_linear(
            x,
            self._dense().to(dtype),
            bias if bias is None else bias.to(x.dtype),
            self._pruners(names),
            remake=lambda: self._dense().to(dtype),
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantise the masked weight into the base layer, its zeros exact.

        Raises:
            RuntimeError: if the quantisation cannot hold the zeros. The layer is then as it was.
            ValueError: as other layers do, and where it is not known how to quantise.
        """
        before = self.base_layer, self._before_merge, self._dense_weight
        try:
            super().merge(safe_merge, adapter_names)
        except Exception:
            self.base_layer, self._before_merge, self._dense_weight = before
            raise

    def _keep_dense(self) -> Tensor:
        self._before_merge = (self.base_layer,)
        return self._stored

    def _write(self, values: Tensor) -> None:
        assert self.quantization_backend is not None
        assert self._before_merge is not None
        own = self._before_merge[0]
        weights: list[Any] = [weight for weight in own._parameters.values() if weight is not None]
        attributes = [dict(weight.__dict__) for weight in weights]
        self.base_layer = twin = _twin(own)
        for weight in weights:
            if getattr(weight, "module", None) is own:
                weight.module = twin  # for the new one, which otherwise would keep the whole layer before it alive
        try:
            self.quantization_backend.set_base_weight(self, values)
        finally:
            for weight, before in zip(weights, attributes, strict=True):  # bitsandbytes' 4-bit backend marks it
                weight.__dict__.clear()
                weight.__dict__.update(before)
        self._check_zeros_kept(values)

    def _check_zeros_kept(self, values: Tensor) -> None:
        lost = int(((values == 0) & (self.get_stored_weight() != 0)).sum())
        if lost:
            assert self.quantization_backend is not None
            raise RuntimeError(
                f"Layer {self.module_name}: {lost} of {int((values == 0).sum())} zeros would be lost, because "
                f"{self.quantization_backend.backend_name} as configured here has no exact zero in every group. "
                "The base layer is unchanged; call merge_and_unload(dequantize=True) for a dense result."
            )

    def unmerge(self) -> None:
        """Put the quantised base layer back, bit for bit."""
        if self._before_merge is None:
            super().unmerge()  # which says that there is nothing to do
            return
        self.base_layer, self._before_merge, self._dense_weight = self._before_merge[0], None, None
        self.merged_adapters = []

    def dense_state(self) -> dict[str, Tensor]:
        if self._before_merge is None:
            return {}
        return {f"base_layer.{name}": tensor for name, tensor in self._before_merge[0].state_dict().items()}

    def merge_dense(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge into a plain linear layer, which then is the base; before unloading, since nothing unmerges it."""
        merged = list(self.merged_adapters)
        if merged:
            self.unmerge()
        names = merged + [name for name in self._present(adapter_names or self.active_adapters) if name not in merged]
        weight = self._weight_to_merge(names, safe_merge) if names else self.get_dense_weight()
        self.base_layer = dense_linear(self._base, weight)
        self.merged_adapters = names


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same tensors, of which each can be replaced without the other's."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    twin.__dict__.pop("extra_repr", None)  # torchao's, bound to the module; it gives the twin one, too
    if "state" in module.__dict__:  # what bitsandbytes keeps of an 8-bit weight
        twin.__dict__["state"] = copy.copy(module.__dict__["state"])
    return twin
