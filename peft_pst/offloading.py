"""Base weights that accelerate keeps in host memory or on a disk: `device_map`, `cpu_offload`, `disk_offload`.

A base layer of such a model holds tensors on the meta device, and its hook fills them for the time of its own forward.
An adapted layer computes its product itself, so what follows reads the weights where the hook would. The adapter's own
tensors are small and trained, and do not stay offloaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that keeps a module's tensors elsewhere between its forwards, if it has one.

    Example:
        >>> offload_hook(nn.Linear(2, 2)) is None
        True
    """
    hook: Any = getattr(module, "_hf_hook", None)
    hooks: Iterable[Any] = getattr(hook, "hooks", (hook,))  # one, or several one after another
    return next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)


def at_hand(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module on the device where it computes, read from where it is offloaded; None if it has no data.

    Args:
        module: a base layer.
        name: a parameter that it has, such as "weight".

    Example:
        >>> at_hand(nn.Linear(2, 3), "weight").shape, at_hand(nn.Linear(2, 3, device="meta"), "weight")
        (torch.Size([3, 2]), None)
    """
    tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor
    hook = offload_hook(module)
    return None if hook is None else hook.weights_map[name].to(hook.execution_device)


@contextmanager
def not_offloading(module: nn.Module) -> Iterator[None]:
    """Let a module run with the tensors that it has, and not with those that its hook would fetch."""
    hook = offload_hook(module)
    if hook is None:
        yield
        return
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True


def fetch_back(container: nn.ParameterDict | BufferDict) -> None:
    """Give the tensors of one part of the adapters their data back, for good; optimizers go on knowing them."""
    hook = offload_hook(container)
    if hook is None:
        return
    for name, tensor in container.items():
        if tensor.is_meta:
            data = _adapter_tensor(hook.weights_map, name).to(hook.execution_device, tensor.dtype)
            fetched = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
            torch.utils.swap_tensors(tensor, fetched)
    hook.original_devices = {}  # nothing for accelerate to restore
    remove_hook_from_module(container)


def _adapter_tensor(weights_map: Mapping[str, Tensor], adapter_name: str) -> Tensor:
    try:
        return weights_map[adapter_name]
    except KeyError:
        # PEFT, when it dispatches a model anew, puts the adapter's name before the last part, as LoRA has it.
        store, key = _entry(weights_map, adapter_name)
        layer, part, _ = key.rsplit(".", 2)
        return store[f"{layer}.{adapter_name}.{part}"]


def computing_device(module: nn.Module) -> torch.device:
    """Where the product with a base layer's weight is made."""
    hook, weight = offload_hook(module), cast("Tensor", module.weight)
    return weight.device if hook is None else torch.device(hook.execution_device)


def take_dense_weight(module: nn.Module) -> Tensor:
    """The offloaded weight of a base layer that is about to be merged, on the CPU, without a copy in memory.

    What is on a disk is mapped from there. What is in host memory is taken from the store, which no longer holds it.
    """
    hook = offload_hook(module)
    assert hook is not None
    loader, key = _entry(hook.weights_map, "weight")
    in_memory = loader.state_dict if isinstance(loader, OffloadedWeightsLoader) else loader
    if key in in_memory:
        return in_memory.pop(key)
    if "safetensors_file" in loader.index[key]:
        return OffloadedWeightsLoader(index=loader.index)[key]  # without a device, it maps the file
    weight: Any = module.weight
    return _mapped(Path(loader.save_folder) / f"{key}.dat", weight.shape, weight.dtype)


def offload_folder(module: nn.Module) -> Path | None:
    """The folder on a disk that a base layer's weight is offloaded to; None if it is in memory."""
    hook = offload_hook(module)
    if hook is None:
        return None
    loader, key = _entry(hook.weights_map, "weight")
    on_disk = isinstance(loader, OffloadedWeightsLoader) and key not in loader.state_dict and loader.save_folder
    return Path(loader.save_folder) if on_disk else None


def _entry(weights_map: Any, name: str) -> tuple[Any, str]:
    """Behind a view of one module's weights: the store of all modules', and the name there."""
    prefix = getattr(weights_map, "prefix", None)
    return (weights_map, name) if prefix is None else (weights_map.dataset, prefix + name)


def moved_to_disk(tensor: Tensor, folder: Path) -> Tensor:
    """The same values on the CPU, in a file that is gone once the tensor is, and so not held in memory.

    Args:
        tensor: any shape and dtype.
        folder: where to write; it has to exist.

    Raises:
        OSError: if the folder takes no more.

    Example:
        >>> moved_to_disk(torch.ones(2), Path(tempfile.gettempdir()))
        tensor([1., 1.])
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix="merged-") as file:
        file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        return _mapped(Path(file.name), tensor.shape, tensor.dtype)


def _mapped(file: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # Private, so that a write to the tensor does not reach the file.
    return torch.from_file(str(file), shared=False, size=shape.numel(), dtype=dtype).view(shape)
