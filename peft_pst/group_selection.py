"""Selecting attention heads and feed-forward neurons: groups that lie in several matrices at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .architecture import Projections, find_heads, find_neurons
from .budget import Place, Ranked, most_pruned, shared_budget, split_budget
from .config import PSTConfig
from .coupling import CoupledGroups, group_masks, group_scores
from .layer import PSTLayer
from .masking import num_pruned, pack_mask, select_mask
from .patterns import Coupled, parse_pattern
from .plan import Change, Criterion


def couple(model: nn.Module, adapter_name: str, layers: Mapping[str, PSTLayer]) -> None:
    """Tell the layers of an adapter which heads or neurons of its pattern lie in them; all other layers stay dense.

    Args:
        model: the model whose layers they are.
        adapter_name: an adapter with one configuration on all of them.
        layers: by their paths in the model.

    Raises:
        ValueError: if the model has no such groups that are adapted, one is adapted in part, its matrices have
            different targets, or two lie in one matrix.
    """
    config = next(iter(layers.values())).pst_plans[adapter_name].config
    pattern = parse_pattern(config.pattern)
    if not isinstance(pattern, Coupled):
        return
    adapted = [groups for kind in pattern.kinds for groups in adapted_groups(_find(model, kind, config), layers)]
    for groups in adapted:
        targets = {name: layers[name].pst_plans[adapter_name].target_sparsity for name in groups.modules}
        if len(set(targets.values())) > 1:
            raise ValueError(
                f"The {groups.kind} of {groups.name} need one target sparsity, but sparsity_pattern gives "
                f"their matrices {targets}."
            )
    for name, layer in layers.items():
        own = [groups for groups in adapted if name in groups.modules]
        if len(own) > 1:
            places = " and the ".join(f"{groups.kind} of {groups.name}" for groups in own)
            raise ValueError(
                f"Layer {name} holds the {places}; a matrix can hold the groups of one place only. Name other "
                "projections, or prune one kind alone."
            )
        layer.pst_plans[adapter_name] = layer.pst_plans[adapter_name].coupled_by(own[0] if own else None, name)


def _find(model: nn.Module, kind: str, config: PSTConfig) -> list[CoupledGroups]:
    named = [
        Projections(tuple(one["inputs"]), one["output"], one.get("interleaved", False))
        for one in config.projections.get(kind, ())
    ] or None
    return find_heads(model, named) if kind == "heads" else find_neurons(model, named)


def adapted_groups(found: Sequence[CoupledGroups], layers: Mapping[str, PSTLayer]) -> list[CoupledGroups]:
    """The groups all of whose matrices are among these layers.

    Raises:
        ValueError: if there are none, or one has some of its matrices there but not all.
    """
    adapted = [groups for groups in found if any(name in layers for name in groups.modules)]
    for groups in adapted:
        missing = [name for name in groups.modules if name not in layers]
        if missing:
            raise ValueError(
                f"{missing} are not adapted, but the rest of the {groups.kind} of {groups.name} is; they can only be "
                "pruned as a whole. Add them to target_modules, or exclude the rest."
            )
    if not adapted:
        raise ValueError(
            f"None of the adapted layers holds {found[0].kind}; the model has those of {found[0].name} and others. Add "
            "their projections to target_modules."
        )
    return adapted


def entries(groups: CoupledGroups, module: str | None = None) -> int:
    """Weights of one group, in all matrices or in that of one module."""
    return sum(
        part.width * part.shape[1 - part.axis] for part in groups.parts if module is None or part.module == module
    )


def places(coupled: Sequence[CoupledGroups]) -> list[Place]:
    """How many groups lie where, and how large they are."""
    return [Place(groups.num_groups, entries(groups)) for groups in coupled]


def mean_scores(groups: CoupledGroups, layers: Mapping[str, PSTLayer], adapter_name: str, by: Criterion) -> Tensor:
    """Mean score of the weights of each group, (num_groups,).

    The scores of each matrix are divided by the root mean square of its base weights before they meet those of another.
    """
    sums = []
    for name in groups.modules:  # one at a time, since scores take the room of a matrix
        own = groups._replace(parts=tuple(part for part in groups.parts if part.module == name))
        layer = layers[name]
        sums.append(group_scores(own, {name: layer.get_importance(adapter_name, by) / layer.get_spread()}))
    return torch.stack([part.to(sums[0]) for part in sums]).sum(0) / entries(groups)


def select_groups(
    coupled: Sequence[CoupledGroups],
    layers: Mapping[str, PSTLayer],
    adapter_name: str,
    sparsity: float,
    by: Criterion = "scores",
) -> list[tuple[int, Tensor]]:
    """Which groups stay, for each of several kinds of place that share one budget of zeros.

    Args:
        coupled: where the groups lie; with one alone, exactly `num_pruned(num_groups, sparsity)` of it go.
        layers: by the names of their modules.
        adapter_name: whose scores decide.
        sparsity: fraction of the weights of all groups, in [0, 1).
        by: what is ranked.

    Returns:
        For each the number of groups that go, and which stay: boolean (num_groups,), True = keep.

    Raises:
        ValueError: if a score is NaN, or `min_kept` leaves no room for so many zeros.
    """
    scores = [mean_scores(groups, layers, adapter_name, by) for groups in coupled]
    config = layers[coupled[0].modules[0]].pst_plans[adapter_name].config
    counts = _counts(coupled, scores, sparsity, config.min_kept)
    return [(count, select_mask(own, count)) for own, count in zip(scores, counts, strict=True)]


def _counts(coupled: Sequence[CoupledGroups], scores: Sequence[Tensor], sparsity: float, min_kept: float) -> list[int]:
    if len(coupled) == 1:
        return [num_pruned(coupled[0].num_groups, sparsity)]
    ranked = [
        Ranked(
            partial(list, [own]),
            entries(groups),
            most_pruned(groups.num_groups, min_kept),
            f"The {groups.kind} of {groups.name}",
        )
        for groups, own in zip(coupled, scores, strict=True)
    ]
    return split_budget(ranked, shared_budget(places(coupled), sparsity))


def group_changes(groups: CoupledGroups, selected: tuple[int, Tensor]) -> Iterator[tuple[str, Change]]:
    """What a selection comes to for each matrix, by the name of its module."""
    pruned, keep = selected
    for name, mask in group_masks(groups, keep).items():
        yield name, Change((pruned * entries(groups, name),), pack_mask(mask))
