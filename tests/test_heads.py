"""Pruning attention heads: which ones, that they are gone, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import BERT, TOKENS, assert_same_tensors, layers_of, logits, net
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from peft_pst import PSTConfig, get_sparsity, prune_heads, prune_once, update_sparsity
from peft_pst.masking import num_pruned

HEADS, WIDTH = 4, 16  # heads of four


def bert(**options: object) -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {**BERT, "num_attention_heads": HEADS, **options}
    return BertForSequenceClassification(BertConfig(**shape, num_labels=3)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=20, n_embd=WIDTH, n_layer=2, n_head=HEADS)).eval()


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 24}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, **options}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()


def trained(base: nn.Module, seed: int = 0, **options: object) -> PeftModel:
    """After a dense stage: every trainable tensor of the adapter has moved."""
    model = get_peft_model(base, PSTConfig.dsee(**{"r": 2, "residual": 5, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pst_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def parts(model: PeftModel, kind: str, block: int) -> tuple[list[tuple[nn.Module, int]], nn.Module, str]:
    """Query, key and value as (layer, first row), the output projection, and the name, spelt out by architecture."""
    base = model.base_model.model
    if kind == "bert":
        attention = base.bert.encoder.layer[block].attention
        inputs = [(layer, 0) for layer in (attention.self.query, attention.self.key, attention.self.value)]
        return inputs, attention.output.dense, f"bert.encoder.layer.{block}.attention"
    if kind == "gpt2":
        attention = base.transformer.h[block].attn
        return [(attention.c_attn, row) for row in (0, 16, 32)], attention.c_proj, f"transformer.h.{block}.attn"
    attention = base.model.layers[block].self_attn
    inputs = [(layer, 0) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return inputs, attention.o_proj, f"model.layers.{block}.self_attn"


MAKE: dict[str, Callable[[], nn.Module]] = {"bert": bert, "gpt2": gpt2, "llama": llama}


def update_of(layer: nn.Module) -> Tensor:
    update = layer.pst_U["default"].detach() @ layer.pst_V["default"].detach()
    for position, value in zip(layer.pst_positions["default"], layer.pst_S["default"], strict=True):
        update.view(-1)[position] += value.detach()
    return update


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_least_changed_heads_are_dropped_exactly(kind: str, count: int) -> None:
    model = trained(MAKE[kind]())
    dropped = prune_heads(model, count)
    assert len(dropped) == 2
    touched = set()
    for block in (0, 1):
        inputs, output, name = parts(model, kind, block)
        scores = []
        for head in range(HEADS):
            rows = slice(4 * head, 4 * head + 4)
            total = update_of(output)[:, rows].abs().sum()
            for layer, start in inputs:
                total = total + update_of(layer)[start + rows.start : start + rows.stop].abs().sum()
            scores.append(total.item())
        assert dropped[name] == sorted(sorted(range(HEADS), key=lambda head: scores[head])[:count])
        expected = {layer: torch.ones(layer.out_features, 16, dtype=torch.bool) for layer, _ in inputs}
        expected[output] = torch.ones(16, 16, dtype=torch.bool)
        for head in dropped[name]:
            for layer, start in inputs:
                expected[layer][start + 4 * head : start + 4 * head + 4] = False
            expected[output][:, 4 * head : 4 * head + 4] = False
        for layer, keep in expected.items():
            assert torch.equal(layer.get_mask("default"), keep)
            assert layer.get_num_pruned("default") == int((~keep).sum())
        touched |= expected.keys()
    untouched = [layer for layer in layers_of(model).values() if layer not in touched]
    assert untouched
    assert all(layer.get_num_pruned("default") == 0 for layer in untouched)


def without_heads(model: nn.Module, dropped: dict[str, list[int]]) -> nn.Module:
    """The same model, whose dropped heads are silenced from outside, in the input of the output projection."""
    for name, heads in dropped.items():
        output = dict(model.named_modules())[f"{name}.output.dense"]

        def silence(module: nn.Module, args: tuple[Tensor, ...], heads: list[int] = heads) -> tuple[Tensor]:
            x = args[0].clone()
            for head in heads:
                x[..., 4 * head : 4 * head + 4] = 0
            return (x,)

        output.register_forward_pre_hook(silence)
    return model


def test_the_model_answers_as_one_without_these_heads() -> None:
    """Biases of the base are not zero, and a dropped head still says nothing."""
    base = bert()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    model = trained(base)
    whole = copy.deepcopy(model).merge_and_unload()
    dropped = prune_heads(model, 2)
    torch.testing.assert_close(logits(model), logits(without_heads(whole, dropped)))
    assert not torch.allclose(logits(model), logits(copy.deepcopy(model).unload()))


@pytest.mark.parametrize("kind", MAKE)
def test_saved_loaded_and_merged(tmp_path: Path, kind: str) -> None:
    model = trained(MAKE[kind]())
    dropped = prune_heads(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MAKE[kind](), tmp_path).eval()
    masks = [{name: layer.get_mask("default") for name, layer in layers_of(m).items()} for m in (loaded, model)]
    assert_same_tensors(*masks)
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(model)
    places = {block: parts(model, kind, block) for block in (0, 1)}
    merged = loaded.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged), expected)
    for _, output, name in places.values():
        weight = merged.get_submodule(output.module_name).weight.detach()
        weight = weight.T if kind == "gpt2" else weight
        silent = [head for head in range(HEADS) if not weight[:, 4 * head : 4 * head + 4].any()]
        assert silent == dropped[name]


def test_heads_stay_dropped_while_training_goes_on() -> None:
    model = trained(bert()).train()
    prune_heads(model, 3)
    sparsity = get_sparsity(model)
    before = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 4):
        model(input_ids=TOKENS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert update_sparsity(model, step, 3) == sparsity
    assert_same_tensors({name: layer.get_mask("default") for name, layer in layers_of(model).items()}, before)


def test_again_and_after_pruning_weights() -> None:
    """What is pruned stays pruned; the same count again changes nothing, a larger one drops more."""
    model = trained(bert())
    prune_once(model, 0.3)
    weights = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    two = prune_heads(model, 2)
    after = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    assert all((after[name] <= weights[name]).all() for name in after)
    with torch.no_grad():  # the update of a dropped head may go on moving, and counts no more
        for block, heads in enumerate(two.values()):
            for head in heads:
                attention = model.base_model.model.bert.encoder.layer[block].attention
                attention.self.query.pst_U["default"][4 * head : 4 * head + 4] += 10.0
    assert prune_heads(model, 2) == two
    assert_same_tensors({name: layer.get_mask("default") for name, layer in layers_of(model).items()}, after)
    three = prune_heads(model, 3)
    assert all(set(two[name]) < set(three[name]) for name in two)
    feed_forward = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    assert feed_forward.get_num_pruned("default") == num_pruned(feed_forward.num_weights, 0.3)


def test_only_the_adapted_blocks() -> None:
    assert [*prune_heads(trained(bert(), layers_to_transform=[1]), 1)] == ["bert.encoder.layer.1.attention"]


SHAPE = {"vocab_size": 40, "num_hidden_layers": 2}
OTHERS = {
    "roberta": lambda: RobertaModel(
        RobertaConfig(**SHAPE, hidden_size=16, num_attention_heads=4, intermediate_size=24, max_position_embeddings=20)
    ),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=40, dim=16, n_heads=4, n_layers=2, hidden_dim=24, max_position_embeddings=20)
    ),
    "opt": lambda: OPTModel(
        OPTConfig(**SHAPE, hidden_size=16, word_embed_proj_dim=16, num_attention_heads=4, ffn_dim=24)
    ),
    "vit": lambda: ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str) -> None:
    model = trained(OTHERS[kind]())
    dropped = prune_heads(model, 1)
    assert len(dropped) == (6 if kind == "t5" else 2)  # encoder, decoder and what the decoder reads of the encoder
    zeros = sum(layer.get_num_pruned("default") for layer in layers_of(model).values())
    assert zeros == len(dropped) * 4 * (4 * 16)


def test_keys_and_values_are_dropped_with_the_queries_that_read_them() -> None:
    model = trained(llama(num_key_value_heads=2))
    dropped = prune_heads(model, 1)
    for block, heads in enumerate(dropped.values()):
        attention = model.base_model.model.model.layers[block].self_attn
        update = {name: update_of(getattr(attention, name)).abs() for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        scores = []
        for head in (0, 1):
            queries, keys = slice(8 * head, 8 * head + 8), slice(4 * head, 4 * head + 4)
            own = (update["q_proj"][queries], update["k_proj"][keys], update["v_proj"][keys])
            scores.append(sum(part.sum().item() for part in (*own, update["o_proj"][:, queries])))
        assert heads == [scores.index(min(scores))]
        masks = {name: torch.ones_like(matrix, dtype=torch.bool) for name, matrix in update.items()}
        masks["q_proj"][8 * heads[0] : 8 * heads[0] + 8] = masks["o_proj"][:, 8 * heads[0] : 8 * heads[0] + 8] = False
        masks["k_proj"][4 * heads[0] : 4 * heads[0] + 4] = masks["v_proj"][4 * heads[0] : 4 * heads[0] + 4] = False
        assert_same_tensors({name: getattr(attention, name).get_mask("default") for name in masks}, masks)
    assert [*dropped] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


# Refusals


@pytest.mark.parametrize("count", [-1, 4, 12])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    model = trained(bert())
    message = rf"count={count} is outside \[0, 4\), the number of heads of bert\.encoder\.layer\.0\.attention; at"
    with pytest.raises(ValueError, match=message):
        prune_heads(model, count)
    assert get_sparsity(model) == 0.0


def test_an_attention_that_is_adapted_in_part_is_refused() -> None:
    model = trained(bert(), target_modules=["query", "value"])
    message = r"\['bert\.encoder\.layer\.0\.attention\.self\.key', '.*output\.dense'\] are not adapted.*target_modules"
    with pytest.raises(ValueError, match=message):
        prune_heads(model, 1)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no attention layer whose projections bear names that are known"):
        prune_heads(trained(net()), 1)
    with pytest.raises(ValueError, match="None of the adapted layers holds heads"):
        prune_heads(trained(bert(), target_modules=["intermediate.dense"]), 1)


def test_where_masks_would_not_stay_it_is_refused() -> None:
    with pytest.raises(ValueError, match="with mask_interval=1, adapter 'default' selects its mask anew"):
        prune_heads(trained(bert(), mask_interval=1), 1)


def test_several_active_adapters_are_refused() -> None:
    model = trained(bert())
    model.add_adapter("other", PSTConfig.dsee(r=2, residual=5))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"Adapters \['default', 'other'\] are active; activate the one"):
        prune_heads(model, 1)


def test_heads_that_do_not_fit_the_matrices_are_refused() -> None:
    model = trained(bert())
    for block in model.base_model.model.bert.encoder.layer:
        block.attention.self.num_attention_heads = 3
    with pytest.raises(ValueError, match=r"attention is not made of 3 heads of one width: .* 48 rows in all, its"):
        prune_heads(model, 1)
