"""Examples as token ids: source, separator, reference, end; the loss on the reference and its end alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from peft_pst.cli.errors import UserError

from .linearise import Example, training_pairs

IGNORED = -100  # the label that torch's and transformers' cross-entropy leave out


class Encoded(NamedTuple):
    """Training rows.

    Attributes:
        rows: one a reference, each with `input_ids` and `labels`, lists of the same length.
        truncated: number of rows whose source lost its end to fit; references are never cut.
    """

    rows: list[dict[str, list[int]]]
    truncated: int


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between source and reference: the tokenizer's begin token, or its end token where it has none.

    For GPT-2 both are `<|endoftext|>`, as in the paper's code.

    Raises:
        UserError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a begin nor an end token to separate source and reference; set one.")


def encode_sources(sources: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids that a model is to continue: the source as the tokenizer encodes a text, then the separator."""
    end = [separator_id(tokenizer)]
    return [ids + end for ids in tokenizer(sources, verbose=False)["input_ids"]] if sources else []


def encode_examples(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Rows for training, one a reference.

    A row longer than `max_length` loses the end of its source; separator, reference and end token always stay.

    Args:
        examples: what to encode.
        tokenizer: the model's own, with an end token.
        max_length: tokens a row at most, above 2.

    Raises:
        UserError: if the tokenizer has no end token, or a reference does not fit into `max_length`.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token, so a model could not learn where a text ends; set one.")
    pairs = training_pairs(examples)
    if not pairs:
        return Encoded([], 0)
    sources = encode_sources([source for source, _ in pairs], tokenizer)
    texts = [reference for _, reference in pairs]
    targets = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows, truncated = [], 0
    for source, target, text in zip(sources, targets, texts, strict=True):
        prompt = _shortened(source, max_length - len(target) - 1, text, max_length)
        truncated += len(prompt) < len(source)
        labels = [*target, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + labels, "labels": [IGNORED] * len(prompt) + labels})
    return Encoded(rows, truncated)


def _shortened(source: list[int], room: int, reference: str, max_length: int) -> list[int]:
    """The source without so much of its end that it fits into `room` tokens, its separator included."""
    if room < 1:
        raise UserError(
            f"the reference {reference[:60]!r} with separator and end takes {max_length - room + 1} tokens, more than "
            f"max_length={max_length}; raise it or leave the example out."
        )
    return source if len(source) <= room else source[: room - 1] + source[-1:]


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads rows to the longest of a batch: `input_ids` with the pad token, `attention_mask` 0, `labels` ignored."""
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
