"""Models and configurations that every operation of the contract is tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import TOKENS, inputs, net, tiny_bert, tiny_gpt2, train_a_little
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from peft_pst import PSTConfig


@dataclass(frozen=True)
class Case:
    """A model, and how it is adapted."""

    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    second: tuple[str, ...]  # targets of a second adapter
    free: str  # a linear layer that `second` leaves alone
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def config(self, **overrides: Any) -> PSTConfig:
        return PSTConfig(**{"target_sparsity": 0.6, "r": 2, "score_rank": 3, **self.options, **overrides})

    def fresh(self, name: str = "default") -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(self.base(), self.config(), adapter_name=name)

    def pruned(self) -> PeftModel:
        return train_a_little(self.fresh()).eval()

    def two(self) -> PeftModel:
        """The case's adapter, active, and "other" on some layers, both as after training."""
        model = self.fresh()
        model.add_adapter("other", PSTConfig(target_sparsity=0.5, r=1, target_modules=list(self.second)))
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


def tiny_t5() -> PreTrainedModel:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def tiny_feature_extractor() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=20, **sizes))


TEXT = {"input_ids": TOKENS}
MODELS = [
    Case("custom", net, {"x": inputs()}, ("up",), "down"),
    Case("sequence classifier", tiny_bert, TEXT, ("query",), "value"),
    Case("decoder with Conv1D", tiny_gpt2, TEXT, ("c_fc",), "c_attn"),
    Case("encoder and decoder", tiny_t5, TEXT | {"decoder_input_ids": TOKENS[:, :3]}, ("wi",), "q"),
    Case("feature extraction", tiny_feature_extractor, TEXT, ("query",), "value"),
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
]

CASES = MODELS + [
    Case(
        ", ".join(f"{name}={value}" for name, value in options.items()), net, {"x": inputs()}, ("up",), "down", options
    )
    for options in CONFIGS
]
