"""Weights that several modules share, such as the embeddings and the output layer of a language model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def shared_weights(model: nn.Module) -> dict[tuple[nn.Module, str], list[str]]:
    """Which parameters of a model are used in more than one place, so that a mask on one would prune the others.

    Args:
        model: any module.

    Returns:
        By module and name of the parameter within it: the full names of all parameters that are the same tensor or lie
        in the same memory, in part or as a whole, or of all places where the module stands. Parameters that are a
        module's alone are left out.

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
    users: defaultdict[Place, list[tuple[nn.Module, str]]] = defaultdict(list)
    stored: dict[Place, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = _place(parameter)
            users[place].append((module, name))
            stored.setdefault(place, parameter)
    shared: dict[tuple[nn.Module, str], list[str]] = {}
    for together in _overlapping(stored):
        using = [user for place in together for user in users[place]]
        places = [f"{path}.{name}" for module, name in using for path in stands[module]]
        if len(places) > 1:
            shared |= dict.fromkeys(using, places)
    return shared


Place = tuple[str, int, int, int]  # device, first byte, the byte behind the last, and number of elements


def _place(tensor: Tensor) -> Place:
    """What two parameters that are one tensor, or lie in the same memory, have in common."""
    if is_lazy(tensor) or tensor.is_meta or type(tensor.data) is not Tensor or not tensor.numel():
        return ("", id(tensor), id(tensor), 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return (str(tensor.device), start, start + (last + 1) * tensor.element_size(), tensor.numel())


def _overlapping(stored: Mapping[Place, Tensor]) -> list[list[Place]]:
    """Places, in their order, those together that have memory in common, be it by way of others."""
    together = {place: [place] for place in stored}
    before: list[Place] = []  # what begins earlier, and may reach into what comes
    for place in sorted(place for place in stored if place[0]):
        before = [other for other in before if other[0] == place[0] and other[2] > place[1]]
        for other in before:
            if together[other] is not together[place] and _have_common_bytes(stored[other], stored[place]):
                together[other] += together[place]
                together |= dict.fromkeys(together[other], together[other])
        before.append(place)
    order = {place: number for number, place in enumerate(stored)}
    groups = {id(group): sorted(group, key=order.__getitem__) for group in together.values()}
    return sorted(groups.values(), key=lambda group: order[group[0]])


def _have_common_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose extents overlap do themselves; views of alternate columns, say, do not."""
    size, start = one.element_size(), min(one.data_ptr(), other.data_ptr())
    is_dense = all((_place(each)[2] - each.data_ptr()) == each.numel() * each.element_size() for each in (one, other))
    if is_dense or other.element_size() != size or (one.data_ptr() - other.data_ptr()) % size:
        return True
    end = max(_place(one)[2], _place(other)[2])
    touched = torch.zeros((end - start) // size, dtype=torch.bool)
    views = [touched.as_strided(each.shape, each.stride(), (each.data_ptr() - start) // size) for each in (one, other)]
    views[0].fill_(True)
    return bool(views[1].any())


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but the outermost, as often as some other one holds it."""
    for path, holder in model.named_modules():
        for name, child in holder._modules.items():
            if child is not None:
                yield f"{path}.{name}".lstrip("."), child
