"""Default targets on real architectures from tiny configurations, and the life of an adapter on each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_pst import PSTConfig, PSTLayer, update_sparsity
from peft_pst.masking import num_pruned
from peft_pst.targets import find_block_linears

ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
DECODER = ENCODER | {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {**DECODER, "head_dim": 8}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}

WHISPER = {
    **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 8,
    **{f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "decoder_start")},
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**ENCODER)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20)
    ),
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**ENCODER, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"])
    ),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**ENCODER)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**ENCODER, embedding_size=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=20,
            word_embed_proj_dim=8,  # has linears outside the blocks
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GATED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GATED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**DECODER)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5-gated": lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT)),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
}


def blocks(stem: str, *layers: str) -> set[str]:
    return {f"{stem}.{index}.{layer}" for index in (0, 1) for layer in layers}


BERT_LAYERS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_LAYERS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OPT_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
CROSS = ("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.out_proj")
T5_SELF = tuple(f"layer.0.SelfAttention.{letter}" for letter in "qkvo")
T5_CROSS = tuple(f"layer.1.EncDecAttention.{letter}" for letter in "qkvo")


def t5_layers(*inner: str) -> set[str]:
    encoder = (*T5_SELF, *(f"layer.1.DenseReluDense.{name}" for name in inner))
    decoder = (*T5_SELF, *T5_CROSS, *(f"layer.2.DenseReluDense.{name}" for name in inner))
    return blocks("encoder.block", *encoder) | blocks("decoder.block", *decoder)


EXPECTED: dict[str, set[str]] = {
    "bert": blocks("bert.encoder.layer", *BERT_LAYERS),
    "roberta": blocks("roberta.encoder.layer", *BERT_LAYERS),
    "distilbert": blocks(
        "distilbert.transformer.layer",
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    "deberta-v2": blocks(
        "deberta.encoder.layer",
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "attention.self.pos_key_proj",
        "attention.self.pos_query_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "mpnet": blocks(
        "mpnet.encoder.layer",
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
    ),
    "electra": blocks("electra.encoder.layer", *BERT_LAYERS),
    "gpt2": blocks("transformer.h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "opt": blocks("model.decoder.layers", *OPT_LAYERS),
    "llama": blocks("model.layers", *LLAMA_LAYERS),
    "mistral": blocks("model.layers", *LLAMA_LAYERS),
    "qwen2": blocks("model.layers", *LLAMA_LAYERS),
    "qwen3": blocks("model.layers", *LLAMA_LAYERS),
    "gemma2": blocks("model.layers", *LLAMA_LAYERS),
    "gemma3": blocks("model.layers", *LLAMA_LAYERS),
    "phi3": blocks("model.layers", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "t5": t5_layers("wi", "wo"),
    "t5-gated": t5_layers("wi_0", "wi_1", "wo"),
    "bart": blocks("model.encoder.layers", *OPT_LAYERS) | blocks("model.decoder.layers", *OPT_LAYERS, *CROSS),
    "whisper": blocks("model.encoder.layers", *OPT_LAYERS) | blocks("model.decoder.layers", *OPT_LAYERS, *CROSS),
    "vit": blocks(
        "vit.layers",
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def adapted_names(model: torch.nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if isinstance(module, PSTLayer)
    }


@pytest.mark.parametrize("name", MODELS)
def test_default_targets(name: str) -> None:
    model = get_peft_model(make(name), PSTConfig())
    assert adapted_names(model) == EXPECTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_second_adapter_finds_the_same_targets(name: str) -> None:
    model = get_peft_model(make(name), PSTConfig())
    before = find_block_linears(make(name))
    assert find_block_linears(model.base_model.model) == before


def dense_block() -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(4, 4)})


def test_a_pooler_of_the_same_name_is_left_alone() -> None:
    model = nn.ModuleDict({"layer": nn.ModuleList([dense_block(), dense_block()]), "pooler": dense_block()})
    assert find_block_linears(model) == ["layer.0.dense", "layer.1.dense"]
    assert adapted_names(get_peft_model(model, PSTConfig())) == {"layer.0.dense", "layer.1.dense"}


def test_experts_belong_to_the_block_that_holds_them_and_their_router_is_left_alone() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([dense_block(), dense_block()]), "gate": nn.Linear(4, 2)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(4, 2)})
    expected = {"layers.0.experts.0.dense", "layers.0.experts.1.dense"}
    assert adapted_names(get_peft_model(model, PSTConfig())) == expected


def test_routers_are_known_by_what_stands_beside_them() -> None:
    def targets(**block: nn.Module) -> list[str]:
        return find_block_linears(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(block)])}))

    stack = nn.Module()
    stack.up = nn.Parameter(torch.zeros(3, 6, 4))
    up, gate = nn.Linear(4, 6), nn.Linear(4, 3)
    assert targets(up=up, gate=gate, experts=stack) == ["up"]
    assert targets(up=up, choice=nn.ModuleDict({"gate": gate}), experts=stack) == ["up"]
    assert targets(up=up, router=nn.ModuleDict({"layer": gate})) == ["up"]
    assert targets(up=up, gate=gate) == ["gate", "up"]
    assert targets(up=up, gate=gate, conv=nn.Conv1d(4, 3, 2)) == ["gate", "up"]
    # A neighbouring block is no store of experts, whatever it is made of.
    blocks = nn.ModuleList([nn.ModuleDict({"up": gate}), nn.ModuleDict({"a": up, "b": up, "c": up})])
    assert "up" in find_block_linears(nn.ModuleDict({"layers": blocks}))


MIXTURE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "pad_token_id": 0,
}


def mixture(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "phimoe":
        return PhimoeForCausalLM(PhimoeConfig(**MIXTURE)).eval()
    sizes = {"intermediate_size_mlp": 24, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "moe_layers": [1]}
    return Llama4ForCausalLM(Llama4TextConfig(**MIXTURE, **sizes)).eval()


@pytest.mark.parametrize(
    ("name", "router"), [("phimoe", "mlp.router"), ("llama4", "feed_forward.router")], ids=["phimoe", "llama4"]
)
def test_mixtures_whose_routers_return_several_tensors(name: str, router: str, tmp_path: Path) -> None:
    """By default they are left alone; named, they run as ever with the masked weight, through an adapter's life."""
    tokens, base = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]]), mixture(name)
    assert not any("router" in target for target in find_block_linears(base))
    with torch.no_grad():
        expected = base(tokens).logits
        assert torch.equal(get_peft_model(mixture(name), PSTConfig(embedding_r=0)).eval()(tokens).logits, expected)

    model = get_peft_model(base, PSTConfig(target_modules=[router, "q_proj"], target_sparsity=0.5, r=2)).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    model.train()(tokens).logits.square().mean().backward()
    layer = next(layer for layer in model.modules() if isinstance(layer, PSTLayer) and router in layer.module_name)
    assert layer.pst_V["default"].grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
        update_sparsity(model, 1, 1)
        pruned = model.eval()(tokens).logits
        assert not torch.allclose(pruned, expected)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(mixture(name), str(tmp_path)).eval()
        assert torch.equal(loaded(tokens).logits, pruned)
        merged = loaded.merge_and_unload()
        assert torch.equal(merged(tokens).logits, pruned)
    weight = merged.get_submodule(layer.module_name).weight
    assert int((weight == 0).sum()) == num_pruned(weight.numel(), 0.5)


# Their adapted layers differ from another model's in their names alone, which `test_default_targets` looks at.
LIKE_OTHERS = ("roberta", "mpnet", "electra", "mistral", "qwen2", "qwen3", "gemma2", "t5", "bart")
CLASSIFIERS = ("bert", "roberta", "distilbert", "deberta-v2", "mpnet", "electra", "vit")


def batch(name: str) -> dict[str, Tensor]:
    tokens, generator = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]]), torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1]) if name in CLASSIFIERS else tokens
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": labels}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 16, generator=generator), "labels": labels}
    return {"input_ids": tokens, "labels": labels}


@torch.no_grad()
def logits(model: torch.nn.Module, name: str) -> Tensor:
    return model.eval()(**batch(name)).logits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in MODELS]
)
def test_train_save_load_merge_and_reload(name: str, tmp_path: Path) -> None:
    task = "SEQ_CLS" if name in CLASSIFIERS else None
    config = PSTConfig(target_sparsity=0.7, r=2, score_rank=2, task_type=task)
    model = get_peft_model(make(name), config).train()
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.05)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(**batch(name)).loss.backward()
        missing = [key for key, parameter in trainable.items() if parameter.grad is None]
        assert not missing
        optimizer.step()
        update_sparsity(model, step, total_steps=3)
    still = [key for key, parameter in trainable.items() if not parameter.grad.any()]
    assert not still  # in the third step, every factor has something to learn from
    expected = logits(model, name)
    assert not torch.equal(expected, logits(make(name), name))

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), expected)

    pruned = loaded.merge_and_unload()
    pruned.save_pretrained(tmp_path / "pruned")
    stock = type(make(name)).from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(stock, name), expected)
    for layer in EXPECTED[name]:
        weight = stock.get_submodule(layer).weight
        assert int((weight == 0).sum()) == num_pruned(weight.numel(), 0.7)
