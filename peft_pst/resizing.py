"""Which settings of a configuration say how many heads or neurons the layers of a model have, found out by trying."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .coupling import CoupledGroups, Kind

Lines = dict[tuple[str, int], Tensor]  # (name of a tensor, dimension): boolean, which rows or columns stay

_OPEN_BY_DEFAULT = ("n_inner",)  # numbers of neurons that a configuration may leave to the model
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTH = "head_dim"


@dataclass(frozen=True, eq=False)  # told apart by identity
class Resizing:
    """Settings that together say how many groups some layers have.

    Attributes:
        path: where the settings are: names of nested configurations, outermost first.
        units: {setting: what it counts for one group}, such as {"num_attention_heads": 4, "num_key_value_heads": 1}.
        fixed: {setting: value} of settings that have to be written out, because the model would derive them anew.
        governed: the layers in question, all of as many groups.
    """

    path: tuple[str, ...]
    units: Mapping[str, int]
    fixed: Mapping[str, int] = field(default_factory=dict)
    governed: tuple[CoupledGroups, ...] = ()

    def apply(self, config: PretrainedConfig, num_groups: int) -> None:
        """Write the settings for a number of groups into the configuration of a model."""
        owner = dict(nested_configs(config))[self.path]
        for name, unit in self.units.items():
            setattr(owner, name, unit * num_groups)
        for name, value in self.fixed.items():
            setattr(owner, name, value)

    def values(self, config: PretrainedConfig) -> dict[str, int | None]:
        """What the settings are, by their names with those of the configurations they are in."""
        owner = dict(nested_configs(config))[self.path]
        return {".".join((*self.path, name)): getattr(owner, name, None) for name in (*self.units, *self.fixed)}


def find_resizings(
    model: PreTrainedModel, groups: Sequence[CoupledGroups]
) -> tuple[list[Resizing], list[CoupledGroups]]:
    """The settings that govern the numbers of these groups, and the groups that none governs alone.

    A setting counts if a model without data, built from a changed configuration that went through JSON, differs from
    the present one in exactly the matrices of these groups, by the right numbers.

    Args:
        model: a transformers model.
        groups: heads or neurons of its layers, each layer once.

    Returns:
        The settings, each with the layers it governs, and the remaining layers.
    """
    before = _shapes(type(model), model.config)
    found: list[Resizing] = []
    remaining = list(groups)
    for kind, num_groups, width in dict.fromkeys((g.kind, g.num_groups, g.parts[-1].width) for g in groups):
        for resizing in _candidates(model.config, kind, num_groups, width):
            alike = [g for g in remaining if (g.kind, g.num_groups) == (kind, num_groups)]
            governed = _governed(model, before, resizing, alike)
            if governed:
                found.append(Resizing(resizing.path, resizing.units, resizing.fixed, governed))
                remaining = [g for g in remaining if g not in governed]
    return found, remaining


def resized_config(model: PreTrainedModel, numbers: Mapping[Resizing, int]) -> PretrainedConfig:
    """A copy of the configuration with other numbers of groups, as it comes back from a saved checkpoint.

    Raises:
        ValueError: and whatever else a configuration's own checks raise, if it refuses the numbers.
    """
    config = copy.deepcopy(model.config)
    for resizing, number in numbers.items():
        resizing.apply(config, number)
    config = type(config).from_dict(json.loads(config.to_json_string()))
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    return config


def can_be_built(model: PreTrainedModel, numbers: Mapping[Resizing, int]) -> bool:
    """Whether the model's class takes these numbers, and makes exactly the matrices of these numbers of groups."""
    expected = _shapes(type(model), model.config)
    for resizing, number in numbers.items():
        for groups in resizing.governed:
            _cut_shapes(expected, lines_kept(model, groups, torch.arange(groups.num_groups) < number))
    return _shapes_if_valid(model, numbers) == expected


def lines_kept(model: nn.Module, groups: CoupledGroups, keep: Tensor) -> Lines:
    """Which rows and columns of the model's tensors stay when some groups are cut out.

    Args:
        model: the model that the groups were found in, plain.
        groups: heads or neurons of one layer.
        keep: boolean (num_groups,), on the CPU, True = stays.
    """
    lines: Lines = {}
    for part in groups.parts:
        matrix = model.get_submodule(part.module)
        stored_axis = 1 - part.axis if isinstance(matrix, Conv1D) else part.axis
        places = [(f"{part.module}.weight", stored_axis)]
        if part.axis == 0 and matrix.bias is not None:
            places.append((f"{part.module}.bias", 0))
        for place in places:
            own = lines.setdefault(place, torch.ones(part.shape[part.axis], dtype=torch.bool))
            stays = own.narrow(0, part.start, groups.num_groups * part.width)
            stays &= keep.repeat_interleave(part.width)
    bias = position_bias(model, groups)
    if bias is not None:
        per_group = bias.embedding_dim // groups.num_groups
        lines[f"{groups.name}.relative_attention_bias.weight", 1] = keep.repeat_interleave(per_group)
    return lines


def position_bias(model: nn.Module, groups: CoupledGroups) -> nn.Embedding | None:
    """T5's learned number for each head and distance, where this attention layer has it."""
    owner = model.get_submodule(groups.name)
    bias = getattr(owner, "relative_attention_bias", None) if groups.kind == "heads" else None
    return bias if isinstance(bias, nn.Embedding) else None


def nested_configs(config: PretrainedConfig) -> Iterator[tuple[tuple[str, ...], PretrainedConfig]]:
    """A configuration and those inside it, such as that of the text part, each with the names that lead to it."""
    yield (), config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            yield from (((name, *path), nested) for path, nested in nested_configs(inner))


def _candidates(config: PretrainedConfig, kind: Kind, num_groups: int, width: int) -> Iterator[Resizing]:
    for path, nested in nested_configs(config):
        values = nested.to_dict()
        counts = {name: value for name, value in values.items() if isinstance(value, int) and value is not True}
        if kind == "neurons":
            yield from (Resizing(path, {name: 1}) for name, value in counts.items() if value == num_groups)
            yield from (Resizing(path, {name: 1}) for name in _OPEN_BY_DEFAULT if values.get(name, 0) is None)
            continue
        shared = {name: 1 for name in _KEY_VALUE_HEADS if values.get(name) == num_groups}
        for name, value in counts.items():
            if "head" in name and name not in shared and value and value % num_groups == 0:
                queries = value // num_groups
                for fixed in ({}, {_HEAD_WIDTH: width // queries}):
                    yield Resizing(path, {name: queries, **shared}, fixed)


def _governed(
    model: PreTrainedModel, before: Mapping[str, list[int]], resizing: Resizing, groups: Sequence[CoupledGroups]
) -> tuple[CoupledGroups, ...]:
    """The layers whose numbers the settings change; none if they change anything else."""
    for number in (1, groups[0].num_groups - 1) if groups else ():
        after = _shapes_if_valid(model, {resizing: number}) if number else None
        if after is None or after.keys() != before.keys():
            continue
        changed = {name for name in before if after[name] != before[name]}
        governed, explained = [], set()
        for group in groups:
            expected = {name: list(shape) for name, shape in before.items()}
            lines = lines_kept(model, group, torch.arange(group.num_groups) < number)
            _cut_shapes(expected, lines)
            if all(after[name] == expected[name] for name, _ in lines):
                governed.append(group)
                explained |= {name for name, _ in lines}
        return tuple(governed) if changed and changed <= explained else ()
    return ()


def _cut_shapes(shapes: dict[str, list[int]], lines: Lines) -> None:
    for (name, dim), stays in lines.items():
        shapes[name][dim] = int(stays.sum())


def _shapes_if_valid(model: PreTrainedModel, numbers: Mapping[Resizing, int]) -> dict[str, list[int]] | None:
    try:
        return _shapes(type(model), resized_config(model, numbers))
    except Exception:  # whatever a configuration or a constructor raises means that it does not take these numbers
        return None


def _shapes(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        state = model_class(config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}
