"""What is selected at once: the mask of one matrix, or the masks of all that share a target or a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .coupling import CoupledGroups
from .group_selection import check_groups_reachable, entries, group_changes, select_groups, weights
from .masking import num_pruned
from .plan import Change, Criterion, LayerPlan
from .scope import Pair, check_reachable, shared_counts


@dataclass(frozen=True)
class Unit:
    """Layers, each with an adapter on it, that are brought to a sparsity together; here, of one layer.

    Attributes:
        pairs: the layers, at least one.
        sparsity: fraction of zeros over all of them, in [0, 1).
    """

    pairs: list[Pair]
    sparsity: float

    @property
    def plan(self) -> LayerPlan:
        """That of the first layer, which the others agree with in what concerns the selection."""
        layer, name = self.pairs[0]
        return layer.pst_plans[name]

    @property
    def reach(self) -> range:
        """Numbers of zeros that the sparsity may come to: more than one where whole groups share a budget."""
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
        budget = num_pruned(sum(layer.num_weights for layer, _ in self.pairs), self.sparsity)
        largest = max(math.prod(layer.pst_plans[name].size) for layer, name in self.pairs)
        # Zeros that stay whatever the scores may come on top of the budget.
        kept_zeros = sum(sum(layer.counts_at(name, 0.0)) for layer, name in self.pairs)
        return range(budget - largest + 1, budget + kept_zeros + 1)

    def check(self) -> None:
        check_reachable(self.pairs, self.sparsity)

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

    coupled: list[CoupledGroups]

    @property
    def reach(self) -> range:
        if len(self.coupled) == 1:
            return _exactly(num_pruned(self.coupled[0].num_groups, self.sparsity) * entries(self.coupled[0]))
        budget = num_pruned(weights(self.coupled), self.sparsity)
        return range(budget - max(map(entries, self.coupled)) + 1, budget + 1)

    def check(self) -> None:
        check_groups_reachable(self.coupled, self.plan.config.min_kept, self.sparsity)

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
    """Put layers together that are selected at once, given each with an adapter and its sparsity."""
    joint: dict[tuple[str, ...], Unit] = {}
    for layer, name, sparsity in planned:
        plan = layer.pst_plans[name]
        for groups in plan.groups:
            key = (name, groups.kind) if plan.shares_target else (name, groups.kind, groups.name)
            unit = joint.setdefault(key, GroupUnit([], sparsity, []))
            assert isinstance(unit, GroupUnit)
            unit.pairs.append((layer, name))
            if groups not in unit.coupled:
                unit.coupled.append(groups)
        if not plan.groups and plan.shares_target and not plan.is_coupled:
            joint.setdefault((name,), SharedUnit([], sparsity)).pairs.append((layer, name))
        elif not plan.groups:
            yield Unit([(layer, name)], sparsity)
    yield from joint.values()
