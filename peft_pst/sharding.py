"""Parameters of which each process holds a shard: FSDP2's and tensor parallelism's DTensors.

Within a forward FSDP2 puts whole tensors in their place, so layers compute as ever. Outside of one, for reports, masks,
merging and saving, what follows gathers them: one layer at a time, and on all processes together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds but a part of this tensor.

    Example:
        >>> is_sharded(torch.zeros(3))
        False
    """
    return hasattr(tensor, "full_tensor")


def is_gathered_for_forward(module: nn.Module) -> bool:
    """Whether the parameters of a module are whole only while it runs, so that nothing of their size may be kept."""
    # FSDP's own mark for torch.compile; DTensors cannot tell, as they have been replaced by the time a layer runs.
    return getattr(module, "_is_fsdp_managed_module", False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is on one process; a shard is gathered from all, which all must call.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    shard: Any = tensor
    # A shard that is offloaded to the host travels by its accelerator's network.
    return shard.to(shard.device_mesh.device_type).full_tensor()


@torch.no_grad()
def copy_of(parameter: Tensor) -> Tensor:
    """What a parameter holds, on the CPU; of a sharded one the shard.

    Moving copies, so the whole parameter of a model on the CPU is returned as it is, and must not be written.
    """
    return parameter.detach().to("cpu", copy=is_sharded(parameter))


@torch.no_grad()
def replace_values(parameter: Tensor, values: Tensor) -> None:
    """Put other values in a parameter's place, without touching what it held unless it is sharded.

    Args:
        parameter: any shape; a sharded one is written in place, since FSDP holds its storage.
        values: of that shape and dtype, whole and alike on all processes, or sharded as the parameter is.
    """
    if not is_sharded(parameter):
        parameter.data = values
        return
    target: Any = parameter
    if not is_sharded(values):
        from torch.distributed.tensor import distribute_tensor  # absent from builds of torch without distribution

        values = distribute_tensor(values, target.device_mesh, target.placements)
    shard: Any = values
    target.to_local().copy_(shard.to_local())
