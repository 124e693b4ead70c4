"""Which class adapts which kind of base layer, and what is refused for which reason."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from .hosts import PSTMultiheadAttention
from .linear import PSTCalledLinear, PSTLinear, PSTStoredLinear, is_linear, only_multiplies
from .module import PSTModule
from .quantised import PSTQuantisedLinear
from .swapped import PSTConv, PSTEmbedding

_COMPUTED = (
    "its weight is no parameter of its own, but computed {}, so that no mask could be written into it; call {} first"
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTED = (nn.Linear, Conv1D, nn.Embedding, nn.MultiheadAttention, *_CONVOLUTIONS)


def kind_of(
    target: nn.Module, parent: nn.Module, name: str, backend: QuantizationBackend | None = None
) -> type[PSTModule] | type[PSTMultiheadAttention]:
    """The class that adapts a module.

    Args:
        target: the module to adapt.
        parent: the module that holds it, which may read the target's weight without calling it.
        name: the target's name in the model, for the error.
        backend: how its weight is quantised, if it is.

    Raises:
        ValueError: saying why, if PST cannot adapt the module.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3), nn.Sequential(), "stem").__name__
        'PSTConv'
        >>> kind_of(nn.LayerNorm(3), nn.Sequential(), "norm")
        Traceback (most recent call last):
        ...
        ValueError: Target module norm (LayerNorm) is not supported: PST adapts torch.nn.Linear, transformers' Conv1D, \
torch.nn.Conv1d, Conv2d, Conv3d, Embedding and MultiheadAttention; take it out of target_modules.
    """
    if backend is not None:
        if not backend.supports_merge:
            raise ValueError(
                f"Target module {name} ({type(target).__name__}) is not supported: its weight, quantised by "
                f"{backend.backend_name}, cannot be dequantised, and PST needs the dense one; load the model without."
            )
        # torchao keeps the class of a layer, while the others put classes of their own, which multiply, in its place.
        if backend.backend_name == "torchao" and not only_multiplies(target):
            raise ValueError(
                f"Target module {name} ({type(target).__name__}) is not supported: its forward is its own, and PST, "
                "which multiplies by the dequantised weight, would do without; load the model without quantising it, "
                "or take it out of target_modules."
            )
        return PSTQuantisedLinear
    reason = _refusal(target)
    is_read = isinstance(parent, nn.TransformerEncoderLayer) and isinstance(target, nn.Linear | Conv1D)
    if not reason and is_read and not only_multiplies(target):
        reason = (
            "its forward is its own, but TransformerEncoderLayer reads its weight in evaluation instead of calling it; "
            "take it out of target_modules"
        )
    if reason:
        raise ValueError(f"Target module {name} ({type(target).__name__}) is not supported: {reason}.")
    if isinstance(target, nn.MultiheadAttention):
        return PSTMultiheadAttention
    if isinstance(target, nn.Embedding):
        return PSTEmbedding
    if isinstance(target, _CONVOLUTIONS):
        return PSTConv
    if is_linear(target, parent):
        return PSTLinear if only_multiplies(target) else PSTCalledLinear
    return PSTStoredLinear


def _refusal(target: nn.Module) -> str:
    """Why a module cannot be adapted; empty where it can."""
    base: Any = target
    if isinstance(target, BaseTunerLayer):
        return _nested(target)
    if isinstance(target, nn.modules.conv._ConvTransposeNd):
        return (
            "a transposed convolution stores its weight by input channel, where with groups a row serves only some of "
            "the outputs, so that it has no rows of outputs to rank; take it out of target_modules"
        )
    if not isinstance(target, _ADAPTED):
        return (
            "PST adapts torch.nn.Linear, transformers' Conv1D, torch.nn.Conv1d, Conv2d, Conv3d, Embedding and "
            "MultiheadAttention; take it out of target_modules"
        )
    if isinstance(target, nn.MultiheadAttention):
        names = ["in_proj_weight"] if base.in_proj_weight is not None else ["q_proj_weight", "k_proj_weight"]
        return next((_computed(target, name) for name in names if target._parameters.get(name) is None), "")
    if target._parameters.get("weight") is None:
        return _computed(target, "weight")
    if is_lazy(base.weight):
        return "its weight has no shape yet; run a batch through the model first"
    if not _is_computed_with(base.weight):
        return f"its weight is stored as {base.weight.dtype}; dequantise the model first"
    return _embedding_refusal(target) if isinstance(target, nn.Embedding) else ""


def _is_computed_with(weight: Tensor) -> bool:
    """Whether sums are made in a weight's type; eight bits are for storing alone."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def _computed(module: nn.Module, name: str) -> str:
    """Why a weight that is no parameter cannot be adapted, and how it becomes one again."""
    stored = {stored for stored in (*module._parameters, *module._buffers) if stored.startswith(f"{name}_")}
    ways = {
        f"{name}_mask": ("by torch.nn.utils.prune", "torch.nn.utils.prune.remove"),
        f"{name}_g": ("by torch.nn.utils.weight_norm", "torch.nn.utils.remove_weight_norm"),
        f"{name}_orig": ("by torch.nn.utils.spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    }
    by_parametrization = ("by a parametrization", "torch.nn.utils.parametrize.remove_parametrizations")
    return _COMPUTED.format(*next((way for mark, way in ways.items() if mark in stored), by_parametrization))


def _nested(layer: BaseTunerLayer) -> str:
    return (
        f"it already carries a {type(layer).__module__} adapter, and PST, which replaces the base weight by a masked "
        "one, cannot be nested; merge or unload the other adapter first, or leave this out"
    )


def _embedding_refusal(embedding: nn.Embedding) -> str:
    if embedding.max_norm is not None:
        return (
            f"max_norm={embedding.max_norm} rescales rows of the base weight at every lookup, which an adapter has to "
            "leave as it is; rescale them once and set max_norm to None"
        )
    if embedding.sparse:
        return "sparse=True asks for a sparse gradient, and the scores need the dense one; set sparse to False"
    return ""


def check_parameter(module: nn.Module, name: str, path: str) -> None:
    """Refuse what `target_parameters` matches, unless it is a matrix, or a stack of them, that only its module reads.

    Raises:
        ValueError: saying why.

    Example:
        >>> check_parameter(nn.Conv1d(2, 3, 4), "weight", "stem.weight")
        Traceback (most recent call last):
        ...
        ValueError: Target parameter stem.weight is not supported: Conv1d is adapted as a whole; name it in \
target_modules.
    """
    parameter = getattr(module, name, None)
    reason = ""
    if isinstance(module, BaseTunerLayer):
        reason = _nested(module)
    elif isinstance(module, _ADAPTED):
        reason = f"{type(module).__name__} is adapted as a whole; name it in target_modules"
    elif parameter is None or name not in module._parameters:
        reason = _computed(module, name)
    elif parameter.dim() not in (2, 3):
        reason = f"it has the shape {tuple(parameter.shape)}; a matrix is (out, in), a stack of them (experts, out, in)"
    elif not _is_computed_with(parameter):
        reason = f"it is stored as {parameter.dtype}; dequantise the model first"
    if reason:
        raise ValueError(f"Target parameter {path} is not supported: {reason}.")
