"""Models and configurations that every operation of the contract is tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import TOKENS, inputs, net, tiny_bert, tiny_gpt2, train_a_little
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_pst import PSTConfig


@dataclass(frozen=True)
class Case:
    """A model, and how it is adapted."""

    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    second: dict[str, Any]  # what a second adapter adapts, by the options that say so
    linear: str  # the name of linear layers that `second` adapts, or at least the case
    free: str  # that of others, which `second` leaves alone
    options: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)  # what is adapted where it is not found by itself
    slow: bool = False

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def config(self, **overrides: Any) -> PSTConfig:
        setting = {"target_sparsity": None if ":" in self.options.get("pattern", "") else 0.6, "r": 2, "score_rank": 3}
        return PSTConfig(**{**setting, **self.targets, **self.options, **overrides})

    def second_config(self, **options: Any) -> PSTConfig:
        return PSTConfig(**{"target_sparsity": 0.5, "r": 1, **self.second, **options})

    def fresh(self, name: str = "default") -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(self.base(), self.config(), adapter_name=name)

    def pruned(self) -> PeftModel:
        return train_a_little(self.fresh()).eval()

    def two(self) -> PeftModel:
        """The case's adapter, active, and "other" on some layers, both as after training."""
        model = self.fresh()
        model.add_adapter("other", self.second_config())
        for seed, name in enumerate(("other", "default")):
            model.set_adapter(name)
            train_a_little(model, seed=seed)
        return model.eval()

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.forward(model)

    def forward(self, model: nn.Module) -> Tensor:
        result = model(**self.inputs)
        return result if isinstance(result, Tensor) else result[0]


class Attentive(nn.Module):
    """A block with torch's attention, a feed-forward and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x[..., : size or 8] for size in (self.attn.kdim, self.attn.vdim))
        x = x + self.attn(x, key, value)[0]
        return self.head(x + self.down(torch.tanh(self.up(x))))


def attentive(**options: Any) -> Attentive:
    # Frozen as PEFT will have it, since torch chooses its kernels by who wants a gradient.
    return Attentive(**options).requires_grad_(False)


def separate() -> Attentive:
    return attentive(kdim=6, vdim=4)


def tiny_t5() -> PreTrainedModel:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def tiny_feature_extractor() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=20, **sizes))


def tiny_mixture() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, experts_implementation="eager"))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SEQUENCES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
TEXT = {"input_ids": TOKENS}
NET = ("up", "down")
MODELS = [
    Case("custom", net, {"x": inputs()}, {"target_modules": ["up"]}, *NET),
    Case("sequence classifier", tiny_bert, TEXT, {"target_modules": ["query"]}, "query", "value"),
    Case("decoder with Conv1D", tiny_gpt2, TEXT, {"target_modules": ["c_fc"]}, "c_fc", "c_attn"),
    Case(
        "encoder and decoder",
        tiny_t5,
        TEXT | {"decoder_input_ids": TOKENS[:, :3]},
        {"target_modules": ["wi"]},
        "wi",
        "q",
    ),
    Case("feature extraction", tiny_feature_extractor, TEXT, {"target_modules": ["query"]}, "query", "value"),
    Case(
        "torch's attention",
        attentive,
        {"x": SEQUENCES},
        {"target_modules": ["attn"]},
        *NET,
        targets={"target_modules": ["attn", "up"]},
    ),
    Case(
        "torch's attention, separate projections",
        separate,
        {"x": SEQUENCES},
        {"target_modules": ["attn"]},
        *NET,
        targets={"target_modules": ["attn", "up"]},
        slow=True,
    ),
    Case(
        "mixture of experts",
        tiny_mixture,
        TEXT,
        {"target_modules": [], "target_parameters": EXPERTS[:1]},
        "q_proj",
        "k_proj",
        targets={"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        slow=True,
    ),
]

CONFIGS: list[dict[str, Any]] = [
    {"r": 0, "score_rank": 0},
    {"r": 0, "residual": 4, "residual_positions": "magnitude", "target_modules": ["up", "down"]},
    {"score_rank": 0, "structured": False, "init_weights": "paper"},
    {"init_weights": False, "target_modules": r".*\.(up|down)", "exclude_modules": ["layers.1.down"]},
    {
        "initial_sparsity": 0.2,
        "sparsity_pattern": {r"layers\.0\..*": 0.25, "down": 0.9},
        "rank_pattern": {"up": 1, r"layers\.1\.down": 0},
        "score_rank_pattern": {"down": 1},
    },
    {"target_modules": "all-linear", "modules_to_save": ["head"]},
    {"layers_to_transform": [1], "layers_pattern": "layers", "mask_interval": 3},
    {"bias": "all", "mask_interval": None},
    {"bias": "pst_only", "r": 0},
    {"pattern": "2:4"},
    {"pattern": "rows", "scope": "global"},
]

SLOW_CONFIGS: list[dict[str, Any]] = [
    {"pattern": "2x2", "mask_interval": None},
    {"pattern": "columns", "mask_interval": 2},
    {"scope": "global", "min_kept": 0.05, "sparsity_pattern": {"down": 0.3}},
    {"pattern": "neurons", "scope": "global", "projections": {"neurons": [{"inputs": ["up"], "output": "down"}]}},
    {"pattern": "1:4", "sparsity_pattern": {"up": 0.0}, "keep_zeros": True},
    {"parts": {"up": 3}, "keep_zeros": True, "target_sparsity": 0.3},
]


def configured(options: dict[str, Any], slow: bool = False) -> Case:
    name = ", ".join(f"{name}={value}" for name, value in options.items())
    return Case(name, net, {"x": inputs()}, {"target_modules": ["up"]}, *NET, options, slow=slow)


COUPLED = Case(
    "pattern=heads+neurons",
    tiny_bert,
    TEXT,
    {"target_modules": ["query"]},
    "query",
    "value",
    {"pattern": "heads+neurons"},
    slow=True,
)

CASES = [
    *MODELS,
    *map(configured, CONFIGS),
    *(configured(options, slow=True) for options in SLOW_CONFIGS),
    COUPLED,
]
