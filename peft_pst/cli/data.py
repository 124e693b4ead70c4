"""From the user's options to checked texts and labels, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import UserError, require
from .files import Table, check_file, read_table
from .glue import GLUE_TASKS, HUB_NAME, GlueTask
from .labels import Labels, encode, infer_labels, label_text
from .options import DataOptions

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
TEXTS = ("text", "sentence", "content", "review", "document")
LABELS = ("label", "labels", "score", "target", "class", "category")


@dataclass(frozen=True)
class Examples:
    """Texts with their labels, all lists of one length.

    Attributes:
        source: where they come from, for messages.
        texts: the text, or the first of a pair.
        pairs: the second of a pair, or None.
        labels: ids or numbers, or None for texts to predict.
    """

    source: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float] | None

    def first(self, limit: int | None) -> Examples:
        """The first `limit` examples, or all."""
        cut = slice(limit)
        return Examples(self.source, self.texts[cut], self.pairs and self.pairs[cut], self.labels and self.labels[cut])


class TextData(NamedTuple):
    """A whole labelled data set."""

    labels: Labels
    train: Examples
    validation: Examples | None
    test: Examples | None
    notes: list[str]


class Columns(NamedTuple):
    """Which columns of a table hold what."""

    text: str
    pair: str | None
    label: str


class _Tables(NamedTuple):
    train: Table
    validation: Table | None
    test: Table | None


def read_text_data(options: DataOptions) -> TextData:
    """Read and check the data of a classification or regression task.

    Raises:
        UserError: if a file or a column is missing, a row is malformed, or a label cannot be used; with file and row.
    """
    task = glue_task(options)
    tables = _read_files(options, task) if options.train_file else _read_hub(options, task)
    columns = find_columns(tables.train, options, task)
    train_labels = tables.train.column(columns.label, "label_column")
    if task:
        labels = Labels("single_label_classification" if task.labels else "regression", task.labels)
    else:
        labels = infer_labels(tables.train, train_labels, options.problem)
    known_from = "the task" if task else tables.train.source

    def examples(table: Table | None, limit: int | None = None, needs_labels: bool = True) -> Examples | None:
        return None if table is None else _examples(table, columns, labels, known_from, needs_labels).first(limit)

    train = examples(tables.train, options.max_train_samples)
    assert train is not None
    return TextData(
        labels,
        train,
        examples(tables.validation, options.max_eval_samples),
        examples(tables.test, needs_labels=False),
        [f"{t.source}: {t.incomplete} incomplete rows were left out." for t in tables if t and t.incomplete],
    )


def glue_task(options: DataOptions) -> GlueTask | None:
    """The GLUE task that was asked for; refuses unknown names and contradictions."""
    if options.task_name is None:
        return None
    if options.task_name not in GLUE_TASKS:
        raise UserError(f"--task_name {options.task_name} is none of {', '.join(GLUE_TASKS)}.")
    task = GLUE_TASKS[options.task_name]
    if options.problem is not None and (options.problem == "regression") == bool(task.labels):
        raise UserError(f"--problem {options.problem} contradicts --task_name {options.task_name}; leave it out.")
    return task


def check_source(options: DataOptions) -> None:
    """Exactly one source of data, and files that exist."""
    if options.dataset_name and (options.train_file or options.task_name):
        raise UserError("--dataset_name excludes --train_file and --task_name; pass one source of data.")
    if options.task == "causal_lm" and options.task_name:
        raise UserError("--task_name is for seq_cls; pass --train_file or --dataset_name to train a language model.")
    if not (options.dataset_name or options.train_file or options.task_name):
        raise UserError("no training data; pass --task_name, --train_file or --dataset_name.")
    for option in ("train_file", "validation_file", "test_file"):
        path = getattr(options, option)
        if path is not None:
            check_file(path, option)
            if not options.train_file:
                raise UserError(f"--{option} needs --train_file beside it; files and the hub are not mixed.")


def find_columns(table: Table, options: DataOptions, task: GlueTask | None) -> Columns:
    """Take the columns the user named, those of the task, or a sensible guess."""
    text, pair = options.text_column, options.text_pair_column
    label = options.label_column or _guess_label(table, task)
    if text is None:
        text, guessed_pair = _guess_texts(table, task, label)
        pair = pair or guessed_pair
    table.column(text, "text_column")
    if pair is not None:
        table.column(pair, "text_pair_column")
    table.column(label, "label_column")
    if len({text, pair, label}) < 3:
        raise UserError(f"text, pair and label are not three columns: {text!r}, {pair!r}, {label!r}.")
    return Columns(text, pair, label)


def _guess_label(table: Table, task: GlueTask | None) -> str:
    candidates = (task.file_label, "label") if task else LABELS
    return _first_present(table, candidates, "label_column")


def _guess_texts(table: Table, task: GlueTask | None, label: str) -> tuple[str, str | None]:
    if task:
        texts = task.file_texts if set(task.file_texts) & table.columns.keys() else task.texts
        return texts[0], texts[1] if len(texts) > 1 else None
    for first, second in TEXT_PAIRS:
        if {first, second} <= table.columns.keys():
            return first, second
    others = [name for name in table.columns if name != label]
    return _first_present(table, others if len(others) == 1 else TEXTS, "text_column"), None


def _first_present(table: Table, candidates: Sequence[str], option: str) -> str:
    for name in candidates:
        if name in table.columns:
            return name
    raise UserError(
        f"{table.source} has none of the columns {', '.join(candidates)}; it has "
        f"{', '.join(map(repr, table.columns))}. Pass --{option}."
    )


def _examples(table: Table, columns: Columns, labels: Labels, known_from: str, needs_labels: bool) -> Examples:
    texts = table.texts(columns.text, "text_column")
    pairs = table.texts(columns.pair, "text_pair_column") if columns.pair else None
    encoded = None
    if needs_labels or _has_labels(table, columns.label):
        encoded = encode(table, table.column(columns.label, "label_column"), labels, known_from)
    return Examples(table.source, texts, pairs, encoded)


def _has_labels(table: Table, column: str) -> bool:
    return column in table.columns and any(label_text(value) is not None for value in table.columns[column])


def _read_files(options: DataOptions, task: GlueTask | None) -> _Tables:
    def read(path: str | None) -> Table | None:
        if path is None:
            return None
        if task is None:
            return read_table(path)
        texts = task.file_texts or task.texts
        return read_table(path, headerless=task.headerless, header_has=texts[0], skip_incomplete=True)

    train = read(options.train_file)
    assert train is not None
    return _Tables(train, read(options.validation_file), read(options.test_file))


def _read_hub(options: DataOptions, task: GlueTask | None) -> _Tables:
    if task:
        splits = load_hub_splits(HUB_NAME, options.task_name)
        names = ("train", task.validation_split, task.test_split)
    else:
        assert options.dataset_name is not None
        splits = load_hub_splits(options.dataset_name, options.dataset_config_name)
        names = ("train", "validation", "test")
    train, validation, test = (
        _hub_table(f"{options.dataset_name or options.task_name} ({name})", splits[name]) if name in splits else None
        for name in names
    )
    assert train is not None
    return _Tables(train, validation, test)


def load_hub_splits(name: str, config: str | None) -> Any:
    """The splits of a data set on the hub (or in a local folder), a `datasets.DatasetDict` with "train" in it."""
    datasets = require("datasets", "cli")
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:  # whatever a hub, a network or a loader raises, the remedy is the user's
        raise UserError(
            f"data set {name!r}{f' ({config})' if config else ''} could not be loaded: {error or type(error).__name__}"
        ) from error
    if "train" not in splits:
        raise UserError(f"data set {name!r} has no split 'train'; it has {', '.join(splits)}.")
    return splits


def _hub_table(source: str, dataset: Any) -> Table:
    columns = dict(dataset.to_dict())
    for name, feature in dataset.features.items():
        if hasattr(feature, "int2str"):  # ids of named classes; -1 stands for a label that is withheld
            columns[name] = [None if id_ is None or id_ < 0 else feature.names[id_] for id_ in columns[name]]
    return Table(source, columns)
