"""Which layers are adapted when the user names none."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


def find_block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers inside a model's numbered blocks, such as the layers of a transformer.

    A block is an entry of an `nn.ModuleList`; embeddings, poolers and heads lie outside. The rule reads the structure
    of the model and knows no architecture by name.

    Args:
        model: any module; layers that carry an adapter already are counted under their own name.

    Returns:
        Sorted suffixes relative to the block ("attention.self.query"), when these mean the block's layers and no
        other; full names otherwise. Both can be used as `target_modules`. Empty when there are no such layers.

    Example:
        >>> block = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(4, 2)})
        >>> find_block_linears(model)
        ['down', 'up']
    """
    blocks = [
        f"{name}.{index}." if name else f"{index}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    ]
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, (nn.Linear, Conv1D))
        and not name.startswith(adapted or "\0")
    ]
    # The outermost block: experts are blocks within blocks, and belong to the layer that holds them.
    inside = {
        name: min((block for block in blocks if name.startswith(block)), key=len)
        for name in linears
        if any(name.startswith(block) for block in blocks)
    }
    suffixes = {re.sub(r"(^|\.)\d+(?=\.)", r"\1\\d+", name.removeprefix(block)) for name, block in inside.items()}
    outside = set(linears) - set(inside)
    usable = not any("\\d" in suffix for suffix in suffixes) and not any(
        name == suffix or name.endswith(f".{suffix}") for name in outside for suffix in suffixes
    )
    return sorted(suffixes if usable else inside)
