"""What a task hands to the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DataCollator, EvalPrediction

from .base import Base
from .labels import Labels


@dataclass(frozen=True)
class Job:
    """Model and data, checked and tokenised.

    Attributes:
        base: the model without an adapter.
        labels: what a classifier predicts; None for language modelling.
        train: the training `datasets.Dataset`.
        validation: the one to evaluate on, or None.
        test: the one to predict, or None.
        collator: makes batches.
        compute_metrics: what evaluation reports beside the loss, or None.
        metric_names: the names of that.
        facts: lines to tell the user before training.
        teacher: a dense model to learn from, or None.
    """

    base: Base
    labels: Labels | None
    train: Any
    validation: Any
    test: Any
    collator: DataCollator
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    metric_names: list[str]
    facts: list[str]
    teacher: nn.Module | None = None
