"""What is selected at once: the mask of one matrix, or the masks of all that share a target or a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import group_selection, scope
from .budget import check_reachable, shared_reach
from .coupling import CoupledGroups
from .group_selection import group_changes, select_groups
from .masking import num_pruned
from .plan import Change, Criterion, LayerPlan
from .scope import Pair, shared_counts


@dataclass(frozen=True)
class Unit:
    """Layers, each with an adapter on it, that are brought to a sparsity together; here, of one layer.

    Attributes:
        pairs: the layers, at least one, each once.
        sparsity: fraction of zeros over all of them, in [0, 1).
    """

    pairs: tuple[Pair, ...]
    sparsity: float

    @property
    def plan(self) -> LayerPlan:
        """That of the first layer, which the others agree with in what concerns the selection."""
        layer, name = self.pairs[0]
        return layer.pst_plans[name]

    @property
    def reach(self) -> range:
        """Numbers of zeros that the sparsity may come to: more than one where whole groups share a budget.

        Which one it is depends on the scores, so a number within reach may be a group short of what they now give.
        """
        return _exactly(sum(sum(layer.counts_at(name, self.sparsity)) for layer, name in self.pairs))

    @property
    def in_force(self) -> int:
        """Zeros now in force."""
        return sum(layer.get_num_pruned(name) for layer, name in self.pairs)

    def check(self) -> None:
        """Refuse a sparsity that cannot be reached, before anything is trained for it.

        Raises:
            ValueError: if it cannot.
        """

    def prepare(self, by: Criterion = "scores") -> list[tuple[*Pair, Change]]:
        """What the sparsity comes to for each layer. Changes nothing.

        Raises:
            ValueError: if the scores cannot be ranked, or the pattern allows no such sparsity.
            RuntimeError: while an adapter is merged.
        """
        return [(layer, name, layer.prepare_sparsity(name, self.sparsity, by)) for layer, name in self.pairs]


class SharedUnit(Unit):
    """All matrices that have one target together."""

    @property
    def reach(self) -> range:
        budgeted = shared_reach(scope.places(self.pairs), self.sparsity)
        # Zeros that stay whatever the scores may come on top of the budget.
        kept_zeros = sum(sum(layer.counts_at(name, 0.0)) for layer, name in self.pairs)
        return range(budgeted.start, budgeted.stop + kept_zeros)

    def check(self) -> None:
        check_reachable(scope.places(self.pairs), self.sparsity, self.plan.config.min_kept, "matrices")

    def prepare(self, by: Criterion = "scores") -> list[tuple[*Pair, Change]]:
        counts = shared_counts(self.pairs, self.sparsity, by)
        return [
            (layer, name, layer.prepare_counts(name, layer.with_kept_zeros(name, own), by))
            for (layer, name), own in zip(self.pairs, counts, strict=True)
        ]


@dataclass(frozen=True)
class GroupUnit(Unit):
    """All matrices of one attention layer or feed-forward, or, if they have one target together, of all of a kind.

    Attributes:
        coupled: the groups that lie in them.
    """

    coupled: tuple[CoupledGroups, ...]

    @property
    def reach(self) -> range:
        places = group_selection.places(self.coupled)
        if len(places) > 1:
            return shared_reach(places, self.sparsity)
        return _exactly(num_pruned(places[0].groups, self.sparsity) * places[0].size)

    def check(self) -> None:
        if len(self.coupled) > 1:
            places, kind = group_selection.places(self.coupled), self.coupled[0].kind
            check_reachable(places, self.sparsity, self.plan.config.min_kept, kind)

    def prepare(self, by: Criterion = "scores") -> list[tuple[*Pair, Change]]:
        adapter_name = self.pairs[0][1]
        layers = {layer.module_name: layer for layer, _ in self.pairs}
        for layer, name in self.pairs:
            layer.check_unmerged(name)
        selected = select_groups(self.coupled, layers, adapter_name, self.sparsity, by)
        changes = (group_changes(*chosen) for chosen in zip(self.coupled, selected, strict=True))
        return [(layers[module], adapter_name, change) for each in changes for module, change in each]


def _exactly(count: int) -> range:
    return range(count, count + 1)


def units(planned: Iterable[tuple[*Pair, float]]) -> Iterator[Unit]:
    """Put layers together that are selected at once, given each with an adapter and its sparsity.

    Where a pattern couples matrices, those in which none of its groups lie stay dense, whatever their sparsity.
    """
    shared: defaultdict[str, list[Pair]] = defaultdict(list)
    coupled: defaultdict[tuple[str, ...], list[tuple[Pair, CoupledGroups]]] = defaultdict(list)
    sparsities: dict[object, float] = {}
    for layer, name, sparsity in planned:
        plan = layer.pst_plans[name]
        if plan.groups is not None:
            kind, place = plan.groups.kind, plan.groups.name
            key: tuple[str, ...] = (name, kind) if plan.shares_target else (name, kind, place)
            coupled[key].append(((layer, name), plan.groups))
            sparsities.setdefault(key, sparsity)
        elif plan.is_coupled:
            yield Unit(((layer, name),), 0.0)
        elif plan.shares_target:
            shared[name].append((layer, name))
            sparsities.setdefault(name, sparsity)
        else:
            yield Unit(((layer, name),), sparsity)
    for name, pairs in shared.items():
        yield SharedUnit(tuple(pairs), sparsities[name])
    for key, members in coupled.items():
        each_once = dict.fromkeys(groups for _, groups in members)
        yield GroupUnit(tuple(pair for pair, _ in members), sparsities[key], tuple(each_once))
