"""Movement pruning and soft movement pruning (Sanh et al. 2020, arXiv 2005.07683), with full-size scores.

Hard: each matrix keeps its highest scores, as many as the schedule says (top-v).

Soft: one threshold for the whole model, and a pull of sigmoid(S) towards zero that grows along the schedule. The
published method fixes the threshold, and the sparsity that comes out depends on the strength of the pull. Here the
threshold follows the schedule instead, so that the zeros of all matrices together are exactly as many as promised at
every step; how they spread over the matrices stays the method's own choice. `free_sparsity` in the results is what the
published threshold, sigmoid(S) > 0.1, would have pruned in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .masked import (
    SCHEDULE,
    MaskedLayer,
    ScheduleCallback,
    add_masks,
    merge_masks,
    prune_each,
    prune_together,
    schedule_ratios,
)
from .protocol import Goal, Method, Prepared, Start, rate_groups

_PUBLISHED_THRESHOLD = 0.1


def _prepare_hard(start: Start, goal: Goal) -> Prepared:
    layers = add_masks(start.model, learns_scores=True)
    return Prepared(
        start.model,
        rate_groups(start.model, goal, start.is_head),
        finish=partial(merge_masks, start.model, layers),
        callbacks=[ScheduleCallback(partial(prune_each, layers), goal.sparsity, schedule_ratios(goal.options))],
    )


def _prepare_soft(start: Start, goal: Goal) -> Prepared:
    layers = add_masks(start.model, learns_scores=True)
    schedule = ScheduleCallback(partial(prune_together, layers), goal.sparsity, schedule_ratios(goal.options))

    def penalty() -> Tensor:
        progress = schedule.sparsity / goal.sparsity if goal.sparsity else 0.0
        return goal.options["strength"] * progress * mean_gate(layers)

    return Prepared(
        start.model,
        rate_groups(start.model, goal, start.is_head),
        finish=partial(merge_masks, start.model, layers),
        callbacks=[schedule],
        penalty=penalty,
        facts=lambda: {"free_sparsity": free_sparsity(layers)},
        exact_matrices=False,
    )


def mean_gate(layers: Sequence[MaskedLayer]) -> Tensor:
    """Mean over the matrices of the mean of sigmoid(S), a scalar."""
    return torch.stack([torch.sigmoid(_scores(layer)).mean() for layer in layers]).mean()


@torch.no_grad()
def free_sparsity(layers: Sequence[MaskedLayer]) -> float:
    """The share of all weights that the published threshold prunes."""
    pruned = sum(int((torch.sigmoid(_scores(layer)) <= _PUBLISHED_THRESHOLD).sum()) for layer in layers)
    return pruned / sum(layer.original.numel() for layer in layers)


def _scores(layer: MaskedLayer) -> Tensor:
    assert layer.masked.scores is not None  # made with learns_scores=True
    return layer.masked.scores


METHODS = {
    "movement": Method("movement pruning", ("lr", "score_lr"), _prepare_hard, SCHEDULE),
    "soft-movement": Method(
        "soft movement pruning", ("lr", "score_lr"), _prepare_soft, {"strength": 100.0, **SCHEDULE}
    ),
}
