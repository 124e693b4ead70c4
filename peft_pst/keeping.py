"""Merging another tuner's adapter into a model that was pruned before, without filling its zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm import tqdm

from .hosts import PSTHost
from .layer import PSTLayer
from .masking import count_zeros
from .sharding import is_sharded

# Values of `init_lora_weights` that take the adapter's start out of the base weight, and so fill its zeros.
_STARTS_IN_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class KeptZeros(NamedTuple):
    """What became of the zeros of one weight.

    Attributes:
        zeros: entries that are zero now, those of the base among them.
        refilled: zeros of the base that the adapter had filled, and that were set back to zero.
    """

    zeros: int
    refilled: int


def merge_keeping_zeros(
    model: PeftModel,
    adapter_names: Sequence[str] | None = None,
    *,
    progressbar: bool = False,
) -> tuple[nn.Module, dict[str, KeptZeros]]:
    """Merge the adapter of any tuner, such as LoRA, and set back to zero what is zero in the base.

    A low-rank update fills nearly every zero of the weight that it is added to, so `merge_and_unload` makes a pruned
    model dense again. Here each layer is merged and its zeros restored before the next, so that no more than one mask
    is held at a time; modules that were trained in full beside it (`modules_to_save`) are set back alike. What was
    learned for the zeros is lost: the merged model is not the one that was trained, and should be evaluated. To train
    within the zeros in the first place, use `PSTConfig(keep_zeros=True)`.

    Args:
        model: a `PeftModel` over a base with zeros; nothing in it may be merged yet.
        adapter_names: the adapters to merge, by default the active ones.
        progressbar: whether to show progress.

    Returns:
        The plain model, and for each weight that an adapter changed, by its name there, what became of its zeros.

    Raises:
        ValueError: if there is nothing to merge, an adapter does not exist, is merged already, holds a NaN or an
            infinity or has changed the base weight when it was made (PiSSA and others), or a base weight is quantised.
            The model is left as it was.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(4, 3))
        >>> base[0].weight.data[:, 1:] = 0
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> merged, kept = merge_keeping_zeros(model)
        >>> kept
        {'0.weight': KeptZeros(zeros=9, refilled=9)}
    """
    layers = _layers_to_merge(model, adapter_names)
    kept: dict[str, KeptZeros] = {}
    for name, layer in tqdm(layers, desc="merging", unit="layer", disable=not progressbar):
        with onload_layer(layer):
            for weight, (zeros, refilled) in _merge_layer(name, layer, adapter_names).items():
                # Several layers may stand for one module, each merging another of its weights.
                before = kept[weight].refilled if weight in kept else 0
                kept[weight] = KeptZeros(zeros, before + refilled)
    kept.update(_set_back_saved(model.get_base_model()))
    return model.base_model.unload(), kept  # type: ignore[operator]


def _layers_to_merge(model: PeftModel, adapter_names: Sequence[str] | None) -> list[tuple[str, Any]]:
    unknown = sorted(set(adapter_names or ()) - set(model.peft_config))
    if unknown:
        raise ValueError(f"There are no adapters {unknown} to merge; the model has {sorted(model.peft_config)}.")
    _check_starts(model)
    modules = model.get_base_model().named_modules() if isinstance(model.base_model, BaseTuner) else ()
    layers = [(name, module) for name, module in modules if _holds_weights(module)]
    if not layers:
        raise ValueError(f"The adapter {model.active_adapter!r} changes no weights, so there is nothing to merge.")
    for name, layer in layers:
        _check_mergeable(name, layer)
    return layers


def _check_starts(model: PeftModel) -> None:
    for name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_STARTS_IN_THE_BASE):
            raise ValueError(
                f"The adapter {name!r} was started with init_lora_weights={start!r}, which takes a part out of the "
                "base weight, so that its zeros were filled when the adapter was made; use init_lora_weights=True on a "
                "pruned model."
            )


def _holds_weights(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, PSTHost)


def _check_mergeable(name: str, layer: Any) -> None:
    if layer.merged:
        raise ValueError(
            f"Layer {name}: adapters {layer.merged_adapters} are merged already, so the zeros of the base are no "
            "longer known; call unmerge_adapter() first."
        )
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention) and not isinstance(layer, PSTLayer):
        raise ValueError(
            f"Layer {name}: PEFT takes the weights of torch.nn.MultiheadAttention apart while an adapter is on it; "
            "merge it with merge_and_unload() and prune again."
        )
    for part, tensor in layer.named_parameters():
        if "base_layer" not in part and not torch.isfinite(tensor).all():
            raise ValueError(f"Layer {name}: {part} holds a NaN or an infinity, so merging would spoil the weights.")
    for part, weight in _matrices(layer).items():
        # torchao's tensors say that they are of floating point.
        packed = is_traceable_wrapper_subclass(weight) and not is_sharded(weight)
        if packed or not weight.is_floating_point():
            kind = type(weight).__name__ if packed else str(weight.dtype)
            raise ValueError(
                f"Layer {name}: {part} is stored as {kind}, whose zeros cannot be read from it; load the base "
                "without quantisation to merge."
            )


def _matrices(layer: Any) -> dict[str, Tensor]:
    return {part: weight for part, weight in layer.get_base_layer().named_parameters(recurse=False) if weight.dim() > 1}


def _merge_layer(name: str, layer: Any, adapter_names: Sequence[str] | None) -> dict[str, KeptZeros]:
    zero = {part: weight.detach() == 0 for part, weight in _matrices(layer).items()}
    layer.merge(adapter_names=None if adapter_names is None else list(adapter_names))
    if not layer.merged:
        return {}  # none of these adapters is on this layer
    # Where two adapters wrap parameters of one module, or one of ours is on a parameter of it.
    plain = name.partition(".matrices.")[0].replace(".base_layer", "").removesuffix(".token_adapter")
    return {
        f"{plain}.{part}" if plain else part: _restore(weight, zero[part]) for part, weight in _matrices(layer).items()
    }


def _set_back_saved(model: nn.Module) -> dict[str, KeptZeros]:
    """Set back the weights with zeros of modules that are saved in full, in the copies that are in force."""
    kept = {}
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or not module.active_adapters:
            continue
        trained = module.modules_to_save[module.active_adapters[0]]
        for part, weight in module.original_module.named_parameters():
            zero = weight.detach() == 0
            if weight.dim() > 1 and zero.any():
                kept[f"{name}.{part}"] = _restore(trained.get_parameter(part), zero)
    return kept


@torch.no_grad()
def _restore(weight: Tensor, zero: Tensor) -> KeptZeros:
    refilled = int(torch.count_nonzero(weight[zero]))
    weight.masked_fill_(zero, 0)
    return KeptZeros(zeros=count_zeros(weight), refilled=refilled)
