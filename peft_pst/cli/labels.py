"""Labels: from the strings of a data set to ids or numbers, and into the model's configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .errors import UserError
from .files import Table
from .options import Problem

LABELS_FILE = "labels.json"


@dataclass(frozen=True)
class Labels:
    """What a classification or regression model predicts.

    Attributes:
        problem: classification or regression, in transformers' words.
        names: the label of each id; empty for regression.

    Example:
        >>> labels = Labels("single_label_classification", ("bad", "good"))
        >>> labels.num_labels, labels.id2label
        (2, {0: 'bad', 1: 'good'})
    """

    problem: Problem
    names: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs of the head; 1 for regression."""
        return len(self.names) or 1

    @property
    def id2label(self) -> dict[int, str]:
        """The mapping as transformers' configurations have it."""
        return dict(enumerate(self.names or ("score",)))

    def apply(self, config: PretrainedConfig) -> None:
        """Write the mapping and the problem into a model's configuration."""
        config.id2label = self.id2label
        config.label2id = {name: id_ for id_, name in self.id2label.items()}
        config.problem_type = self.problem

    def save(self, folder: str | Path) -> None:
        """Write `labels.json`. An adapter folder must not have a `config.json`: it would pass for a whole model."""
        text = json.dumps({"problem_type": self.problem, "labels": self.names}, indent=2, ensure_ascii=False)
        (Path(folder) / LABELS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Labels | None:
        """Read `labels.json` from an adapter folder; None where there is none.

        Raises:
            UserError: if the file is damaged.
        """
        file = Path(folder) / LABELS_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(content["problem_type"], tuple(content["labels"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: {error!r}; remove it to merge with labels by number.") from error


def label_text(value: Any) -> str | None:
    """A label as written: strings without surrounding space, numbers and booleans as in JSON; None if missing.

    Example:
        >>> [label_text(value) for value in (" good", 3, True, "", None)]
        ['good', '3', 'true', None, None]
    """
    if value is None:
        return None
    return (value if isinstance(value, str) else json.dumps(value)).strip() or None


def infer_labels(table: Table, values: Sequence[Any], problem: Problem | None) -> Labels:
    """Find out from the training labels what there is to predict.

    Raises:
        UserError: if a label is missing, or all labels are the same.
    """
    texts = [_present(table, row, value) for row, value in enumerate(values)]
    problem = problem or _infer_problem(table, texts)
    if problem == "regression":
        return Labels(problem)
    names = sorted(set(texts), key=_by_number_then_name)
    if len(names) < 2:
        raise UserError(
            f"{table.source}: all labels are {names[0]!r}; classification needs at least two different ones."
        )
    return Labels(problem, tuple(names))


def _infer_problem(table: Table, texts: Sequence[str]) -> Problem:
    """Regression when the labels are numbers that are not all whole."""
    numbers = [_number(text) for text in texts]
    fractions = sum(number is not None and not number.is_integer() for number in numbers)
    strangers = [row for row, number in enumerate(numbers) if number is None]
    if not fractions or len(strangers) > len(numbers) / 2:
        return "single_label_classification"
    if strangers:
        raise UserError(
            f"{table.where(strangers[0])}: label {texts[strangers[0]]!r} is not a number, although most labels are; "
            "correct it, or say what is meant with --problem."
        )
    return "regression"


def encode(table: Table, values: Sequence[Any], labels: Labels, known_from: str) -> list[int] | list[float]:
    """Labels as the model's loss takes them: ids, or numbers for regression.

    Args:
        table: where the values come from, for messages.
        values: labels as they were read; ids are taken too where names are known from the task.
        labels: what the model predicts.
        known_from: where the names come from, for messages.

    Raises:
        UserError: at the first label that is missing, not a number, or not among the names; with its row.
    """
    texts = [_present(table, row, value) for row, value in enumerate(values)]
    if labels.problem == "regression":
        return [_parse_number(table, row, text) for row, text in enumerate(texts)]
    ids = {str(id_): id_ for id_ in labels.id2label} | {name: id_ for id_, name in labels.id2label.items()}
    if known_from != "the task":
        ids = {name: id_ for id_, name in labels.id2label.items()}
    for row, text in enumerate(texts):
        if text not in ids:
            raise UserError(
                f"{table.where(row)}: label {text!r} is none of {_listed(labels.names)}, the labels of {known_from}."
            )
    return [ids[text] for text in texts]


def _present(table: Table, row: int, value: Any) -> str:
    text = label_text(value)
    if text is None:
        raise UserError(f"{table.where(row)}: the label is missing.")
    return text


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_number(table: Table, row: int, text: str) -> float:
    number = _number(text)
    if number is None:
        raise UserError(f"{table.where(row)}: label {text!r} is not a finite number, which regression needs.")
    return number


def _by_number_then_name(name: str) -> tuple[float, str]:
    number = _number(name)
    return (math.inf if number is None else number), name


def _listed(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
