"""Weights that stand in several places: refused, never untied or pruned unseen."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny_models import TOKENS, tiny_gpt2
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_pst import PSTConfig, report_model
from peft_pst.ties import shared_weights


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_either_end_of_a_tie_is_refused(target: str) -> None:
    model = tiny_gpt2()
    expected = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"Adapting \S*{target} is refused: transformer\.wte\.weight and lm_head"):
        get_peft_model(model, PSTConfig(target_modules=[target]))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_both_ends_of_a_tie_are_refused() -> None:
    with pytest.raises(ValueError, match="are one tensor"):
        get_peft_model(tiny_gpt2(), PSTConfig(target_modules=["wte", "lm_head"]))


@pytest.mark.parametrize("target", ["shared", "encoder.embed_tokens"])
def test_an_embedding_in_three_places_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"shared\.weight and encoder\.embed_tokens\.weight and decoder\.embed_tokens"):
        get_peft_model(tiny_t5(), PSTConfig(target_modules=[target]))


def test_the_remedy_of_the_message_works() -> None:
    model = tiny_gpt2()
    dense = model(TOKENS).logits
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    config = PSTConfig(target_modules=["wte", "lm_head"], initial_sparsity=0.5, r=2)
    adapted = get_peft_model(model, config).eval()
    before = adapted(TOKENS).logits
    assert not torch.allclose(before, dense)
    assert [row.name for row in report_model(adapted).layers] == ["transformer.wte", "lm_head"]
    merged = adapted.merge_and_unload()
    assert torch.equal(merged(TOKENS).logits, before)
    for weight in (merged.lm_head.weight, merged.transformer.wte.weight):
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_a_tie_made_after_the_adapter_is_found_when_merging() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    adapted = get_peft_model(model, PSTConfig(target_modules=["head"], initial_sparsity=0.5))
    adapted.base_model.model.head.get_base_layer().weight = adapted.base_model.model.embed.weight
    embeddings = adapted.base_model.model.embed.weight.clone()
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=r"Merging head is refused: embed\.weight and head\.base_layer\.weight"):
            merge()
    assert torch.equal(adapted.base_model.model.embed.weight, embeddings)


def test_a_module_in_two_places_is_refused_and_a_shared_block_is_not() -> None:
    """Replaced in one place, a module would stay as it was in the other; what holds it may stand where it likes."""
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"a\.weight and b\.weight are one tensor"):
        get_peft_model(nn.ModuleDict({"a": linear, "b": linear}), PSTConfig(target_modules=["a"]))
    block = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(
        nn.Sequential(block, block), PSTConfig(target_modules=["0.0"], initial_sparsity=0.5, r=1)
    ).eval()
    x = torch.randn(3, 4)
    before = model(x)
    merged = model.merge_and_unload()
    assert merged[0] is merged[1]
    assert torch.equal(merged(x), before)


def test_a_parameter_in_the_memory_of_another_is_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 5, bias=False), "b": nn.Linear(4, 5, bias=False)})
    assert shared_weights(model) == {}
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    expected = ["a.weight", "b.weight"]
    assert shared_weights(model) == {(model["a"], "weight"): expected, (model["b"], "weight"): expected}
    model.to("meta")
    model["b"].weight = model["a"].weight
    assert len(shared_weights(model)) == 2
