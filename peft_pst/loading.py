"""What an adapter's tensors must be like to be loaded. They come from a file, so nothing in them is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .layer import PSTLayer
from .masking import check_zeros
from .residual import check_positions
from .sharding import is_sharded
from .tuner_layer import PSTTunerLayer

_DTYPES = {"pst_num_pruned": torch.int64, "pst_mask": torch.uint8, "pst_positions": torch.int64}
_is_file: ContextVar[bool] = ContextVar("_is_file", default=False)


@contextmanager
def reading_a_file() -> Iterator[None]:
    """Within the block, tensors to be set are those of a whole adapter file, and not what one of many ranks has."""
    token = _is_file.set(True)
    try:
        yield
    finally:
        _is_file.reset(token)


def check_stored_adapter(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse the stored tensors of an adapter, before the model is touched, unless they are those of its layers.

    Args:
        model: a model that has the adapter already.
        adapter_name: its name there.
        state: the tensors by the names that they have in the model's state dict; other tensors may be among them.

    Raises:
        ValueError: naming the layer, if a tensor is missing, has no place, or has another shape or kind than the
            model's, if a factor is not finite, or if number of zeros, mask and positions do not go together.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> config = PSTConfig(target_modules=["0"], target_sparsity=0.5)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> state = model.state_dict()
        >>> state["base_model.model.0.pst_num_pruned.default"] = torch.tensor(32)
        >>> check_stored_adapter(model, "default", state)
        Traceback (most recent call last):
        ...
        ValueError: Layer 0, adapter 'default': pst_num_pruned=32 is outside [0, 32), the number of weights. The \
adapter file is damaged or belongs to another model; load the one that was saved for this base.
    """
    stored = {name: tensor for name, tensor in state.items() if ".pst_" in name}
    layers = _layers_with(model, adapter_name)
    if not stored and not _is_file.get():
        return  # a rank that gets its adapter from another one, or biases alone
    if not stored and layers:
        raise ValueError(
            f"The file holds no tensor of adapter {adapter_name!r}, which {len(layers)} layers have, such as "
            f"{min(layers)}. It is damaged or belongs to another method; load the one that was saved for this base."
        )
    for prefix, layer in layers.items():
        parts = {part: stored.pop(f"{prefix}.{part}.{adapter_name}", None) for part in _parts(layer, adapter_name)}
        with layer.refusing_damage(adapter_name):
            present = _check_tensors(layer, adapter_name, parts)
            if isinstance(layer, PSTLayer):
                _check_zeros(layer, adapter_name, present)
    if stored:
        raise ValueError(
            f"{min(stored)} has no place in adapter {adapter_name!r} of this model. The file belongs to another "
            "model or configuration; load it with the ones it was saved for."
        )


def check_loaded_adapter(model: nn.Module, adapter_name: str, report: Any) -> None:
    """Refuse what transformers has loaded into a plain model by itself, which asks nobody before it does.

    Its loader casts to the dtype of what is there, so that a count that was no integer is one by now.

    Args:
        model: the plain model.
        adapter_name: the name of the adapter there.
        report: which keys of the file it found no place for, or no tensor, or one of another shape.

    Raises:
        ValueError: as `check_stored_adapter`.
    """
    missing = set(report.missing_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    found = {name: tensor for name, tensor in state.items() if ".pst_" in name and name.endswith(f".{adapter_name}")}
    found |= {key: torch.empty(shape, device="meta") for key, shape, _ in report.mismatched_keys}
    found |= {key: torch.empty(0) for key in report.unexpected_keys}
    with reading_a_file():
        check_stored_adapter(model, adapter_name, found)
    note_whether_pruned(model, adapter_name, found)


def note_whether_pruned(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Remember whether what was loaded has zeros, so that a layer without is not taken for one that never had a turn.

    Args:
        model: with the adapter.
        adapter_name: the name of the adapter there.
        state: the adapter's tensors, by their names in the model.
    """
    counts = [tensor for name, tensor in state.items() if ".pst_num_pruned" in name and not tensor.is_meta]
    was_pruned = any(map(torch.any, counts))
    for layer in _layers_with(model, adapter_name).values():
        if isinstance(layer, PSTLayer):
            layer.pst_plans[adapter_name].status.was_pruned = was_pruned


def check_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Refuse to load into an adapter that is merged: its head would be the new one, and its weights the old ones.

    Raises:
        RuntimeError: if it is merged into a layer.
    """
    layers = _layers_with(model, adapter_name)
    merged = [layer.module_name for layer in layers.values() if adapter_name in layer.merged_adapters]
    if merged:
        raise RuntimeError(
            f"Nothing can be loaded into adapter {adapter_name!r} while it is merged, which it is into {len(merged)} "
            f"layers, such as {min(merged)}; call unmerge_adapter() first, and merge again."
        )


def _layers_with(model: nn.Module, adapter_name: str) -> dict[str, PSTTunerLayer]:
    """The layers that have an adapter, by the names that state dicts have for them."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PSTTunerLayer)}
    return {
        _without_wrappers(name): layer
        for name, layer in layers.items()
        if adapter_name in layer._get_available_adapters()
    }


def in_present_places(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors under the names that its layers have now.

    What is inside a module whose parameters are adapted has `base_layer` in its name, and is named without where no
    adapter is on these parameters, or none yet.

    Args:
        model: with the adapter.
        state: its tensors by the names of a file.
    """
    layers = {_without_wrappers(name) for name, layer in model.named_modules() if isinstance(layer, PSTTunerLayer)}
    present = {_plain(name): name for name in layers}

    def renamed(key: str) -> str:
        layer, is_ours, part = key.partition(".pst_")
        return f"{present.get(_plain(layer), layer)}{is_ours}{part}" if layer not in layers else key

    return {renamed(key): tensor for key, tensor in state.items()}


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def adapted_modules(model: nn.Module, state: Iterable[str]) -> set[str]:
    """Names of the modules that an adapter's tensors belong to, for `inject_adapter_in_model(state_dict=...)`.

    Args:
        model: the model to adapt, which may carry adapters already.
        state: names of the tensors, as `get_peft_model_state_dict` gives them for a model that is not wrapped; other
            names may be among them.

    Raises:
        ValueError: if some belong to parameters such as experts, which PEFT adapts by their names alone.

    Example:
        >>> model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 4)})
        >>> state = ["attn.matrices.in_proj_weight.0.pst_U", "attn.base_layer.out_proj.pst_U", "up.pst_U", "up.bias"]
        >>> sorted(adapted_modules(model, state))
        ['attn', 'up']
    """
    names = {name.rpartition(".pst_")[0].removeprefix("_orig_mod.") for name in state if ".pst_" in name}
    modules = dict(model.named_modules())
    adapted, parameters = set(), set()
    for name in names:
        host, _, parameter = name.partition(".matrices.")
        plain = host if host in modules else _plain(host)
        if not parameter or isinstance(_base_of(modules.get(plain)), nn.MultiheadAttention):
            adapted.add(plain)
        else:
            parameters.add(f"{host}.{parameter.rpartition('.')[0]}")
    attending = {name for name in adapted if isinstance(_base_of(modules.get(name)), nn.MultiheadAttention)}
    adapted -= {f"{name}.out_proj" for name in attending}  # which goes with the others
    if parameters:
        raise ValueError(
            f"The state dict holds the adapters of {len(parameters)} parameters, such as {min(parameters)}, and "
            "parameters are adapted by their names only. Name them in target_parameters, inject without a state_dict, "
            "and load it with set_peft_model_state_dict()."
        )
    return adapted


def updated_embeddings(state: Iterable[str]) -> list[str]:
    """Names of the embeddings that an adapter's tensors update, with the same names as `adapted_modules`.

    Example:
        >>> updated_embeddings(["tokens.pst_embedding_U", "tokens.pst_embedding_V", "layers.0.pst_U"])
        ['tokens']
    """
    names = {name.partition(".pst_embedding_")[0] for name in state if ".pst_embedding_" in name}
    return sorted(name.removeprefix("_orig_mod.") for name in names)


def _base_of(module: nn.Module | None) -> nn.Module | None:
    return getattr(module, "base_layer", module)


def _without_wrappers(name: str) -> str:
    """The name as state dicts have it, where activation checkpointing and FSDP leave theirs out."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


def _parts(layer: PSTTunerLayer, adapter_name: str) -> Iterable[str]:
    tensors = (*layer.adapter_layer_names, *_DTYPES)
    return [part for part in tensors if adapter_name in getattr(layer, part, ())]


def _check_tensors(layer: PSTTunerLayer, adapter_name: str, stored: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that can be read, once all are found to be there and of the right kind."""
    for part, tensor in stored.items():
        if tensor is None:
            raise ValueError(f"{part} is missing.")
        _check_kind(part, tensor, getattr(layer, part)[adapter_name])
    present = {part: tensor for part, tensor in stored.items() if tensor is not None and _is_readable(tensor)}
    for part, tensor in present.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{part} holds a NaN or an infinity.")
    return present


def _check_zeros(layer: PSTLayer, adapter_name: str, present: Mapping[str, Tensor]) -> None:
    """Refuse a number of zeros, a mask and positions that do not go together."""
    if "pst_num_pruned" in present:
        counts = present["pst_num_pruned"].reshape(-1).tolist()
        layer.pst_plans[adapter_name].check_counts(counts)
        if "pst_mask" in present:
            check_zeros(present["pst_mask"], sum(counts), layer.num_weights)
    if "pst_positions" in present:
        check_positions(present["pst_positions"], layer.num_weights)


def _check_kind(part: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(f"{part} has shape {tuple(tensor.shape)}, but the model's has {tuple(expected.shape)}.")
    dtype = _DTYPES.get(part)
    if dtype is None and not tensor.is_floating_point():
        raise ValueError(f"{part} is of {tensor.dtype}, which is no floating-point type.")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{part} is of {tensor.dtype} instead of {dtype}.")


def _is_readable(tensor: Tensor) -> bool:
    return not tensor.is_meta and not is_sharded(tensor)
