"""Which class adapts which kind of base layer, and what is refused for which reason."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from .hosts import PSTMultiheadAttention
from .linear import PSTLinear, PSTStoredLinear, is_linear
from .module import PSTModule
from .quantised import PSTQuantisedLinear
from .swapped import PSTConv, PSTEmbedding

_COMPUTED = (
    "its weight is no parameter of its own, but computed by a parametrization, so that no mask could be written into "
    "it; call torch.nn.utils.parametrize.remove_parametrizations first"
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
        return PSTQuantisedLinear
    reason = _refusal(target)
    if reason:
        raise ValueError(f"Target module {name} ({type(target).__name__}) is not supported: {reason}.")
    if isinstance(target, nn.MultiheadAttention):
        return PSTMultiheadAttention
    if isinstance(target, nn.Embedding):
        return PSTEmbedding
    if isinstance(target, _CONVOLUTIONS):
        return PSTConv
    return PSTLinear if is_linear(target, parent) else PSTStoredLinear


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
        return "" if all(target._parameters.get(name) is not None for name in names) else _COMPUTED
    if target._parameters.get("weight") is None:
        return _COMPUTED
    if is_lazy(base.weight):
        return "its weight has no shape yet; run a batch through the model first"
    if not base.weight.dtype.is_floating_point:
        return f"its weight is stored as {base.weight.dtype}; dequantise the model first"
    return _embedding_refusal(target) if isinstance(target, nn.Embedding) else ""


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
        reason = _COMPUTED
    elif parameter.dim() not in (2, 3):
        reason = f"it has the shape {tuple(parameter.shape)}; a matrix is (out, in), a stack of them (experts, out, in)"
    elif not parameter.dtype.is_floating_point:
        reason = f"it is stored as {parameter.dtype}; dequantise the model first"
    if reason:
        raise ValueError(f"Target parameter {path} is not supported: {reason}.")
