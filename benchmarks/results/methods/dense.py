"""Full fine-tuning, nothing pruned."""

from __future__ import annotations

from .protocol import Goal, Method, Prepared, Start, rate_groups


def _prepare(start: Start, goal: Goal) -> Prepared:
    return Prepared(start.model, rate_groups(start.model, goal, start.is_head), finish=lambda: start.model)


METHODS = {"dense": Method("full fine-tuning", ("lr",), _prepare, prunes=False)}
