"""Triton kernels for CUDA: the package's heaviest functions again, each in as few passes over memory as it needs.

The pure torch functions stay the reference and the way elsewhere. A function that has a kernel asks `available` and
imports the module only then, so that neither Triton nor a GPU is needed to import the package.

Set the environment variable PEFT_PST_TRITON=0 to do without the kernels.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 2**31 - 2**24  # positions are 32-bit integers, rounded up to whole tiles of every program


def available(tensor: Tensor) -> bool:
    """Whether the kernels can take the place of torch's operations on a matrix like this one.

    That is so for float32, bfloat16 and float16 on an NVIDIA GPU of compute capability 8.0 or later, where Triton is
    installed; not while `torch.compile` traces, which fuses the torch operations itself, nor for subclasses of tensors,
    whose data may be elsewhere.

    Example:
        >>> available(torch.zeros(2, 3))
        False
    """
    return (
        not torch.compiler.is_compiling()
        and tensor.is_cuda
        and tensor.dtype in SUPPORTED
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and 0 < tensor.numel() <= _LARGEST
        and _span(tensor) <= _LARGEST
        and os.environ.get("PEFT_PST_TRITON") != "0"
        and _device_supports(tensor.device)
    )


def _span(tensor: Tensor) -> int:
    """How far apart in memory the first and the last entry lie, which may be more than there are entries."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@cache
def _device_supports(device: torch.device) -> bool:
    on_nvidia = torch.version.hip is None and find_spec("triton") is not None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
