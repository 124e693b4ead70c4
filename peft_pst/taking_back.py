"""A load that fails leaves the model as it was: whatever was put into it is taken out again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .config import PSTConfig
from .loading import check_loaded_adapter, reading_a_file
from .tuner_layer import PSTTunerLayer, PSTWrapper

_OF_MODEL = ("peft_config", "_hf_peft_config_loaded", "_weight_conversions")  # what PEFT and transformers set on it
_OF_MODULE = ("training", "_active_adapter", "_adapters")


@cache
def take_back_failed_loads() -> None:
    """Have PEFT and transformers take back what a load that fails has put into a model; to ask again is harmless.

    They put the layers in before they look at the file, and ask nobody when that ends in an error. Transformers' own
    loader asks nobody at all, so that what it has loaded is checked here too.
    """
    from_pretrained, load_adapter = PeftModel.from_pretrained.__func__, PeftModel.load_adapter  # type: ignore[attr-defined]

    @wraps(from_pretrained)
    def from_pretrained_or_not(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        with taken_back_if_it_fails(model):
            return from_pretrained(cls, model, *args, **kwargs)

    @wraps(load_adapter)
    def load_adapter_or_not(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        with taken_back_if_it_fails(self), reading_a_file():
            return load_adapter(self, *args, **kwargs)

    load_into_plain_model = PeftAdapterMixin.load_adapter

    @wraps(load_into_plain_model)
    def load_into_plain_model_or_not(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _adapter_names(self)
        with taken_back_if_it_fails(self):
            loaded = load_into_plain_model(self, *args, **kwargs)
            for name in _adapter_names(self) - before:
                check_loaded_adapter(self, name, loaded)
        return loaded

    PeftModel.from_pretrained = classmethod(from_pretrained_or_not)  # type: ignore[assignment]
    PeftModel.load_adapter = load_adapter_or_not  # type: ignore[method-assign]
    PeftAdapterMixin.load_adapter = load_into_plain_model_or_not  # type: ignore[method-assign]


@contextmanager
def taken_back_if_it_fails(model: nn.Module) -> Iterator[None]:
    """Put all modules back in their places, and configurations and what trains as they were, if the block raises.

    Nothing is done where PST has no part in the model.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 4))
        >>> with taken_back_if_it_fails(base):
        ...     model = get_peft_model(base, PSTConfig(target_modules=["0"]))
        ...     raise OSError("no such file")
        Traceback (most recent call last):
        ...
        OSError: no such file
        >>> base
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    before = _Snapshot(model)
    try:
        yield
    except BaseException:  # an interruption too
        if _has_part_in(model):
            before.restore()
        raise


def _has_part_in(model: nn.Module) -> bool:
    configs = getattr(model, "peft_config", None) or {}
    is_configured = any(isinstance(config, PSTConfig) for config in configs.values())
    return is_configured or any(isinstance(module, PSTWrapper) for module in model.modules())


def _adapters(model: nn.Module) -> dict[PSTTunerLayer, set[str]]:
    layers = (module for module in model.modules() if isinstance(module, PSTTunerLayer))
    return {layer: set(layer._get_available_adapters()) for layer in layers}


def _adapter_names(model: nn.Module) -> set[str]:
    return set().union(*_adapters(model).values())


class _Snapshot:
    """What stood where in a model, and in which state; not the values of its tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._children = {module: dict(module._modules) for module in model.modules()}
        self._states = {module: _present(module, _OF_MODULE) for module in self._children}
        self._adapters = _adapters(model)
        self._trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._of_model = _present(model, _OF_MODEL)
        configs = getattr(model, "peft_config", None)  # of a PeftModel, that of its tuner
        self._configs = (configs, dict(configs)) if isinstance(configs, dict) else None

    def restore(self) -> None:
        for module, children in self._children.items():
            module._modules.clear()
            module._modules.update(children)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about which adapter is active now, before it is put back
            for layer, names in _adapters(self._model).items():
                for name in names - self._adapters[layer]:
                    layer.delete_adapter(name)
        for module, state in self._states.items():
            _put_back(module, state, _OF_MODULE)
        for parameter, requires_grad in self._trains.items():
            parameter.requires_grad_(requires_grad)
        if self._configs is not None:
            configs, as_they_were = self._configs
            configs.clear()
            configs.update(as_they_were)
        _put_back(self._model, self._of_model, _OF_MODEL)


def _present(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of these attributes that are the module's own, with copies of lists and sets."""
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    return {name: copy.copy(value) if isinstance(value, list | set) else value for name, value in own.items()}


def _put_back(module: nn.Module, state: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(state)
