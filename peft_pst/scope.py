"""One sparsity for all adapted matrices together: what each of them contributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from .budget import Ranked, most_pruned, split_budget
from .layer import PSTLayer
from .masking import num_pruned
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
    total = num_pruned(sum(layer.num_weights for layer, _ in pairs), sparsity)
    groups = iter(split_budget(ranked, total))
    sizes = iter(matrix.size for matrix in ranked)
    return [tuple(next(groups) * next(sizes) for _ in range(layer.pst_plans[name].num_parts)) for layer, name in pairs]


def check_reachable(pairs: Sequence[Pair], sparsity: float) -> None:
    """Refuse a target that what each matrix keeps puts out of reach, before anything is trained for it.

    Raises:
        ValueError: naming the highest sparsity.
    """
    weights = sum(layer.num_weights for layer, _ in pairs)
    most = sum(matrix.most * matrix.size for matrix in _ranked(pairs, "scores"))
    if num_pruned(weights, sparsity) > most:
        min_kept = pairs[0][0].pst_plans[pairs[0][1]].config.min_kept
        raise ValueError(
            f"target_sparsity={sparsity} cannot be reached over all matrices: with min_kept={min_kept} of each, and "
            f"one group at least, {most / weights:.4g} is the most; lower one of the two."
        )


def _ranked(pairs: Sequence[Pair], by: Criterion) -> Iterator[Ranked]:
    """Every part of every matrix."""
    for layer, name in pairs:
        plan = layer.pst_plans[name]
        size = plan.size[0] * plan.size[1]
        most = most_pruned(plan.shape[0] * plan.shape[1] // size, plan.config.min_kept)
        for start in range(0, layer.out_features, plan.shape[0]):
            rows = slice(start, start + plan.shape[0])
            yield Ranked(partial(_comparable_scores, layer, name, rows, by), size, most)


def _comparable_scores(layer: PSTLayer, adapter_name: str, rows: slice, by: Criterion) -> Iterator[Tensor]:
    spread = layer.get_spread(rows)
    for scores in layer.get_group_scores(adapter_name, rows, by):
        yield scores / spread
