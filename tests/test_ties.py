"""Weights that stand in several places: refused, never untied or pruned unseen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import TOKENS, tiny_bert, tiny_gpt2
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


def two(a: torch.Tensor, b: torch.Tensor) -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(*a.T.shape, bias=False), "b": nn.Linear(*b.T.shape, bias=False)})
    model["a"].weight, model["b"].weight = nn.Parameter(a), nn.Parameter(b)
    return model


def views() -> dict[str, tuple[tuple[torch.Tensor, torch.Tensor], bool]]:
    """Pairs of tensors in one storage, and whether they have an element in common."""
    store = torch.arange(48.0).view(8, 6)
    return {
        "the first rows": ((store, store[:4]), True),
        "the last rows": ((store, store[4:]), True),
        "rows that follow": ((store[:4], store[4:]), False),
        "rows that overlap": ((store[:5], store[4:]), True),
        "a column": ((store, store[:, 2:3]), True),
        "columns that follow": ((store[:, :3], store[:, 3:]), False),
        "alternate columns": ((store[:, ::2], store[:, 1::2]), False),
        "columns that overlap": ((store[:, :4], store[:, 3:]), True),
        "transposed, in part": ((store[:6], store.T[:, 2:]), True),
        "of another type": ((store, store.view(torch.float64)[2:4]), True),
        "expanded": ((store[:, :1].expand(8, 4), store[:, 1:]), False),
    }


@pytest.mark.parametrize("case", views())
def test_parameters_that_share_a_part_of_their_memory(case: str) -> None:
    tensors, overlap = views()[case]
    for a, b in (tensors, tensors[::-1]):
        model = two(a, b)
        both = ["a.weight", "b.weight"]
        expected = {(model["a"], "weight"): both, (model["b"], "weight"): both} if overlap else {}
        assert shared_weights(model) == expected


def test_overlaps_hang_together_and_neighbours_in_one_storage_do_not() -> None:
    store = torch.zeros(100)
    slices = {"a": (0, 10), "b": (8, 20), "c": (19, 30), "d": (30, 40), "e": (60, 100), "f": (70, 80), "g": (80, 90)}
    model = nn.ModuleDict({name: nn.Module() for name in slices})
    for name, (start, stop) in slices.items():
        model[name].weight = nn.Parameter(store[start:stop])
    found = {places[0][0]: "".join(place[0] for place in places) for places in shared_weights(model).values()}
    assert found == {"a": "abc", "e": "efg"}


def test_a_part_of_a_weight_is_neither_adapted_nor_untied_by_merging() -> None:
    whole = torch.randn(8, 8)
    message = r"refused: a\.weight and b\.weight are one tensor, or have parts of one in common"
    with pytest.raises(ValueError, match=f"Adapting b is {message}"):
        get_peft_model(two(whole, whole[:4]), PSTConfig(target_modules=["b"]))
    model = two(whole, whole[:4].clone())
    adapted = get_peft_model(model, PSTConfig(target_modules=["a"], initial_sparsity=0.5))
    model["b"].weight = nn.Parameter(whole[:4])
    with pytest.raises(ValueError, match=r"Merging a is refused: a\.base_layer\.weight and b\.weight are one tensor"):
        adapted.merge_adapter()


def test_a_model_read_from_one_file_is_not_tied(tmp_path: Path) -> None:
    """Its tensors lie in one mapped file, one beside the other."""
    base = tiny_bert()
    torch.save(base.state_dict(), tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", mmap=True)
    base.load_state_dict(stored, assign=True)
    assert shared_weights(base) == {}
    get_peft_model(base, PSTConfig())
