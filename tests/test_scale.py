"""The formula of docs/scale.md counts what models really have."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny_models import layers_of
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scale import LLAMAS, RANK, Layer, Llama, predict
from peft_pst import PSTConfig


@pytest.mark.parametrize("tied", [False, True])
def test_the_predicted_model_is_the_real_one(tied: bool) -> None:
    shape = Llama("tiny", hidden=16, intermediate=24, blocks=3, keys=8, vocabulary=40, tied=tied)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    base_weights = sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, PSTConfig(r=RANK, score_rank=RANK, embedding_r=0))
    predicted = predict(shape, gpus=1, sharded=False, tokens=8)
    assert predicted["base_weights"] == base_weights
    assert predicted["adapted_weights"] == sum(layer.num_weights for layer in layers_of(adapted).values())
    assert predicted["trained"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_state_of_a_layer_is_what_its_tensors_take() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(48, 40, bias=False))
    model = get_peft_model(base, PSTConfig(target_modules=["0"], r=RANK, score_rank=RANK, initial_sparsity=0.5))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.randn(4, 48)).sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    mask = layers_of(model)["base_model.model.0"].get_packed_mask("default")
    gradients = [parameter.grad for parameter in trained]
    assert sum(tensor.nbytes for tensor in (*trained, *gradients, *moments, mask)) == Layer(40, 48, 4).state()


@pytest.mark.parametrize("model", LLAMAS, ids=lambda model: model.name)
def test_sharding_saves_memory_and_ddp_sends_the_adapter_alone(model: Llama) -> None:
    alone, ddp, fsdp = (predict(model, *way, tokens=4096) for way in ((1, False), (8, False), (8, True)))
    assert fsdp["memory_gib"] < alone["memory_gib"] <= ddp["memory_gib"]
    assert alone["adapter_traffic_gib"] == 0
    assert ddp["base_traffic_gib"] == 0 < fsdp["base_traffic_gib"]
