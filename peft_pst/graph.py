"""The one step that `torch.compile` must not look into: selecting a mask, which is kept from call to call.

A selection depends on counters of in-place writes, on NumPy (on the CPU) and on a cache, none of which can be traced.
As an opaque operation it neither breaks the graph nor is compiled anew when the sparsity moves.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import PSTLayer

_handles = itertools.count()
_layers: weakref.WeakValueDictionary[int, PSTLayer] = weakref.WeakValueDictionary()


def register_layer(layer: PSTLayer) -> int:
    """A number by which a compiled graph, which holds only tensors and numbers, finds the layer again."""
    handle = next(_handles)
    _layers[handle] = layer
    return handle


@torch.library.custom_op("peft_pst::packed_mask", mutates_args=())
def traced_packed_mask(origin: Sequence[Tensor], handle: int, adapter_name: str) -> Tensor:
    """The packed mask now in force; `origin` are the tensors it depends on, so that the graph keeps the order."""
    # A graph may reuse the memory of what an operation returns, so it must not get the kept tensor itself.
    return _layers[handle].get_packed_mask(adapter_name).clone()


@traced_packed_mask.register_fake
def _(origin: Sequence[Tensor], handle: int, adapter_name: str) -> Tensor:
    return origin[0].new_empty(((_layers[handle].num_weights + 7) // 8,), dtype=torch.uint8)
