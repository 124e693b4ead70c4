"""The ranges of the Trainer's numbers. It checks few of them itself, and most of those in the middle of its work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from transformers import TrainingArguments

from .errors import UserError


class _Bound(NamedTuple):
    """What some options must be, in words and as a test that NaN fails too."""

    text: str
    holds: Callable[[float], bool]
    names: tuple[str, ...]


_BOUNDS = (
    _Bound(
        "at least 1",
        lambda value: value >= 1,
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    ),
    _Bound("at least 1, or -1 to go by --num_train_epochs", lambda value: value >= 1 or value == -1, ("max_steps",)),
    _Bound("a finite number above 0", lambda value: 0 < value < math.inf, ("num_train_epochs",)),
    _Bound(
        "a number of steps above 0, or below 1 a share of all (the options --save_strategy, --eval_strategy and "
        "--logging_strategy switch one off with 'no')",
        lambda value: 0 < value < math.inf,
        ("save_steps", "eval_steps", "logging_steps"),
    ),
    _Bound(
        "a finite number of at least 0",
        lambda value: 0 <= value < math.inf,
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "neftune_noise_alpha",
            "dataloader_num_workers",
        ),
    ),
    _Bound("in [0, 1)", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2", "label_smoothing_factor")),
)


def check_bounds(training: TrainingArguments) -> None:
    """Refuse numbers with which there is no training.

    Raises:
        UserError: for the first option out of its range.

    Example:
        >>> check_bounds(TrainingArguments(learning_rate=-1, report_to="none"))
        Traceback (most recent call last):
        ...
        peft_pst.cli.errors.UserError: --learning_rate -1 must be a finite number of at least 0; the default is 5e-05.
    """
    for bound in _BOUNDS:
        for name in bound.names:
            value = getattr(training, name)
            if value is not None and not bound.holds(value):
                default = type(training).__dataclass_fields__[name].default
                hint = "leave it out for the default" if default is None else f"the default is {default}"
                raise UserError(f"--{name} {value} must be {bound.text}; {hint}.")
