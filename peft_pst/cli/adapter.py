"""Putting a new PST adapter on a base model, or saying in one line why it does not go."""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from peft.utils import NoMatchingPeftModuleError

from ..config import PSTConfig
from ..model import pst_layers
from ..targets import find_block_linears
from .base import Base
from .errors import UserError


def add_adapter(base: Base, config: PSTConfig) -> PeftModel:
    """Adapt a base model; the modules that start at random are trained and saved with the adapter.

    Raises:
        UserError: if the configuration names modules that the model does not have, or cannot be applied to it.
    """
    if base.new_modules:
        config.modules_to_save = [*(config.modules_to_save or []), *base.new_modules]
    asked = config.target_modules
    names: list[str] = sorted(asked) if isinstance(asked, set) else []
    linears = ", ".join(find_block_linears(base.model)) or "no linear layers"
    nothing = f"matches no layer of the model; its blocks hold {linears}."
    try:
        model = get_peft_model(base.model, config)
    except NoMatchingPeftModuleError as error:
        raise UserError(f"--target_modules {' '.join(names) or asked} {nothing}" if asked else error) from error
    except ValueError as error:
        raise UserError(error) from error
    adapted = [f".{layer.module_name}" for layer in pst_layers(model)]
    for name in names:
        # PEFT is content with one name that matches; a misspelt second one would go unnoticed.
        if not any(module.endswith(f".{name}") for module in adapted):
            raise UserError(f"--target_modules: {name!r} {nothing}")
    return model
