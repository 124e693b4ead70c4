"""The numbers that models are compared by, computed by scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from transformers import EvalPrediction

from .errors import require

Scores = dict[str, float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """Share of right predictions; both are ids, (n,)."""
    return {"accuracy": float(require("sklearn.metrics", "cli").accuracy_score(labels, predictions))}


def f1(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """F1 of the label with id 1, and accuracy, as GLUE reports MRPC and QQP."""
    score = require("sklearn.metrics", "cli").f1_score(labels, predictions)
    return {"f1": float(score), **accuracy(predictions, labels)}


def matthews(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """Matthews' correlation of two sets of ids, as GLUE reports CoLA."""
    return {"matthews_correlation": float(require("sklearn.metrics", "cli").matthews_corrcoef(labels, predictions))}


def correlation(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """Pearson's and Spearman's correlation of two sets of numbers, (n,), as GLUE reports STS-B."""
    stats = require("scipy.stats", "cli")
    return {
        "pearson": float(stats.pearsonr(predictions, labels)[0]),
        "spearman": float(stats.spearmanr(predictions, labels)[0]),
    }


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Scores]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "correlation": correlation,
}


def predicted(logits: np.ndarray | tuple) -> np.ndarray:
    """What the head says: the id of the highest logit, or the number itself where the head has one output.

    Args:
        logits: (n, num_labels); of a tuple, which some models return, the first is taken.

    Returns:
        (n,): integers, or floats for regression.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    return scores[:, 0] if scores.shape[1] == 1 else scores.argmax(axis=1)


def compute_metrics(name: str) -> Callable[[EvalPrediction], Scores]:
    """A metric of `METRICS` in the form that the Trainer calls."""
    metric = METRICS[name]
    return lambda evaluation: metric(predicted(evaluation.predictions), np.asarray(evaluation.label_ids).reshape(-1))


def metric_names(name: str) -> list[str]:
    """What a metric of `METRICS` reports.

    Example:
        >>> metric_names("f1")
        ['f1', 'accuracy']
    """
    sample = np.array([0, 1, 1])
    return list(METRICS[name](sample, sample))


def perplexity(loss: float) -> float:
    """exp of the mean loss a token; infinite where that overflows.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
