"""Which class adapts which kind of base layer, and what is refused for which reason."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from .linear import PSTLinear, is_linear
from .module import PSTModule
from .swapped import PSTConv, PSTEmbedding

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_of(target: nn.Module, parent: nn.Module, name: str) -> type[PSTModule]:
    """The class that adapts a module.

    Args:
        target: the module to adapt.
        parent: the module that holds it, which may read the target's weight without calling it.
        name: the target's name in the model, for the error.

    Raises:
        ValueError: saying why, if PST cannot adapt the module.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3), nn.Sequential(), "stem").__name__
        'PSTConv'
        >>> kind_of(nn.LayerNorm(3), nn.Sequential(), "norm")
        Traceback (most recent call last):
        ...
        ValueError: Target module norm (LayerNorm) is not supported: PST adapts torch.nn.Linear, transformers' Conv1D, \
torch.nn.Conv1d, Conv2d, Conv3d and Embedding; take it out of target_modules.
    """
    reason = _refusal(target, parent)
    if reason:
        raise ValueError(f"Target module {name} ({type(target).__name__}) is not supported: {reason}.")
    if isinstance(target, nn.Embedding):
        return PSTEmbedding
    return PSTConv if isinstance(target, _CONVOLUTIONS) else PSTLinear


def _refusal(target: nn.Module, parent: nn.Module) -> str:
    """Why a module cannot be adapted; empty where it can."""
    base: Any = target
    if isinstance(target, BaseTunerLayer):
        return (
            f"it already carries a {type(target).__module__} adapter, and PST, which replaces the base weight by a "
            "masked one, cannot be nested; merge or unload the other adapter first, or exclude the module"
        )
    if isinstance(target, nn.modules.conv._ConvTransposeNd):
        return (
            "a transposed convolution stores its weight by input channel, where with groups a row serves only some of "
            "the outputs, so that it has no rows of outputs to rank; take it out of target_modules"
        )
    if not isinstance(target, (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)):
        return (
            "PST adapts torch.nn.Linear, transformers' Conv1D, torch.nn.Conv1d, Conv2d, Conv3d and Embedding; take it "
            "out of target_modules"
        )
    if target._parameters.get("weight") is None:
        return (
            "its weight is no parameter of its own, but computed by a parametrization, so that no mask could be "
            "written into it; call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if is_lazy(base.weight):
        return "its weight has no shape yet; run a batch through the model first"
    if not base.weight.dtype.is_floating_point:
        return f"its weight is stored as {base.weight.dtype}; dequantise the model first"
    if isinstance(target, (nn.Linear, Conv1D)) and not is_linear(target, parent):
        return (
            "torch.nn.MultiheadAttention and torch.nn.TransformerEncoderLayer read its weight without calling it, so "
            "that an adapter would have no effect; take it out of target_modules"
        )
    return _embedding_refusal(target) if isinstance(target, nn.Embedding) else ""


def _embedding_refusal(embedding: nn.Embedding) -> str:
    if embedding.max_norm is not None:
        return (
            f"max_norm={embedding.max_norm} rescales rows of the base weight at every lookup, which an adapter has to "
            "leave as it is; rescale them once and set max_norm to None"
        )
    if embedding.sparse:
        return "sparse=True asks for a sparse gradient, and the scores need the dense one; set sparse to False"
    return ""
