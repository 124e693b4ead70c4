"""What is selected at once: the mask of one matrix, or those of all matrices that share a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .layer import Change, Criterion, LayerPlan
from .masking import num_pruned
from .scope import Pair, check_reachable, shared_counts


@dataclass(frozen=True)
class Unit:
    """Layers, each with an adapter on it, that are brought to a sparsity together.

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
    def num_pruned(self) -> int:
        """Zeros that the sparsity comes to."""
        if self.plan.shares_target:
            return num_pruned(sum(layer.num_weights for layer, _ in self.pairs), self.sparsity)
        return sum(sum(layer.counts_at(name, self.sparsity)) for layer, name in self.pairs)

    @property
    def in_force(self) -> int:
        """Zeros now in force."""
        return sum(layer.get_num_pruned(name) for layer, name in self.pairs)

    def check(self) -> None:
        """Refuse a sparsity that cannot be reached, before anything is trained for it.

        Raises:
            ValueError: if it cannot.
        """
        if self.plan.shares_target:
            check_reachable(self.pairs, self.sparsity)

    def prepare(self, by: Criterion = "scores") -> list[tuple[*Pair, Change]]:
        """What the sparsity comes to for each layer. Changes nothing.

        Raises:
            ValueError: if the scores cannot be ranked, or the pattern allows no such sparsity.
            RuntimeError: while an adapter is merged.
        """
        if not self.plan.shares_target:
            return [(layer, name, layer.prepare_sparsity(name, self.sparsity, by)) for layer, name in self.pairs]
        counts = shared_counts(self.pairs, self.sparsity, by)
        return [
            (layer, name, layer.prepare_counts(name, layer.with_kept_zeros(name, own), by))
            for (layer, name), own in zip(self.pairs, counts, strict=True)
        ]


def units(planned: Iterable[tuple[*Pair, float]]) -> Iterator[Unit]:
    """Put layers together that are selected at once, given each with an adapter and its sparsity."""
    shared: dict[str, Unit] = {}
    for layer, name, sparsity in planned:
        if layer.pst_plans[name].shares_target:
            shared.setdefault(name, Unit([], sparsity)).pairs.append((layer, name))
        else:
            yield Unit([(layer, name)], sparsity)
    yield from shared.values()
