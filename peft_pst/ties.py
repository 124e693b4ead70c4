"""Weights that several modules share, such as the embeddings and the output layer of a language model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def shared_weights(model: nn.Module) -> dict[tuple[nn.Module, str], list[str]]:
    """Which parameters of a model are used in more than one place, so that a mask on one would prune the others.

    Args:
        model: any module.

    Returns:
        By module and name of the parameter within it: the full names of all parameters that are the same tensor or lie
        in the same memory, or of all places where the module stands. Parameters that are a module's alone are left out.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        >>> shared_weights(model)
        {}
        >>> model[1].weight = model[0].weight
        >>> shared_weights(model)[model[0], "weight"]
        ['0.weight', '1.weight']
    """
    stands: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for path, child in _children(model):
        stands[child].append(path)
    uses: defaultdict[object, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses[_place(parameter)].append((module, name))
    shared: dict[tuple[nn.Module, str], list[str]] = {}
    for users in uses.values():
        places = [f"{path}.{name}" for module, name in users for path in stands[module]]
        if len(places) > 1:
            shared |= dict.fromkeys(users, places)
    return shared


def _place(tensor: Tensor) -> object:
    """What two parameters that share their memory have in common."""
    if is_lazy(tensor) or tensor.is_meta or type(tensor.data) is not Tensor or not tensor.numel():
        return id(tensor)
    return (tensor.data_ptr(), tensor.numel())


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but the outermost, as often as some other one holds it."""
    for path, holder in model.named_modules():
        for name, child in holder._modules.items():
            if child is not None:
                yield f"{path}.{name}".lstrip("."), child
