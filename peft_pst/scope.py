"""One sparsity for all adapted matrices together: what each of them contributes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from .budget import Place, Ranked, most_pruned, shared_budget, split_budget
from .layer import PSTLayer
from .plan import Criterion

Pair = tuple[PSTLayer, str]  # a layer, and the name of an adapter on it


def shared_counts(pairs: Sequence[Pair], sparsity: float, by: Criterion = "scores") -> list[tuple[int, ...]]:
    """How many entries each part of each matrix prunes, if all together reach a sparsity.

    Matrices are made comparable by dividing their scores by the root mean square of their base weights, so that a
    matrix of large weights is not spared for their size alone. Each part keeps `min_kept` of its groups, and one at
    least.

    Args:
        pairs: layers with an adapter of one configuration.
        sparsity: fraction of zeros over all of them, in [0, 1).
        by: what is ranked.

    Returns:
        For each pair the zeros of each part.

    Raises:
        ValueError: if the parts keep so many that the sparsity cannot be reached, or a score is NaN.
    """
    ranked = list(_ranked(pairs, by))
    groups = iter(split_budget(ranked, shared_budget(places(pairs), sparsity)))
    sizes = iter(matrix.size for matrix in ranked)
    return [tuple(next(groups) * next(sizes) for _ in range(layer.pst_plans[name].num_parts)) for layer, name in pairs]


def places(pairs: Sequence[Pair]) -> list[Place]:
    """Every part of every matrix."""
    return [_place(layer, name) for layer, name in pairs for _ in range(layer.pst_plans[name].num_parts)]


def _place(layer: PSTLayer, name: str) -> Place:
    """One part of a matrix."""
    plan = layer.pst_plans[name]
    size = math.prod(plan.size)
    return Place(math.prod(plan.shape) // size, size)


def _ranked(pairs: Sequence[Pair], by: Criterion) -> Iterator[Ranked]:
    for layer, name in pairs:
        plan, place = layer.pst_plans[name], _place(layer, name)
        most = most_pruned(place.groups, plan.config.min_kept)
        for start in range(0, layer.out_features, plan.shape[0]):
            rows = slice(start, start + plan.shape[0])
            scores = partial(_comparable_scores, layer, name, rows, by)
            yield Ranked(scores, place.size, most, f"Layer {layer.module_name}, adapter {name!r}")


def _comparable_scores(layer: PSTLayer, adapter_name: str, rows: slice, by: Criterion) -> Iterator[Tensor]:
    spread = layer.get_spread(rows)
    for scores in layer.get_group_scores(adapter_name, rows, by):
        yield scores / spread
