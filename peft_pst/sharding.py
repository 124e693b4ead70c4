"""Parameters of which each process holds a shard: FSDP2's and tensor parallelism's DTensors, and those of ZeRO-3.

Within a forward FSDP2 puts whole tensors in their place, and DeepSpeed fills them, so layers compute as ever. Outside
of one, for reports, masks, merging and saving, what follows gathers them: one layer at a time, and on all processes
together. DeepSpeed is known by the marks that it leaves on its parameters, and imported only once there are some.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds but a part of this tensor at the moment.

    Example:
        >>> is_sharded(torch.zeros(3))
        False
    """
    return hasattr(tensor, "full_tensor") or (
        is_partitioned(tensor) and _partition(tensor).ds_status.name != "AVAILABLE"
    )


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps a parameter, which is empty between forwards and must not be written to.

    Example:
        >>> is_partitioned(torch.zeros(3))
        False
    """
    return hasattr(tensor, "ds_status")


def _partition(parameter: Tensor) -> Any:
    return parameter  # with attributes that no type knows


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape that a tensor has on one process.

    Example:
        >>> whole_shape(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    return _partition(tensor).ds_shape if is_partitioned(tensor) else tensor.shape


def is_gathered_for_forward(module: nn.Module) -> bool:
    """Whether the parameters of a module are whole only while it runs, so that nothing of their size may be kept."""
    return is_copied_for_forward(module) or any(map(is_partitioned, module.parameters(recurse=False)))


def is_copied_for_forward(module: nn.Module) -> bool:
    """Whether FSDP puts copies in the place of a module's parameters while it runs, so that writes to them are lost."""
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
    if is_partitioned(tensor):
        with _gathered(tensor):
            return tensor.detach().clone()
    shard: Any = tensor
    # A shard that is offloaded to the host travels by its accelerator's network.
    return shard.to(shard.device_mesh.device_type).full_tensor()


def _gathered(parameter: Tensor, writer: int | None = None) -> AbstractContextManager[None]:
    """Within the block a partitioned parameter is whole; what the rank `writer` writes to it stays."""
    from deepspeed import zero  # an optional package

    return zero.GatheredParameters([parameter], modifier_rank=writer)


@torch.no_grad()
def copy_of(parameter: Tensor) -> Tensor:
    """What a parameter holds, on the CPU; of FSDP2's the shard.

    Moving copies, so the whole parameter of a model on the CPU is returned as it is, and must not be written.
    """
    if is_partitioned(parameter):
        return whole(parameter).to("cpu", copy=True)
    return parameter.detach().to("cpu", copy=is_sharded(parameter))


@torch.no_grad()
def replace_values(parameter: Tensor, values: Tensor) -> None:
    """Put other values in a parameter's place, without touching what it held unless it is sharded.

    Args:
        parameter: any shape; a sharded one is written in place, since FSDP holds its storage.
        values: of that shape and dtype, whole and alike on all processes, or sharded as the parameter is.
    """
    if is_partitioned(parameter):
        with _gathered(parameter, writer=0):
            parameter.copy_(values)
        return
    if not is_sharded(parameter):
        parameter.data = values
        return
    target: Any = parameter
    if not is_sharded(values):
        from torch.distributed.tensor import distribute_tensor  # absent from builds of torch without distribution

        values = distribute_tensor(values, target.device_mesh, target.placements)
    shard: Any = values
    target.to_local().copy_(shard.to_local())
