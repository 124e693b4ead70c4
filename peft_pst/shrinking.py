"""Removing heads and neurons that do nothing: smaller matrices, under a configuration that stock transformers read."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .answers import check_same_answers, made_up_inputs
from .architecture import find_groups
from .coupling import CoupledGroups, Part, group_scores
from .resizing import Resizing, can_be_built, find_resizings, lines_kept, nested_configs, position_bias, resized_config
from .tables import by_kind, draw_table

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")


@dataclass(frozen=True)
class ShrunkLayer:
    """How many heads or neurons one layer had and has.

    Attributes:
        name: what the paths of its projections have in common.
        kind: "heads" or "neurons"; heads that share keys and values count once.
        before: how many there were.
        in_use: how many of them do anything.
        after: how many there are; what is in use, and so many zeros that all layers under one setting have as many.
    """

    name: str
    kind: str
    before: int
    in_use: int
    after: int


@dataclass(frozen=True)
class ShrinkReport:
    """What was removed.

    Attributes:
        layers: every attention layer and feed-forward that was looked at.
        settings: {setting of the configuration: (value before, value after)}.
        parameters_before: number of parameters of the model before.
        parameters_after: and after.
    """

    layers: tuple[ShrunkLayer, ...]
    settings: Mapping[str, tuple[int | None, int | None]]
    parameters_before: int
    parameters_after: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    def to_table(self) -> str:
        """A table for the terminal: one line for each kind of layer, then the settings that changed."""
        rows = []
        for name, layers in by_kind(self.layers):
            columns = [[getattr(layer, column) for layer in layers] for column in ("before", "in_use", "after")]
            rows.append((name, layers[0].kind, f"{len(layers):,}", *map(_span, columns)))
        footer = ("parameters", "", "", f"{self.parameters_before:,}", "", f"{self.parameters_after:,}")
        table = draw_table(("layers", "", "number", "before", "in use", "after"), rows, footer, left=(0, 1))
        return "\n".join([*table, "", *(f"{name}: {old} -> {new}" for name, (old, new) in self.settings.items())])


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def shrink(
    model: PreTrainedModel,
    groups: Sequence[CoupledGroups] | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, ShrinkReport]:
    """Remove the attention heads and feed-forward neurons that do nothing, and give the same answers.

    A head or neuron does nothing where the matrix that reads it has only zeros in its columns, whatever the biases.
    Rows of zeros are enough too if there is no bias on them: all that make a value, or that make a neuron (or one
    factor of a gated one) whose activation is zero at zero.

    A configuration has one number for all layers, so that all keep as many as the one that uses most, or the next
    larger number that the configuration takes; the rest of what they keep are zeros.

    Args:
        model: a plain transformers model with exact zeros, as `merge_and_unload` returns it. It stays as it is.
        groups: which heads and neurons to look at; by default all that `find_heads` and `find_neurons` know.
        inputs: a batch for the model's forward, on which the answers of both models are compared; by default made up
            for models that read tokens or pixels.

    Returns:
        A model of the same class with a changed configuration, which `save_pretrained` writes for the stock
        `from_pretrained`; and what was removed. Heads that share keys and values are removed together.

    Raises:
        ValueError: if nothing can be removed, a part of what does nothing cannot be removed by any setting of the
            configuration, the model still has adapters, or `inputs` is needed.
        RuntimeError: if the answers differ by more than rounding.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 6}
        >>> model = LlamaModel(LlamaConfig(vocab_size=9, **shape))
        >>> with torch.no_grad():
        ...     _ = model.layers[0].mlp.down_proj.weight[:, [1, 4]] = 0.0
        >>> small, report = shrink(model)
        >>> small.layers[0].mlp.down_proj.weight.shape, report.settings
        (torch.Size([8, 4]), {'intermediate_size': (6, 4)})
    """
    _check_plain(model)
    groups = find_groups(model) if groups is None else groups
    in_use = {group: groups_in_use(model, group) for group in groups}
    if all(used.all() for used in in_use.values()):
        raise ValueError(
            f"Every head and neuron of {len(in_use)} layers is in use, so there is nothing to remove. Zeros here and "
            "there cannot be; prune whole heads or neurons."
        )
    kinds = {group.kind for group, used in in_use.items() if not used.all()}
    resizings, ungoverned = find_resizings(model, [group for group in groups if group.kind in kinds])
    _check_governed(model, ungoverned, in_use)
    keep = _chosen(model, resizings, in_use)
    lowered = [resizing for resizing in resizings if not keep[resizing.governed[0]].all()]
    small = _rebuilt(model, {resizing: int(keep[resizing.governed[0]].sum()) for resizing in lowered}, keep)
    check_same_answers(model, small, made_up_inputs(model) if inputs is None else inputs)
    return small, _report(model, small, lowered, in_use, keep)


def groups_in_use(model: PreTrainedModel, groups: CoupledGroups) -> Tensor:
    """Which heads or neurons of a plain model can change its answers; see `shrink`.

    Returns:
        Boolean (num_groups,), on the CPU.
    """
    *inputs, reader = groups.parts
    used = _any_nonzero(model, groups, reader)
    # One matrix with all rows of a head together does not tell which of them make its value.
    values = inputs[2:] if groups.kind == "heads" else []
    factors = inputs if groups.kind == "neurons" and _is_zero_at_zero(model) else []
    for part in (*values, *factors):
        used &= _any_nonzero(model, groups, part)
    return used


def _any_nonzero(model: nn.Module, groups: CoupledGroups, part: Part) -> Tensor:
    """Whether a group has anything but zeros in one part, the bias on its rows included; boolean (num_groups,)."""
    module = model.get_submodule(part.module)
    weight: Any = module.weight
    nonzero = {part.module: (weight.T if isinstance(module, Conv1D) else weight) != 0}
    alone = groups._replace(parts=(part,))
    found = group_scores(alone, nonzero) > 0
    if part.axis == 0 and isinstance(module.bias, Tensor):
        found |= (module.bias != 0).narrow(0, part.start, groups.num_groups * part.width).view(-1, part.width).any(1)
    return found.cpu()


def _is_zero_at_zero(model: PreTrainedModel) -> bool:
    """Whether the activation of the feed-forwards is known, and zero at zero."""
    configs = [config for _, config in nested_configs(model.config)]
    names = {getattr(config, name, None) for config in configs for name in _ACTIVATIONS}
    known = [ACT2FN[name] for name in names if isinstance(name, str) and name in ACT2FN]
    return bool(known) and all(float(activation(torch.zeros(1))) == 0 for activation in known)


def _check_plain(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is no plain transformers model; merge the adapter first, with "
            "model.merge_and_unload(), or pass the model inside."
        )


def _check_governed(
    model: PreTrainedModel, ungoverned: Iterable[CoupledGroups], in_use: Mapping[CoupledGroups, Tensor]
) -> None:
    for group in ungoverned:
        idle = int((~in_use[group]).sum())
        if idle:
            other = "neurons" if group.kind == "heads" else "heads"
            raise ValueError(
                f"{group.name}: {idle} of {group.num_groups} {group.kind} do nothing, but no setting of "
                f"{type(model.config).__name__} changes their number and nothing else, so they have to stay as zeros. "
                "(Where a head is as wide as the hidden size divided by the number of heads, fewer heads are wider.) "
                f"Shrink the {other} alone: shrink(model, find_{other}(model)), or --only {other} on the command line."
            )


def _chosen(
    model: PreTrainedModel, resizings: Sequence[Resizing], in_use: Mapping[CoupledGroups, Tensor]
) -> dict[CoupledGroups, Tensor]:
    """For every layer under a setting, which groups to keep: all in use, and zeros up to a number for all layers."""
    keep: dict[CoupledGroups, Tensor] = {}
    for resizing in resizings:
        needed = [torch.stack([in_use[group] for group in unit]).any(0) for unit in _aligned(model, resizing.governed)]
        total, largest = needed[0].numel(), max(1, *(int(used.sum()) for used in needed))
        number = next(n for n in range(largest, total + 1) if n == total or can_be_built(model, {resizing: n}))
        for unit, used in zip(_aligned(model, resizing.governed), needed, strict=True):
            keep |= dict.fromkeys(unit, _filled(used, number))
    if all(kept.all() for kept in keep.values()):
        raise ValueError(
            f"Some heads or neurons do nothing, but {type(model.config).__name__} has one number for many layers, and "
            "one of these uses all of its own, so that the number cannot be lowered. Prune every layer."
        )
    return keep


def _filled(used: Tensor, number: int) -> Tensor:
    """All that are in use, and the first of the others, so that there are `number` of them."""
    order = torch.argsort(~used, stable=True)
    keep = torch.zeros_like(used)
    keep[order[:number]] = True
    return keep


def _aligned(model: nn.Module, groups: Sequence[CoupledGroups]) -> list[list[CoupledGroups]]:
    """Layers that have to keep the same heads: those that read T5's position bias from the first of them."""
    stacks: dict[str, list[CoupledGroups]] = {}
    for group in groups:
        stacks.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    units = []
    for stack in stacks.values():
        with_bias = [position_bias(model, group) is not None for group in stack]
        units += [stack] if any(with_bias) and not all(with_bias) else [[group] for group in stack]
    return units


def _rebuilt(
    model: PreTrainedModel, numbers: Mapping[Resizing, int], keep: Mapping[CoupledGroups, Tensor]
) -> PreTrainedModel:
    """A model of the smaller sizes with the weights that stay."""
    config, state = resized_config(model, numbers), dict(model.state_dict())
    cut = {place: stays for group, kept in keep.items() for place, stays in lines_kept(model, group, kept).items()}
    for (name, dim), stays in cut.items():
        state[name] = state[name].index_select(dim, stays.nonzero().squeeze(1).to(state[name].device))
    loaded: Any = type(model).from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.clone() for name, tensor in state.items()},
        dtype=model.dtype,
        output_loading_info=True,
    )
    small, info = loaded
    _drop_absent(small, model)
    lost = [name for name in info["missing_keys"] if name in small.state_dict()]
    wrong = [*lost, *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{type(model).__name__} does not build this model from its configuration: {wrong[0]} does not fit. Shrink "
            "the model as it was loaded, before replacing modules of it."
        )
    if hasattr(model, "generation_config"):
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(model.device).train(model.training)


def _drop_absent(small: nn.Module, model: nn.Module) -> None:
    """Leave out what the model was made without, such as a pooler, which no configuration tells."""
    for name, child in small._modules.items():
        counterpart = model._modules.get(name)
        if counterpart is None:
            small._modules[name] = None
        elif child is not None:
            _drop_absent(child, counterpart)


def _report(
    model: PreTrainedModel,
    small: PreTrainedModel,
    resizings: Iterable[Resizing],
    in_use: Mapping[CoupledGroups, Tensor],
    keep: Mapping[CoupledGroups, Tensor],
) -> ShrinkReport:
    layers = [
        ShrunkLayer(
            group.name,
            group.kind,
            group.num_groups,
            int(used.sum()),
            int(keep[group].sum()) if group in keep else group.num_groups,
        )
        for group, used in in_use.items()
    ]
    settings: dict[str, tuple[int | None, int | None]] = {}
    for resizing in resizings:
        old, new = resizing.values(model.config), resizing.values(small.config)
        settings |= {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    return ShrinkReport(tuple(layers), settings, model.num_parameters(), small.num_parameters())
