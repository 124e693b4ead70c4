"""Classification and regression of texts: from checked examples to batches of tokens."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .base import Base, load_base, settle_length
from .data import Examples, TextData, glue_task, read_text_data
from .errors import require
from .job import Job
from .labels import Labels
from .metrics import compute_metrics, metric_names
from .options import TrainOptions
from .teacher import load_teacher

_DEFAULT_LENGTH = 128


def prepare_classification(options: TrainOptions) -> Job:
    """Read the data, then load the model with a head of the right size, then tokenise.

    Raises:
        UserError: whatever is wrong with data or model, before any training.
    """
    task = glue_task(options.data)
    data = read_text_data(options.data)
    base = load_base(options.model, data.labels)
    length = settle_length(options.data.max_length, _DEFAULT_LENGTH, base)
    teacher = load_teacher(options, base, data.labels, length)
    splits = [_tokenise(examples, base.tokenizer, length) for examples in (data.train, data.validation, data.test)]
    metric = task.metric if task else "accuracy" if data.labels.names else "correlation"
    train, validation, test = splits
    return Job(
        base,
        data.labels,
        train,
        validation,
        test,
        collator=DataCollatorWithPadding(base.tokenizer),
        compute_metrics=compute_metrics(metric),
        metric_names=metric_names(metric),
        facts=[*data.notes, *_facts(data, base, length, splits)],
        teacher=teacher,
    )


def _tokenise(examples: Examples | None, tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    if examples is None:
        return None
    columns = {"text": examples.texts, "pair": examples.pairs, "labels": examples.labels}
    dataset = require("datasets", "cli").Dataset.from_dict({k: v for k, v in columns.items() if v is not None})

    def tokenise(batch: dict[str, list]) -> dict[str, list]:
        return dict(tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=length))

    texts = [name for name in dataset.column_names if name != "labels"]
    return dataset.map(tokenise, batched=True, remove_columns=texts, desc=f"Tokenising {examples.source}")


def _facts(data: TextData, base: Base, length: int, splits: list[Any]) -> list[str]:
    sizes = zip(("training", "validation", "test"), splits, strict=True)
    facts = ["Data      " + ", ".join(f"{len(split):,} {name}" for name, split in sizes if split is not None)]
    facts.append(f"Predicts  {_describe(data.labels)}")
    full = sum(len(ids) >= length for split in splits if split is not None for ids in split["input_ids"])
    if full:
        facts.append(f"Length    {full:,} texts fill the {length} tokens of --max_length; what is longer was cut.")
    return facts


def _describe(labels: Labels) -> str:
    if not labels.names:
        return "a number (regression)"
    shown = ", ".join(labels.names[:8]) + (", ..." if len(labels.names) > 8 else "")
    return f"{len(labels.names)} labels: {shown}"
