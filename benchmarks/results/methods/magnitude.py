"""Magnitude pruning along the schedule: with full fine-tuning, and with LoRA, where |W0 + B A| decides.

Masks are made anew after every step, so a pruned weight may come back. It gets no gradient while it is masked
(Zhu & Gupta 2017, arXiv 1710.01878). With embeddings, their low-rank update is PST's.
"""

from __future__ import annotations

from functools import partial

from .embeddings import add_embedding_updates
from .masked import SCHEDULE, ScheduleCallback, add_masks, merge_masks, prune_each, schedule_ratios
from .protocol import Goal, Method, Prepared, Start, rate_groups


def _prepare(start: Start, goal: Goal, *, embeddings: bool = False) -> Prepared:
    rank = goal.options.get("r", 0)
    if rank:
        for name, parameter in start.model.named_parameters():
            parameter.requires_grad_(start.is_head(name))
    layers = add_masks(start.model, rank=rank)
    write = add_embedding_updates(start.model) if embeddings else None
    return Prepared(
        start.model,
        rate_groups(start.model, goal, start.is_head),
        finish=partial(merge_masks, start.model, layers, write),
        callbacks=[ScheduleCallback(partial(prune_each, layers), goal.sparsity, schedule_ratios(goal.options))],
    )


METHODS = {
    "magnitude": Method("magnitude pruning", ("lr",), _prepare, SCHEDULE),
    "magnitude-lora": Method("magnitude pruning with LoRA", ("lr",), _prepare, {"r": 8, **SCHEDULE}),
    "magnitude-lora-embeddings": Method(
        "magnitude, LoRA, embeddings too",
        ("lr",),
        partial(_prepare, embeddings=True),
        {"r": 8, **SCHEDULE},
    ),
}
