"""Whether tensors have changed since something was made from them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def fingerprint(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """A value that differs from an earlier one when a tensor was replaced or written, or an optimizer has stepped.

    Writes in place are noticed by PyTorch's own counter. Fused optimizers, the `Trainer`'s default among them, and
    those that write through raw pointers do not move it, hence the count of steps. What neither sees is a write
    through `tensor.data` outside an optimizer, or to a tensor made in inference mode.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> before = fingerprint([weight])
        >>> _ = weight.add_(1)
        >>> fingerprint([weight]) == before
        False
    """
    return optimizer_steps(), *(identity(tensor) for tensor in tensors)


def identity(tensor: Tensor) -> tuple[int, int, int]:
    """Which tensor, where, and how often written in place as far as PyTorch counts."""
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version


def optimizer_steps() -> int:
    """How often any optimizer has stepped since this was first called."""
    _watch_optimizers()
    return _optimizer_steps


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
