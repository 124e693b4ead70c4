"""The tasks of GLUE: their columns on the hub and in their own files, their labels and their metrics."""

from __future__ import annotations

from typing import NamedTuple

HUB_NAME = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """One task of GLUE (Wang et al. 2019, arXiv 1804.07461).

    Attributes:
        texts: the text column, or the two of a pair, on the hub.
        labels: names of the labels, in the order of the hub's ids; empty for a score (STS-B).
        metric: a key of `metrics.METRICS`.
        file_texts: the same columns in GLUE's own files, where they are called otherwise.
        file_label: the label column there.
        headerless: columns of the labelled files, where these have no header line.
        validation_split: the split of the hub to evaluate on.
        test_split: the split of the hub to predict.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    file_texts: tuple[str, ...] = ()
    file_label: str = "label"
    headerless: tuple[str, ...] = ()
    validation_split: str = "validation"
    test_split: str = "test"


_ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("unacceptable", "acceptable"),
        "matthews",
        headerless=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        "f1",
        file_texts=("#1 String", "#2 String"),
        file_label="Quality",
    ),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1", file_label="is_duplicate"),
    "stsb": GlueTask(
        ("sentence1", "sentence2"),
        (),
        "correlation",
        file_label="score",
        headerless=("genre", "filename", "year", "index", "score", "sentence1", "sentence2"),
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        file_texts=("sentence1", "sentence2"),
        file_label="gold_label",
        validation_split="validation_matched",
        test_split="test_matched",
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
