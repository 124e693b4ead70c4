"""Rows for training: ids, labels, truncation, padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.results.generation.linearise import Example
from benchmarks.results.generation.tokens import (
    IGNORED,
    encode_examples,
    encode_sources,
    padding_collator,
    separator_id,
)
from peft_pst.cli.errors import UserError

EXAMPLES = [
    Example("the film", ("very good", "not bad"), "all"),
    Example("a red plot was dull", ("poor",), "all"),
]


@pytest.fixture
def tokenizer(gpt2: str) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(gpt2)
    loaded.pad_token = loaded.eos_token
    return loaded


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(word) for word in text.split()]


def test_the_loss_is_on_the_reference_and_its_end_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_examples(EXAMPLES, tokenizer, max_length=32)
    end = [tokenizer.eos_token_id]
    expected = []
    for source, reference in (("the film", "very good"), ("the film", "not bad"), ("a red plot was dull", "poor")):
        prompt, target = ids(tokenizer, source) + end, ids(tokenizer, reference) + end
        expected.append({"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target})
    assert encoded.rows == expected
    assert encoded.truncated == 0
    assert encode_examples([], tokenizer, max_length=32) == ([], 0)


def test_prompts_at_test_time_are_those_of_training(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = encode_sources([example.source for example in EXAMPLES], tokenizer)
    rows = encode_examples(EXAMPLES, tokenizer, max_length=32).rows
    for prompt, row in zip(prompts, (rows[0], rows[2]), strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt) + 1] == [IGNORED] * len(prompt) + [row["input_ids"][len(prompt)]]


def test_a_long_row_loses_the_end_of_its_source_and_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_examples(EXAMPLES, tokenizer, max_length=6)
    end = tokenizer.eos_token_id
    assert encoded.truncated == 1  # the first two rows take six tokens exactly
    assert [len(row["input_ids"]) for row in encoded.rows] == [6, 6, 6]
    assert encoded.rows[2]["input_ids"] == [*ids(tokenizer, "a red plot"), end, *ids(tokenizer, "poor"), end]
    assert encoded.rows[2]["labels"] == [IGNORED] * 4 + [*ids(tokenizer, "poor"), end]


def test_a_reference_is_never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(encode_examples(EXAMPLES, tokenizer, max_length=4).rows[0]["input_ids"]) == 4
    with pytest.raises(UserError, match=r"the reference 'very good' .* takes 4 tokens, more than max_length=3"):
        encode_examples(EXAMPLES, tokenizer, max_length=3)


def test_separator_is_the_begin_token_or_the_end_token(tmp_path: Path) -> None:
    both = save_tokenizer(tmp_path, bos_token="[CLS]", eos_token="[EOS]")
    assert separator_id(both) == both.bos_token_id != both.eos_token_id
    assert separator_id(save_tokenizer(tmp_path, eos_token="[EOS]")) == both.eos_token_id
    neither = save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="neither a begin nor an end token"):
        separator_id(neither)
    with pytest.raises(UserError, match="no end token"):
        encode_examples(EXAMPLES, neither, max_length=32)


def test_a_padded_batch_has_the_loss_of_its_references(gpt2: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    rows = encode_examples(EXAMPLES, tokenizer, max_length=32).rows
    batch = padding_collator(tokenizer)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, 8)
    assert batch["labels"].ne(IGNORED).sum(1).tolist() == [3, 3, 2]
    losses = []
    with torch.no_grad():
        for row in rows:  # without padding, one token at a time
            for at, label in enumerate(row["labels"]):
                if label != IGNORED:
                    logits = model(torch.tensor([row["input_ids"][:at]])).logits[0, -1]
                    losses.append(-logits.log_softmax(-1)[label])
        torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())
