"""Where an adapter may not stand: inside another wrapper, in the place of one of its own name, under another tuner."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


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
        raise ValueError(
            f"The model is a {type(model).__name__} already, and PST is not nested in another one. Add a further PST "
            "adapter with model.add_adapter(name, config); put PST beside another tuner, on other layers, with "
            "inject_adapter_in_model(config, model.get_base_model(), name); or call merge_and_unload() or unload() "
            "first."
        )
    if any(adapter_name in getattr(module, "pst_plans", {}) for module in model.modules()):
        raise ValueError(
            f"The model carries a PST adapter named {adapter_name!r}, which would lose what it learned. Give the new "
            "one another name, remove the old one with delete_adapter() or unload(), or load the base model anew."
        )


class Place(NamedTuple):
    """Where a layer was put: under which name of which module."""

    parent: weakref.ref[nn.Module]
    name: str

    def holder_over(self, layer: nn.Module) -> Any:
        """The layer of another tuner that has taken this place and holds `layer` as its base, or None."""
        parent = self.parent()
        holder = None if parent is None else getattr(parent, self.name, None)
        is_over = isinstance(holder, BaseTunerLayer) and getattr(holder, "base_layer", None) is layer
        return holder if is_over else None
