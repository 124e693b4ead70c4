"""What a method is to the harness: from a loaded model to one ready to train, and from that to a plain pruned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

HEADS = ("classifier", "score")
"""Names of heads, as PEFT has them for sequence classification."""


@dataclass(frozen=True)
class Start:
    """What every method starts from.

    Attributes:
        model: freshly loaded; every parameter trains.
        task_type: as PEFT calls it.
        head_modules: names of the modules that train in full with the head, beyond those in `HEADS`.
        calibration: gives batches of one training example each, as keyword arguments of the model.
    """

    model: nn.Module
    task_type: str
    head_modules: Sequence[str]
    calibration: Callable[[], Iterable[dict[str, Tensor]]]

    def is_head(self, parameter_name: str) -> bool:
        """Whether a parameter belongs to a module that trains in full with the head."""
        module = f".{parameter_name}"
        return any(f".{head}." in module for head in (*HEADS, *self.head_modules))


@dataclass(frozen=True)
class Goal:
    """What a run asks of a method.

    Attributes:
        sparsity: target, in [0, 1).
        lr: learning rate of the weights; 0 where the method has no such rate.
        score_lr: learning rate of the scores; 0 where the method has no such rate.
        head_lr: learning rate of what starts at random.
        options: of the method.
    """

    sparsity: float
    lr: float
    score_lr: float
    head_lr: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Attributes:
        model: what the Trainer trains.
        groups: optimizer groups over all parameters that train.
        finish: called once after training; returns the plain dense model, pruned weights exactly zero.
        callbacks: of the Trainer.
        penalty: what is added to the loss, a scalar with a gradient.
        facts: called after training, before `finish`; numbers worth a place beside the score.
        exact_matrices: whether each matrix has the count of zeros that is promised, or only all of them together.
        promised: called after training, before `finish`, where the sparsity is not that of every matrix; the zeros of
            each, by name, none in those left out.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    finish: Callable[[], nn.Module]
    callbacks: list[TrainerCallback] = field(default_factory=list)
    penalty: Callable[[], Tensor] | None = None
    facts: Callable[[], dict[str, float]] = dict
    exact_matrices: bool = True
    promised: Callable[[], Mapping[str, int]] | None = None


@dataclass(frozen=True)
class Method:
    """One way to make a model sparse, or to leave it dense.

    Attributes:
        title: as the table and the pictures call it.
        rates: which learning rates it has, beside the head's: "lr", "score_lr".
        prepare: makes the model ready to train.
        defaults: its options with their defaults; others are refused.
        prunes: whether it has a sparsity.
        resolve: options as they were given to all that they come to.
    """

    title: str
    rates: tuple[str, ...]
    prepare: Callable[[Start, Goal], Prepared]
    defaults: dict[str, Any] = field(default_factory=dict)
    prunes: bool = True

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with the defaults of those that are not given.

        Raises:
            ValueError: for an option that the method does not have.
        """
        unknown = sorted(set(options) - set(self.defaults))
        if unknown:
            raise ValueError(f"{self.title} has no option {unknown[0]!r}; it has {', '.join(self.defaults) or 'none'}.")
        return {**self.defaults, **options}


def rate_groups(model: nn.Module, goal: Goal, is_head: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Optimizer groups over everything that trains: scores (parameters of that name), the head, and the rest."""
    params: dict[str, list[nn.Parameter]] = {"weights": [], "scores": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_scores = name.rpartition(".")[2] == "scores"
            params["scores" if is_scores else "head" if is_head(name) else "weights"].append(parameter)
    rates = {"weights": goal.lr, "scores": goal.score_lr, "head": goal.head_lr}
    return [{"name": name, "params": group, "lr": rates[name]} for name, group in params.items() if group]
