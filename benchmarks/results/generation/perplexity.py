"""Perplexity of a causal language model on a plain text, read through windows that overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from re import finditer
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from peft_pst.cli.errors import UserError

from .causal_model import evaluating, max_positions
from .tokens import IGNORED


class Perplexity(NamedTuple):
    """How well a model predicts a text.

    Attributes:
        per_token: exp(nll / predicted), 1 up; compares models of one tokenizer.
        per_word: exp(nll / words), 1 up; compares any models.
        nll: sum of the negative log-likelihoods of the predicted tokens, in nats.
        predicted: tokens that were predicted: all of the text, but the first where no begin token stands before it.
        words: runs of anything but white space. WikiText's authors count an end mark a line as well, so that their
            figures per word are lower.
    """

    per_token: float
    per_word: float
    nll: float
    predicted: int
    words: int


class Window(NamedTuple):
    """Tokens `begin` to `end` are read, and of these `scored` to `end` are predicted; `end` is exclusive."""

    begin: int
    scored: int
    end: int


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 1024,
    stride: int = 512,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Predict each token of a text once, after at least `context - stride` others as far as there are so many.

    Where the tokenizer puts a begin token before a text, each window starts with one.

    Args:
        model: a decoder-only model, with or without an adapter; put into eval mode for the time.
        tokenizer: its tokenizer.
        text: any text, such as the whole of WikiText-2's test.txt.
        context: tokens the model reads at a time, the begin token included.
        stride: tokens from one window's start to the next's, at least 1, below `context`; smaller is more exact.
        batch_size: windows at a time.
        progress: whether to show a bar.

    Raises:
        UserError: if `context` or `stride` is out of range, or the text has no word or no token to predict.
    """
    start = _begin_tokens(tokenizer)
    room, first = context - len(start), 0 if start else 1
    _check_windows(model, context, room, stride, first)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    predicted, words = len(ids) - first, len(text.split())
    if predicted < 1 or not words:
        raise UserError(f"the text {text[:60]!r} has {len(ids)} tokens and {words} words: nothing to predict.")
    windows = list(split(len(ids), room, stride, first))
    nll = 0.0
    with evaluating(model), tqdm(total=predicted, desc="Perplexity", disable=not progress) as bar:
        for group in _batches(windows, batch_size):
            nll += _negative_log_likelihood(model, ids, start, group)
            bar.update(sum(window.end - window.scored for window in group))
    return Perplexity(_exp(nll / predicted), _exp(nll / words), nll, predicted, words)


def split(length: int, context: int, stride: int, first: int = 1) -> Iterator[Window]:
    """Windows that start every `stride` tokens and predict each token from `first` on exactly once.

    Example:
        >>> [tuple(window) for window in split(length=10, context=4, stride=3)]
        [(0, 1, 4), (3, 4, 7), (6, 7, 10)]
    """
    scored = first
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        yield Window(begin, scored, end)
        if end == length:
            return
        scored = end


def read_text(path: str | Path, words: int | None = None) -> str:
    """A plain text in UTF-8, or its first `words` words.

    Raises:
        UserError: if the file is missing, not UTF-8, or has no words.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}; convert it first, for example with iconv.") from error
    if not text.strip():
        raise UserError(f"{path} has no words.")
    return text if words is None else first_words(text, words)


def first_words(text: str, count: int) -> str:
    """The text up to the end of its `count`-th word, or all of it.

    Example:
        >>> first_words(" one  two three", 2)
        ' one  two'
    """
    last = next(islice(finditer(r"\S+", text), count - 1, None), None)
    return text if last is None else text[: last.end()]


def _begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token where the tokenizer puts one before a text by itself, as the model then saw in pretraining."""
    added = tokenizer("")["input_ids"]
    return (
        [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id] else []
    )


def _check_windows(model: Any, context: int, room: int, stride: int, first: int) -> None:
    limit = max_positions(model)
    if limit is not None and context > limit:
        raise UserError(f"context={context} is more than the {limit} tokens that the model can read; lower it.")
    # Without a begin token a window of one token, or one that starts where the last one ended, has a token without any
    # before it.
    if not 1 <= stride <= room - first:
        raise UserError(
            f"stride={stride} is not in 1 to {room - first}, the tokens that a window of context={context} predicts."
        )


def _batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Windows of one length at a time, so that nothing is padded; all but the last are of one length."""
    for _, same in groupby(windows, key=lambda window: window.end - window.begin):
        group = list(same)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _negative_log_likelihood(model: Any, ids: list[int], start: list[int], group: list[Window]) -> float:
    """Nats of the tokens that these windows predict, summed in float64."""
    rows = torch.tensor([start + ids[window.begin : window.end] for window in group], device=model.device)
    labels = rows.clone()
    firsts = [len(start) + window.scored - window.begin for window in group]
    for row, first in enumerate(firsts):
        labels[row, :first] = IGNORED
    logits = model(input_ids=rows, use_cache=False).logits[:, min(firsts) - 1 : -1]
    targets = labels[:, min(firsts) :]
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.double().sum().item()


def _exp(value: float) -> float:
    """Infinity where `math.exp` would raise: a text of few and endless words is no reason to lose the rest."""
    return torch.tensor(value, dtype=torch.float64).exp().item()
