"""Where an adapter may not stand: inside another wrapper, in the place of one of its own name, under another tuner."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .callers import users_level
from .tuner_layer import PSTTunerLayer, PSTWrapper


def check_not_nested(model: nn.Module, adapter_name: str) -> None:
    """Refuse to wrap a model that is wrapped already, and to start an adapter anew in its own place.

    Args:
        model: what is to be adapted.
        adapter_name: the name of the adapter to be made.

    Raises:
        ValueError: if the model is a `PeftModel`, or carries a PST adapter of that name.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), PSTConfig(target_modules=["0"]))
        >>> check_not_nested(model.get_base_model(), "other")
        >>> check_not_nested(model.get_base_model(), "default")
        Traceback (most recent call last):
        ...
        ValueError: The model carries a PST adapter named 'default', which would lose what it learned. Give the new \
one another name, remove the old one with delete_adapter() or unload(), or load the base model anew.
    """
    if isinstance(model, PeftModel | PeftMixedModel):
        raise ValueError(_nested(model))
    if any(_has_adapter(module, adapter_name) for module in model.modules()):
        raise ValueError(
            f"The model carries a PST adapter named {adapter_name!r}, which would lose what it learned. Give the new "
            "one another name, remove the old one with delete_adapter() or unload(), or load the base model anew."
        )


def _nested(model: nn.Module) -> str:
    return (
        f"The model is a {type(model).__name__} already, and PST is not nested with another one. Add a further PST "
        "adapter with model.add_adapter(name, config); put PST beside another tuner, on other layers, with "
        "inject_adapter_in_model(config, model.get_base_model(), name); or call merge_and_unload() or unload() first."
    )


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, PSTTunerLayer) and adapter_name in module._get_available_adapters()


_HOOKS: list[RemovableHandle] = []
_PRUNED = "_pst_pruned"


def refuse_tuners_over_pst() -> None:
    """Refuse from now on that another tuner is put over a layer with PST adapters; to ask for it again is harmless.

    PEFT asks nobody before it does so, and another tuner then merges below the mask and, unloading, drops the PST
    adapter unseen. Only torch knows in time: it tells a hook of its own of every module that becomes part of another.
    """
    if not _HOOKS:
        _HOOKS.append(register_module_module_registration_hook(_look_at_wrapped))


def _look_at_wrapped(holder: nn.Module, name: str, module: Any) -> None:
    is_around = isinstance(module, PeftModel | PeftMixedModel) and isinstance(
        holder, BaseTuner | PeftModel | PeftMixedModel
    )
    if is_around and any(isinstance(layer, PSTTunerLayer) for layer in module.modules()):
        raise ValueError(_nested(module))
    if name != "base_layer" or not isinstance(holder, BaseTunerLayer) or isinstance(holder, PSTWrapper):
        return
    if isinstance(module, PSTWrapper):
        raise ValueError(_over_pst(type(holder), module.module_name))
    if getattr(module, _PRUNED, False):
        warnings.warn(
            f"A {type(holder).__module__} adapter is put on weights that PST has pruned. merge_and_unload() would fill "
            "their zeros; peft_pst.merge_keeping_zeros(model) merges it without.",
            stacklevel=users_level(),
        )


def mark_pruned(base_layer: nn.Module) -> None:
    """Remember of a plain module that PST has pruned its weights, to warn where another tuner is put on them.

    Copies and pickles of the model remember it too; a saved checkpoint does not.
    """
    setattr(base_layer, _PRUNED, True)


def check_no_tuner(module: nn.Module, module_name: str) -> None:
    """Refuse the layer of another tuner in the place of a module whose parameters PST adapts.

    Raises:
        ValueError: if it is one.
    """
    if isinstance(module, BaseTunerLayer):
        raise ValueError(_over_pst(type(module), module_name))


def _over_pst(tuner: type, module_name: str) -> str:
    return (
        f"Layer {module_name}: a {tuner.__module__} adapter cannot be put over its PST adapter: merging it would write "
        "to the weight below the mask, and unloading it would drop the PST adapter unseen. Give it other layers; or "
        "merge PST first, train the other adapter on the result, and merge that with merge_keeping_zeros()."
    )
