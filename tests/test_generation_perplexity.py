"""Perplexity against a loop that predicts one token at a time."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import WORDS
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from benchmarks.results.generation.perplexity import first_words, perplexity, read_text, split
from peft_pst.cli.errors import UserError

TEXT = "\n".join(" ".join(random.Random(line).choices(WORDS, k=9)) + " never-seen" for line in range(5))


@pytest.fixture
def model(gpt2: str) -> GPT2LMHeadModel:
    loaded = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return loaded


@pytest.fixture
def tokenizer(gpt2: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gpt2)


@pytest.fixture
def beginning(gpt2: str) -> PreTrainedTokenizerBase:
    """A tokenizer that puts a begin token before a text, as Llama's does."""
    loaded = AutoTokenizer.from_pretrained(gpt2, bos_token="[CLS]")
    begin = ("[CLS]", loaded.convert_tokens_to_ids("[CLS]"))
    loaded.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[begin])
    return loaded


@torch.no_grad()
def slow_nll(model: GPT2LMHeadModel, ids: list[int], context: int, stride: int, begin: list[int]) -> list[float]:
    """Each token after what stands before it in the first window that holds it; -log p in nats."""
    room = context - len(begin)
    losses = []
    for at in range(0 if begin else 1, len(ids)):
        window = next(start for start in range(0, len(ids), stride) if start <= at < start + room)
        logits = model(torch.tensor([begin + ids[window:at]])).logits[0, -1]
        losses.append(-logits.double().log_softmax(-1)[ids[at]].item())
    return losses


@pytest.mark.parametrize(
    ("context", "stride", "batch_size"), [(32, 16, 1), (32, 31, 4), (10, 3, 2), (10, 1, 8), (2, 1, 5), (31, 5, 100)]
)
def test_each_token_is_predicted_once_from_its_window(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, context: int, stride: int, batch_size: int
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    losses = slow_nll(model, ids, context, stride, begin=[])
    found = perplexity(model, tokenizer, TEXT, context=context, stride=stride, batch_size=batch_size, progress=False)
    assert found.predicted == len(losses) == len(ids) - 1
    assert found.words == 50 < len(ids)  # "never-seen" is one word of three tokens
    assert found.nll == pytest.approx(sum(losses), rel=1e-5)
    assert found.per_token == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.per_word == pytest.approx(math.exp(sum(losses) / 50), rel=1e-4)


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (10, 9), (2, 1)])
def test_a_begin_token_stands_before_each_window(
    model: GPT2LMHeadModel, beginning: PreTrainedTokenizerBase, context: int, stride: int
) -> None:
    ids = beginning(TEXT, add_special_tokens=False)["input_ids"]
    losses = slow_nll(model, ids, context, stride, begin=[beginning.bos_token_id])
    found = perplexity(model, beginning, TEXT, context=context, stride=stride, batch_size=2, progress=False)
    assert found.predicted == len(losses) == len(ids)
    assert found.nll == pytest.approx(sum(losses), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = perplexity(model, tokenizer, TEXT, context=8, stride=4, progress=False)
    assert found.per_token == pytest.approx(model.config.vocab_size)


def test_words_so_long_that_the_figure_overflows_are_infinite(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = perplexity(model, tokenizer, "red-" * 400, context=8, stride=4, progress=False)
    assert found.words == 1
    assert found.per_word == math.inf
    assert math.isfinite(found.per_token)


def test_dropout_and_gradients_are_off_and_come_back(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = perplexity(model, tokenizer, TEXT, context=8, stride=4, progress=False)
    model.train()
    with_gradients = []
    model.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    assert perplexity(model, tokenizer, TEXT, context=8, stride=4, progress=False) == expected
    assert model.training
    assert with_gradients
    assert not any(with_gradients)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_windows_predict_every_token_once_and_after_enough_others(
    length: int, context: int, stride: int, begins: bool
) -> None:
    first = 0 if begins else 1
    stride = min(stride, context - first)
    if stride < 1:
        return
    windows = list(split(length, context, stride, first))
    predicted = [token for window in windows for token in range(window.scored, window.end)]
    assert predicted == list(range(first, length))
    assert all(window.end - window.begin <= context for window in windows)
    assert all(window.scored - window.begin >= context - stride for window in windows[1:])
    assert all(window.scored > window.begin for window in windows[1 - first :] if not begins)


@pytest.mark.parametrize(
    ("text", "context", "stride", "message"),
    [
        (TEXT, 33, 16, r"context=33 is more than the 32 tokens"),
        (TEXT, 32, 32, r"stride=32 is not in 1 to 31, .*context=32"),
        (TEXT, 32, 0, r"stride=0 is not in 1 to 31"),
        ("red", 32, 16, r"'red' has 1 tokens and 1 words: nothing to predict"),
        (" \n", 32, 16, r"has 0 tokens and 0 words"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, text: str, context: int, stride: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(model, tokenizer, text, context=context, stride=stride, progress=False)


def test_texts_are_read_whole_or_by_words(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text(" \n = Title = \n Some words .\n", encoding="utf-8")
    assert read_text(path) == " \n = Title = \n Some words .\n"
    assert read_text(path, words=4) == " \n = Title = \n Some"
    assert first_words("a b", 5) == "a b"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"test.txt is not UTF-8"):
        read_text(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match=r"test.txt has no words"):
        read_text(path)
    with pytest.raises(UserError, match=r"none.txt: there is no such file"):
        read_text(tmp_path / "none.txt")
