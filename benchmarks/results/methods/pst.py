"""PST: as in the paper, with this package's defaults, with importance alone, and its neighbour DSEE.

Options are fields of `PSTConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from peft import PeftConfig, get_peft_model

from peft_pst import PSTCallback, PSTConfig, parameter_groups, report_model
from peft_pst.patterns import Coupled, parse_pattern

from .protocol import Goal, Method, Prepared, Start

_OURS = {field.name for field in fields(PSTConfig)} - {field.name for field in fields(PeftConfig)}
_OF_THE_RUN = {"target_sparsity", "target_modules", "modules_to_save", "total_steps"}


def _prepare(start: Start, goal: Goal, *, config: Callable[..., PSTConfig]) -> Prepared:
    adapter = config(
        task_type=start.task_type,
        target_sparsity=goal.sparsity,
        modules_to_save=list(start.head_modules) or None,
        **goal.options,
    )
    model: Any = get_peft_model(start.model, adapter)
    groups = parameter_groups(model, lr=goal.lr, score_lr=goal.score_lr, head_lr=goal.head_lr)
    finish = partial(model.merge_and_unload, safe_merge=True)
    return Prepared(
        model,
        groups,
        finish,
        callbacks=[PSTCallback()],
        exact_matrices=adapter.scope == "matrix",
        promised=partial(_promised, model) if isinstance(parse_pattern(adapter.pattern), Coupled) else None,
    )


def _promised(model: Any) -> dict[str, int]:
    # Of the matrices that heads and neurons are made of; the others stay dense.
    return {row.name: row.promised_at_target or 0 for row in report_model(model).layers}


@dataclass(frozen=True)
class _PSTMethod(Method):
    config: Callable[..., PSTConfig] = PSTConfig

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        """Where the configuration differs from the paper's.

        Fields that join `PSTConfig` later and change nothing leave this as it was; a changed default does not.
        """
        ours, paper = self.config(**options), PSTConfig.paper()
        names = sorted(_OURS - _OF_THE_RUN)
        changed = {name: getattr(ours, name) for name in names if getattr(ours, name) != getattr(paper, name)}
        # PEFT keeps names of modules in sets, which JSON has not.
        return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def _method(title: str, config: Callable[..., PSTConfig], *rates: str) -> Method:
    return _PSTMethod(title, rates, partial(_prepare, config=config), config=config)


METHODS = {
    "pst": _method("PST", PSTConfig, "lr", "score_lr"),
    "pst-paper": _method("PST as in the paper", PSTConfig.paper, "lr", "score_lr"),
    "dsee": _method("DSEE", PSTConfig.dsee, "lr"),
    "pst-importance": _method("PST, importance only", partial(PSTConfig, r=0), "score_lr"),
}
