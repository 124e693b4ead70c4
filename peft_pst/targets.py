"""Which layers are adapted when the user names none."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .embedding import is_plain_embedding
from .layer import PSTLayer
from .linear import is_linear
from .ties import shared_weights


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
    inside: dict[str, str] = {}  # name of each linear layer in a block: its name relative to that block
    outside: list[str] = []
    for name, module in _without_adapter_internals(model):
        # The outermost block: experts are blocks within blocks, and belong to the layer that holds them.
        block = min((block for block in blocks if name.startswith(block)), key=len, default=None)
        parent = model.get_submodule(name.rpartition(".")[0])
        if block is not None and is_linear(_base_of(module), parent):
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


def _without_adapter_internals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    adapted: list[str] = []
    for name, module in model.named_modules():
        if not name.startswith(tuple(adapted)):
            yield name, module
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{name}.")


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
