"""Which layers are adapted when the user names none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .embedding import is_plain_embedding
from .layer import PSTLayer
from .linear import is_linear
from .sharding import whole_shape
from .ties import shared_weights


def find_block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers inside a model's numbered blocks, such as the layers of a transformer.

    A block is an entry of an `nn.ModuleList`; embeddings, poolers and heads lie outside. Routers of mixtures of experts
    are left out: they are small, and decide which experts run. The rule reads the structure of the model and knows no
    architecture by name.

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
    inside: dict[str, str] = {}  # name of each linear layer in a block: its name relative to that block
    outside: list[str] = []
    for name, module in _without_adapter_internals(model):
        # The outermost block: experts are blocks within blocks, and belong to the layer that holds them.
        block = min((block for block in blocks if name.startswith(block)), key=len, default=None)
        parent = model.get_submodule(name.rpartition(".")[0])
        if block is not None and is_linear(_base_of(module), parent) and not _is_router(model, block, name):
            inside[name] = name.removeprefix(block)
        else:
            outside.append(name)
    suffixes = set(inside.values())
    ambiguous = any(f".{name}".endswith(f".{suffix}") for name in outside for suffix in suffixes)
    return sorted(inside if ambiguous else suffixes)


def find_token_embeddings(model: nn.Module) -> list[str]:
    """Names of the token embeddings that may be updated: those whose weight and whose lookup are nobody else's.

    Args:
        model: any module; only one that names its input embeddings, as transformers' models do, can have some.

    Returns:
        The full name, alone; empty where the embeddings are tied to an output layer, look their rows up in a way of
        their own (scaled, renormalised, with a sparse gradient), or are no table of tokens.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=32)
        >>> find_token_embeddings(BertModel(BertConfig(**sizes)))
        ['embeddings.word_embeddings']
    """
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    names = [name for name, module in model.named_modules() if module is found]
    base = _base_of(found) if isinstance(found, nn.Module) and not isinstance(found, PSTLayer) else None
    is_own = is_plain_embedding(base) and (base, "weight") not in shared_weights(model)
    return names if is_own else []


def _is_router(model: nn.Module, block: str, name: str) -> bool:
    """Whether a linear in a block chooses experts: it says so, or has an output for each of those that stand beside it.

    They stand beside it, or beside what holds it.
    """
    path = name.split(".")
    if "router" in name.removeprefix(block):
        return True
    linear: Any = _base_of(model.get_submodule(name))
    outputs = linear.nf if isinstance(linear, Conv1D) else linear.out_features
    for depth in (len(path) - 1, len(path) - 2):
        holder = model.get_submodule(".".join(path[:depth]))
        if isinstance(holder, nn.ModuleList):
            break  # what stands there are blocks
        if any(_num_experts(_base_of(child)) == outputs for at, child in holder.named_children() if at != path[depth]):
            return True
    return False


def _num_experts(module: nn.Module) -> int:
    """How many experts a module may be the store of; 0 if it is none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    stacks = [whole_shape(own)[0] for own in module.parameters(recurse=False) if len(whole_shape(own)) == 3]
    return 0 if isinstance(module, nn.modules.conv._ConvNd) else next(iter(stacks), 0)


def _without_adapter_internals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    adapted: list[str] = []
    for name, module in model.named_modules():
        if not name.startswith(tuple(adapted)):
            yield name, module
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{name}.")


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
