"""Tiny models for tests, dense and adapted, and what is compared of them."""

from __future__ import annotations

import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from peft_pst import PSTConfig, PSTLayer, update_sparsity

NEVER_PRUNED = "prunes nothing: its sparsity is still 0"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two residual blocks and a head: the smallest thing with the structure of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
TOKENS = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2)).eval()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def layers_of(model: nn.Module) -> dict[str, PSTLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PSTLayer)}


def shake(model: nn.Module, seed: int) -> None:
    """Stand-in for an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_mask("default") for name, layer in layers_of(model).items()}


def train_a_little(model: nn.Module, step: int = 10, seed: int = 0) -> nn.Module:
    """Stand-in for training: every trainable tensor moves, and the schedule too (step 10 of 10 is the target)."""
    shake(model, seed)
    update_sparsity(model, step, 10)
    return model


def pruned_net(dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = PSTConfig(**{"target_sparsity": 0.6, "r": 2, "score_rank": 3, **options})
    return train_a_little(get_peft_model(net(dtype), config)).eval()


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor | None = None) -> Tensor:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return model(inputs(parameter.dtype) if x is None else x)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def two_adapters() -> PeftModel:
    model = get_peft_model(net(), PSTConfig(target_sparsity=0.5, r=2), adapter_name="a")
    model.add_adapter("b", PSTConfig(target_sparsity=0.6, r=3, score_rank=2))
    for seed, name in enumerate("ab"):
        model.set_adapter(name)
        train_a_little(model, seed=seed)
    return model.eval()


def activate(model: PeftModel, names: list[str]) -> None:
    model.base_model.set_adapter(names)
