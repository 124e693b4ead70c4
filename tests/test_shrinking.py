"""Shrinking: what is idle goes, answers stay, and stock transformers load what is left."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coupling import SHAPE, T5, TEXT, answer, made
from tiny_models import tiny_bert, tiny_gpt2
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, find_heads, find_neurons, shrink
from peft_pst.coupling import CoupledGroups
from peft_pst.shrinking import groups_in_use

GROUPED = {**TEXT, "num_key_value_heads": 2, "num_attention_heads": 8, "head_dim": 4}
LOADED: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "llama-grouped": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "t5-gated": lambda: T5ForConditionalGeneration(
        T5Config(**T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, image_size=8, patch_size=4)),
}


class Case(NamedTuple):
    """Which of the groups are idle in each layer, in turn, and what the configuration should then say."""

    neurons: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    settings: dict[str, int]


NEURONS = (tuple(range(0, 24, 2)), tuple(range(10)))  # 12 of 24 in use in one layer, 14 in the other
CASES = {
    "bert": Case(NEURONS, ((),), {"intermediate_size": 14}),
    "gpt2": Case((tuple(range(40)), tuple(range(10, 44))), ((),), {"n_inner": 30}),
    "llama": Case(NEURONS, ((0, 2), (1, 3)), {"intermediate_size": 14, "num_attention_heads": 2, "head_dim": 4}),
    "llama-grouped": Case(
        NEURONS, ((0,), (1,)), {"intermediate_size": 14, "num_attention_heads": 4, "num_key_value_heads": 1}
    ),
    "mistral": Case(
        NEURONS, ((0,), (1,)), {"intermediate_size": 14, "num_attention_heads": 4, "num_key_value_heads": 1}
    ),
    "qwen2": Case(NEURONS, ((1,), (0,)), {"intermediate_size": 14, "num_attention_heads": 4, "num_key_value_heads": 1}),
    # Encoder, encoder, decoder on itself, on the encoder, on itself, on the encoder; heads read one bias in each stack.
    "t5": Case(NEURONS, ((0, 2), (0, 2), (3,), (0,), (3,), (1, 2)), {"d_ff": 14, "num_heads": 3, "d_kv": 8}),
    "t5-gated": Case(NEURONS, ((0,), (0, 3), (2, 3), (0,), (2,), (1, 2)), {"d_ff": 14, "num_heads": 3}),
    "vit": Case(NEURONS, ((1,), (3,)), {"intermediate_size": 14, "num_attention_heads": 3, "head_dim": 4}),
}


def loaded(kind: str) -> PreTrainedModel:
    """Every weight and bias random, and large enough to matter."""
    torch.manual_seed(0)
    model = LOADED[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@torch.no_grad()
def silence(model: nn.Module, groups: CoupledGroups, idle: tuple[int, ...], axes: tuple[int, ...] = (0, 1)) -> None:
    """Zero what masks zero: the weights of these heads or neurons, not their biases."""
    for part in groups.parts:
        module = model.get_submodule(part.module)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        for group in idle if part.axis in axes else ():
            lines = slice(part.start + group * part.width, part.start + (group + 1) * part.width)
            weight[(slice(None), lines) if part.axis else (lines,)] = 0.0


def silenced(kind: str, case: Case) -> PreTrainedModel:
    model = loaded(kind)
    for find, idle in ((find_neurons, case.neurons), (find_heads, case.heads)):
        for index, groups in enumerate(find(model)):
            silence(model, groups, idle[index % len(idle)])
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel) -> Tensor:
    if isinstance(model, ViTForImageClassification):
        return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)).logits
    tokens = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])
    decoder = {"decoder_input_ids": tokens[:, :3]} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **decoder).logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_settings(config: object, expected: Mapping[str, int]) -> None:
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("kind", CASES)
def test_the_shrunk_model_answers_alike_and_is_loaded_by_stock_transformers(tmp_path: Path, kind: str) -> None:
    case = CASES[kind]
    model = silenced(kind, case)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    small, report = shrink(model)
    assert_close(outputs(small), before)
    assert_settings(small.config, case.settings)
    small.save_pretrained(tmp_path)
    reloaded, info = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(reloaded), outputs(small))
    assert_settings(reloaded.config, case.settings)
    assert report.parameters_after == sum(p.numel() for p in reloaded.parameters()) < report.parameters_before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def numbers(model: nn.Module) -> set[tuple[str, int]]:
    return {(groups.kind, groups.num_groups) for find in (find_heads, find_neurons) for groups in find(model)}


def test_layers_shrink_to_the_largest_number_in_use() -> None:
    small, report = shrink(silenced("llama-grouped", CASES["llama-grouped"]))
    assert numbers(small) == {("heads", 1), ("neurons", 14)}
    of_neurons = [layer for layer in report.layers if layer.kind == "neurons"]
    assert [(layer.name, layer.before, layer.in_use, layer.after) for layer in of_neurons] == [
        ("model.layers.0.mlp", 24, 12, 14),
        ("model.layers.1.mlp", 24, 14, 14),
    ]
    assert [int(groups_in_use(small, groups).sum()) for groups in find_neurons(small)] == [12, 14]
    assert report.settings == {
        "intermediate_size": (24, 14),
        "num_attention_heads": (8, 4),
        "num_key_value_heads": (2, 1),
    }
    assert json.loads(json.dumps(report.to_dict()))["layers"][2] == dataclasses.asdict(of_neurons[0])
    table = report.to_table()
    assert "12 to 14" in table
    assert "num_key_value_heads: 2 -> 1" in table


IDLE = st.tuples(*[st.sets(st.integers(0, 23), max_size=23).map(lambda idle: tuple(sorted(idle)))] * 2)


@settings(max_examples=12)
@given(neurons=IDLE, heads=st.tuples(*[st.sampled_from([(), (0,), (1,), (2,), (0, 3), (0, 1, 2)])] * 2))
def test_whatever_is_idle(neurons: tuple[tuple[int, ...], ...], heads: tuple[tuple[int, ...], ...]) -> None:
    """Every head and neuron in use stays, as many as the largest layer needs are left, and answers are the same."""
    model = silenced("vit", Case(neurons, heads, {}))
    expected = {"intermediate_size": 24 - min(map(len, neurons)), "num_attention_heads": 4 - min(map(len, heads))}
    if expected == {"intermediate_size": 24, "num_attention_heads": 4}:
        with pytest.raises(ValueError, match=r"nothing to remove|Prune every layer"):
            shrink(model)
        return
    small, _ = shrink(model)
    assert_settings(small.config, expected)
    assert_close(outputs(small), outputs(model))


def test_the_heads_of_t5_that_read_one_position_bias_stay_the_same_in_all_layers() -> None:
    """Heads 2 and 3 of one encoder layer and 0 and 2 of the other are idle: only head 2 can go."""
    case = Case(((),), ((2, 3), (0, 2), (2,), (2,), (2,), (2,)), {})
    model = silenced("t5", case)
    small, report = shrink(model)
    assert_close(outputs(small), outputs(model))
    assert [layer.after for layer in report.layers if layer.kind == "heads"] == [3] * 6
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(small.state_dict()[bias], model.state_dict()[bias][:, [0, 1, 3]])


def test_a_number_that_the_configuration_refuses_is_rounded_up() -> None:
    """Llama's hidden size has to be a multiple of the number of heads: three heads in use become four of eight."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_attention_heads": 8, "head_dim": 6})).eval()
    for groups in find_heads(model):
        silence(model, groups, (0, 1, 2, 5, 6))
    small, report = shrink(model)
    assert numbers(small) == {("heads", 4), ("neurons", 24)}
    assert_close(outputs(small), outputs(model))
    assert {(layer.in_use, layer.after) for layer in report.layers if layer.kind == "heads"} == {(3, 4)}


OTHERS = {
    "distilbert": {"hidden_dim": 14},
    "modernbert": {"intermediate_size": 14},
    "opt": {"ffn_dim": 14},
    "phi3": {"intermediate_size": 14},
    "gpt-neox": {"intermediate_size": 14},
    "falcon": {"ffn_hidden_size": 14},
    "albert": {"intermediate_size": 12},
    "bart": {"encoder_ffn_dim": 14, "decoder_ffn_dim": 10},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_neurons_of_other_architectures(kind: str) -> None:
    model = made(kind)
    for index, groups in enumerate(find_neurons(model)):
        silence(model, groups, NEURONS[index % 2])
    small, _ = shrink(model)
    assert_close(answer(small), answer(model))
    assert_settings(small.config, OTHERS[kind])


# What does nothing


def in_use(model: PreTrainedModel, groups: CoupledGroups) -> list[int]:
    return groups_in_use(model, groups).nonzero().squeeze(1).tolist()


def test_rows_of_zeros_are_enough_only_without_bias() -> None:
    model = loaded("bert")
    layer = model.bert.encoder.layer[0]
    neurons, heads = find_neurons(model)[0], find_heads(model)[0]
    silence(model, neurons, (1, 2), axes=(0,))
    silence(model, heads, (1, 3), axes=(0,))
    assert in_use(model, neurons) == [*range(24)]
    assert in_use(model, heads) == [0, 1, 2, 3]
    with torch.no_grad():
        layer.intermediate.dense.bias[2] = 0.0
        layer.attention.self.value.bias[12:16] = 0.0
        layer.attention.self.query.bias[4:8] = 0.0
    assert in_use(model, neurons) == [0, 1, *range(3, 24)]
    assert in_use(model, heads) == [0, 1, 2]


def test_a_neuron_that_is_not_zero_at_zero_is_in_use() -> None:
    model = BertForSequenceClassification(BertConfig(**TEXT, hidden_act="sigmoid"))
    neurons = find_neurons(model)[0]
    silence(model, neurons, (1, 2), axes=(0,))
    assert in_use(model, neurons) == [*range(24)]


def test_either_factor_of_a_gated_neuron_is_enough() -> None:
    model = loaded("llama")
    neurons = find_neurons(model)[0]
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3] = 0.0
        model.model.layers[0].mlp.up_proj.weight[5] = 0.0
        model.model.layers[0].mlp.down_proj.weight[:, 7] = 0.0
        model.model.layers[0].self_attn.q_proj.weight[:8] = 0.0  # a head that attends to everything alike
        model.model.layers[0].self_attn.v_proj.weight[12:] = 0.0
    assert in_use(model, neurons) == [n for n in range(24) if n not in (3, 5, 7)]
    assert in_use(model, find_heads(model)[0]) == [0, 1, 2]


def test_a_layer_without_any_head_in_use_keeps_one() -> None:
    model = silenced("llama", Case(((),), ((0, 1, 2, 3), (0, 1, 2, 3)), {}))
    small, report = shrink(model)
    assert numbers(small) == {("heads", 1), ("neurons", 24)}
    assert_close(outputs(small), outputs(model))
    assert {layer.in_use for layer in report.layers if layer.kind == "heads"} == {0}


# The rest of the model


def test_half_precision_training_mode_and_frozen_ties() -> None:
    model = silenced("gpt2", CASES["gpt2"]).to(torch.bfloat16).train()
    model.generation_config.max_new_tokens = 7
    small, _ = shrink(model)
    assert small.dtype == torch.bfloat16
    assert small.training
    assert model.training
    assert small.lm_head.weight is small.transformer.wte.weight
    assert small.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert small.generation_config.max_new_tokens == 7


def test_a_model_made_without_its_pooler_stays_without() -> None:
    model = made("bert")
    model.pooler = None
    for groups in find_neurons(model):
        silence(model, groups, (0, 5))
    small, _ = shrink(model)
    assert small.pooler is None
    assert_close(answer(small), answer(model))


@pytest.mark.slow
def test_in_a_new_process(tmp_path: Path) -> None:
    """Stock transformers alone; importing the package is an error there."""
    model = silenced("vit", CASES["vit"])
    shrink(model)[0].save_pretrained(tmp_path)
    script = f"""
import sys
sys.modules["peft_pst"] = None
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(tmp_path)!r}).eval()
with torch.no_grad():
    print(model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)).logits.tolist())
"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert_close(torch.tensor(json.loads(said)), outputs(model))


# Refusals


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_heads_as_wide_as_the_hidden_size_over_their_number_cannot_go(kind: str) -> None:
    model = silenced(kind, Case(((0, 1),), ((1,),), {}))
    with pytest.raises(ValueError, match=r"1 of 4 heads do nothing, but no setting of .*Config changes.*find_neurons"):
        shrink(model)
    small, _ = shrink(model, find_neurons(model))
    assert_close(outputs(small), outputs(model))


def test_what_is_not_wholly_zero_stays() -> None:
    model = tiny_bert()
    with torch.no_grad():
        for groups in find_neurons(model):
            weight = model.get_submodule(groups.modules[-1]).weight
            weight[:-1] = 0.0
    with pytest.raises(ValueError, match="Every head and neuron of 4 layers is in use"):
        shrink(model)
    silence(model, find_neurons(model)[0], (3,))
    with pytest.raises(ValueError, match=r"one of these uses all of its own.*Prune every layer"):
        shrink(model)


def test_an_adapted_model_is_refused() -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny_gpt2(), PSTConfig())
    for adapted in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"is no plain transformers model; merge the adapter first"):
            shrink(adapted)


def test_a_model_that_its_class_does_not_build_is_refused() -> None:
    model = silenced("bert", CASES["bert"])
    model.classifier = nn.Sequential(nn.Linear(16, 2))
    with pytest.raises(ValueError, match=r"does not build this model from its configuration: classifier"):
        shrink(model)


def test_other_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes of attention over distances follow from the number of heads, which no matrix shows."""
    model = silenced("llama", CASES["llama"])
    monkeypatch.setattr(
        "peft_pst.shrinking.groups_in_use", lambda model, groups: torch.arange(groups.num_groups) % 2 == 0
    )
    with pytest.raises(RuntimeError, match=r"logits of the shrunk LlamaForCausalLM differs by up to .* not changed"):
        shrink(model)


def test_inputs_of_the_user_are_compared() -> None:
    model = silenced("bert", CASES["bert"])
    with pytest.raises(IndexError):
        shrink(model, inputs={"input_ids": torch.tensor([[41]])})
    model.main_input_name = "sounds"
    with pytest.raises(ValueError, match=r"reads sounds, for which no input can be made up; pass a batch as inputs="):
        shrink(model)
    shrink(model, inputs={"input_ids": torch.tensor([[1, 2]])})
