"""Beam search against exhaustive and greedy search written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from benchmarks.results.generation.decode import NoRepeatedNGram, beam_search
from benchmarks.results.generation.tokens import encode_sources
from peft_pst import PSTConfig
from peft_pst.cli.errors import UserError

SOURCES = ["the film", "a red plot was dull and poor", "blue", "the cast was very good", "not"]


@pytest.fixture
def tokenizer(gpt2: str) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(gpt2)
    loaded.pad_token = loaded.eos_token
    return loaded


@pytest.fixture
def model(gpt2: str) -> GPT2LMHeadModel:
    """Weights spread so far that the tokens' probabilities differ clearly."""
    loaded = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return loaded


@torch.no_grad()
def log_probabilities(model: GPT2LMHeadModel, ids: list[int]) -> list[float]:
    return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()


def greedy(model: GPT2LMHeadModel, prompt: list[int], end: int, steps: int, size: int) -> list[int]:
    found: list[int] = []
    while len(found) < steps and end not in found:
        scores = log_probabilities(model, prompt + found)
        before = {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}
        free = [token for token in range(len(scores)) if (*found[len(found) - size + 1 :], token) not in before]
        found.append(max(free, key=scores.__getitem__))
    return found


def test_one_beam_is_greedy_search_without_repeated_pairs(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    end = tokenizer.eos_token_id
    expected = [
        tokenizer.decode(greedy(model, prompt, end, steps=12, size=2), skip_special_tokens=True).strip()
        for prompt in encode_sources(SOURCES, tokenizer)
    ]
    options = {"beams": 1, "max_new_tokens": 12, "progress": False}
    assert beam_search(model, tokenizer, SOURCES, no_repeat_ngram=2, **options) == expected
    assert beam_search(model, tokenizer, SOURCES, no_repeat_ngram=0, **options) != expected


@pytest.mark.parametrize("length_penalty", [0.0, 0.8, 3.0])
def test_enough_beams_find_the_best_of_all_texts(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, length_penalty: float
) -> None:
    end, vocabulary = tokenizer.eos_token_id, range(model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # so flat that the penalty decides whether the end comes first

    def best(prompt: list[int]) -> list[int]:
        first = log_probabilities(model, prompt)
        worth = {(end,): first[end]}
        second = {a: log_probabilities(model, [*prompt, a]) for a in vocabulary if a != end}
        for a, b in itertools.product(second, vocabulary):
            worth[a, b] = (first[a] + second[a][b]) / 2**length_penalty
        return list(max(worth, key=worth.__getitem__))

    expected = [
        tokenizer.decode(best(prompt), skip_special_tokens=True).strip()
        for prompt in encode_sources(SOURCES, tokenizer)
    ]
    assert all(expected) == (length_penalty > 1)
    found = beam_search(
        model,
        tokenizer,
        SOURCES,
        beams=len(vocabulary),
        length_penalty=length_penalty,
        max_new_tokens=2,
        progress=False,
    )
    assert found == expected


def test_batches_change_nothing(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    def decoded(batch_size: int) -> list[str]:
        return beam_search(model, tokenizer, SOURCES, beams=3, max_new_tokens=8, batch_size=batch_size, progress=False)

    one_by_one = decoded(1)
    assert len(set(one_by_one)) > 1
    assert decoded(2) == decoded(5) == decoded(5) == one_by_one
    assert beam_search(model, tokenizer, [], progress=False) == []


def test_an_ngram_of_the_prompt_may_be_copied_once() -> None:
    rule = NoRepeatedNGram(size=4, prompt_length=5)
    prompt, scores = [9, 1, 2, 3, 4], torch.zeros(2, 10)
    ids = torch.tensor([[*prompt, 5, 5, 5, 5, 1, 2, 3], [*prompt, 1, 2, 3, 4, 1, 2, 3]])
    forbidden = rule(ids, scores).isinf().nonzero().tolist()
    assert forbidden == [[1, 4]]


def test_dropout_is_off_and_comes_back(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = beam_search(model, tokenizer, SOURCES, max_new_tokens=6, progress=False)
    model.train()
    model.lm_head.eval()
    assert beam_search(model, tokenizer, SOURCES, max_new_tokens=6, progress=False) == expected
    assert model.training
    assert model.transformer.drop.training
    assert not model.lm_head.training


def test_the_models_own_settings_do_not_leak_in(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = beam_search(model, tokenizer, SOURCES, max_new_tokens=6, progress=False)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=50.0, num_beams=2)
    assert beam_search(model, tokenizer, SOURCES, max_new_tokens=6, progress=False) == expected


@pytest.mark.filterwarnings("ignore:.*prunes nothing")
def test_an_adapter_decodes_as_its_base_does(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = beam_search(model, tokenizer, SOURCES, max_new_tokens=6, progress=False)
    adapted = get_peft_model(model, PSTConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    assert beam_search(adapted, tokenizer, SOURCES, max_new_tokens=6, progress=False) == expected


def test_what_cannot_be_decoded_is_refused(
    gpt2: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=r"'the film' takes 3 tokens; with max_new_tokens=30 .* more than the 32"):
        beam_search(model, tokenizer, ["a", "the film"], max_new_tokens=30, progress=False)
    beam_search(model, tokenizer, ["a", "the film"], beams=1, max_new_tokens=29, progress=False)
    with pytest.raises(UserError, match=r"no pad token"):
        beam_search(model, AutoTokenizer.from_pretrained(gpt2), SOURCES, progress=False)
