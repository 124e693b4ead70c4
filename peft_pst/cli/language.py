"""Text for a causal language model, packed into blocks of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, default_data_collator

from .base import load_base, settle_length
from .data import load_hub_splits
from .errors import UserError, require
from .files import Table, read_table
from .job import Job
from .options import DataOptions, TrainOptions
from .teacher import load_teacher

_DEFAULT_LENGTH = 1024
_CHUNK = 65536  # characters of a plain text that are tokenised at once, up to the end of a line


class Documents(NamedTuple):
    """Texts of one split, not yet tokenised.

    Attributes:
        source: the file or the data set, for messages.
        dataset: a `datasets.Dataset` with the column `column`.
        column: name of the column.
        separate: whether each row is a document of its own, to be ended by the tokenizer's end token.
    """

    source: str
    dataset: Any
    column: str
    separate: bool


class Corpus(NamedTuple):
    """The splits of a text corpus."""

    train: Documents
    validation: Documents | None


def prepare_language_modelling(options: TrainOptions) -> Job:
    """Read the text, then load the model, then tokenise and pack.

    Raises:
        UserError: whatever is wrong with data or model, before any training.
    """
    corpus = read_corpus(options.data)
    base = load_base(options.model, labels=None)
    if base.model.loss_type is None:
        # The Trainer reads from this whether the loss shifts the labels. Models whose class is not named
        # ...ForCausalLM, as GPT-2's, leave it out, and their loss would be divided by one token a block too many.
        base.model.loss_type = "ForCausalLM"
    length = settle_length(options.data.max_length, _DEFAULT_LENGTH, base)
    teacher = load_teacher(options, base, None, length)
    train = pack(corpus.train, base.tokenizer, length, options.data.max_train_samples)
    validation = None
    sizes = f"Data      {len(train):,} training"
    if corpus.validation:
        validation = pack(corpus.validation, base.tokenizer, length, options.data.max_eval_samples)
        sizes += f", {len(validation):,} validation"
    facts = [f"{sizes} blocks of {length} tokens"]
    return Job(base, None, train, validation, None, default_data_collator, None, [], facts, teacher)


def read_corpus(options: DataOptions) -> Corpus:
    """Read the text for causal language modelling, from files or from the hub.

    Raises:
        UserError: if a file or a column is missing, or there is no text.
    """
    if options.test_file:
        raise UserError("--test_file is for seq_cls; pass the text to evaluate on as --validation_file.")
    if options.train_file:
        validation = options.validation_file
        return Corpus(_read_file(options, options.train_file), _read_file(options, validation) if validation else None)
    assert options.dataset_name is not None
    splits = load_hub_splits(options.dataset_name, options.dataset_config_name)

    def documents(name: str) -> Documents:
        dataset = splits[name]
        source = f"{options.dataset_name} ({name})"
        empty = Table(source, {column: [] for column in dataset.column_names})
        return Documents(source, dataset, _text_column(empty, options), separate=True)

    return Corpus(documents("train"), documents("validation") if "validation" in splits else None)


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None) -> Any:
    """Tokenise texts and cut their concatenation into blocks; an incomplete last block of 1,000 texts is left out.

    Args:
        documents: what to tokenise.
        tokenizer: the model's own.
        length: tokens a block.
        limit: number of blocks to take, or None for all.

    Returns:
        A `datasets.Dataset` with `input_ids` and `labels`, each (length,).

    Raises:
        UserError: if the text is shorter than one block.
    """
    end = [tokenizer.eos_token_id] if documents.separate and tokenizer.eos_token_id is not None else []

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[documents.column] if text]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [row + end for row in ids]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        return {"input_ids": blocks, "labels": blocks}

    others = documents.dataset.column_names
    tokens = documents.dataset.map(tokenise, batched=True, remove_columns=others, desc="Tokenising")
    blocks = tokens.map(cut, batched=True, desc=f"Packing blocks of {length} tokens")
    if not len(blocks):
        count = sum(len(row) for row in tokens["input_ids"])
        raise UserError(
            f"{documents.source} has {count} tokens, fewer than one block of {length}; lower --max_length or add text."
        )
    return blocks.select(range(min(limit or len(blocks), len(blocks))))


def _read_file(options: DataOptions, path: str) -> Documents:
    dataset = require("datasets", "cli").Dataset
    if Path(path).suffix.lower() in (".csv", ".tsv", ".jsonl", ".json"):
        table = read_table(path)
        column = _text_column(table, options)
        texts = table.texts(column, "text_column")
        return Documents(path, dataset.from_dict({column: texts}), column, separate=True)
    try:
        chunks = list(_chunks(Path(path).read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}; convert it first, for example with iconv.") from error
    if not chunks:
        raise UserError(f"{path} is empty.")
    return Documents(path, dataset.from_dict({"text": chunks}), "text", separate=False)


def _chunks(text: str) -> Iterator[str]:
    """Cut at the ends of lines: nothing is lost, and few words meet a cut."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK) + 1 or len(text)
        yield text[start:end]
        start = end


def _text_column(table: Table, options: DataOptions) -> str:
    if options.text_column is None and len(table.columns) == 1:
        return next(iter(table.columns))
    name = options.text_column or "text"
    table.column(name, "text_column")  # refuses a name that is not there
    return name
