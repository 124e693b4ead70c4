"""The methods that are compared, each with its model, its optimizer and its step."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from peft_pst import PSTConfig, PSTLayer, create_pst_optimizer, update_sparsity
from peft_pst.masking import num_pruned
from peft_pst.targets import find_block_linears

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import oracle  # the tests' slow and obvious second implementation

METHODS = {
    "products": "full fine-tuning, no optimizer",
    "full": "full fine-tuning, AdamW",
    "lora": "LoRA, r = 8",
    "autograd": "PST, plain autograd and sort",
    "ours": "PST, this package",
}
RANK = 8


class AutogradLinear(nn.Module):
    """The tests' oracle as a layer: the formulas in autograd, sorted in full at every forward."""

    def __init__(self, base: nn.Linear, sparsity: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        out, in_ = base.weight.shape
        shapes = {"U": (out, RANK), "V": (RANK, in_), "A": (out, RANK), "B": (RANK, in_), "R": (out,), "C": (in_,)}
        for name, shape in shapes.items():
            start = torch.randn(shape) * in_**-0.5 if name in "UA" else torch.zeros(shape)
            self.register_parameter(name, nn.Parameter(start.to(base.weight.device)))
        self.count = num_pruned(base.weight.numel(), sparsity)

    def forward(self, x: Tensor) -> Tensor:
        factors = {name: getattr(self, name) for name in "UVABRC"}
        adapter = oracle.Adapter(**factors, count=self.count)
        weight = oracle.effective_weight(self.base.weight.float(), [adapter])
        return F.linear(x, weight.to(self.base.weight.dtype), self.base.bias)


def base_model(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
        "vocab_size": 64,
    }
    if options.model == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model: nn.Module = BertModel(BertConfig(**sizes, **dropout), add_pooling_layer=False)
    else:
        model = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=max(1, options.width // 128), use_cache=False))
    dtype = torch.bfloat16 if options.device == "cuda" and options.precision == "bf16" else torch.float32
    return model.to(options.device, dtype)


def with_method(
    base: nn.Module, method: str, options: argparse.Namespace, targets: list[str] | None = None
) -> nn.Module:
    targets = targets or find_block_linears(base)
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=RANK, target_modules=targets))
    if method == "ours":
        config = PSTConfig(
            r=RANK,
            score_rank=RANK,
            target_modules=targets,
            target_sparsity=options.sparsity,
            mask_interval=options.mask_interval,
        )
        return get_peft_model(base, config)
    if method == "autograd":
        base.requires_grad_(False)
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in targets):
                base.set_submodule(name, AutogradLinear(module, options.sparsity))
    return base


class Run:
    """One method's model, optimizer and step."""

    def __init__(self, method: str, options: argparse.Namespace, model: nn.Module | None = None) -> None:
        self.method, self.options = method, options
        self.model = (with_method(base_model(options), method, options) if model is None else model).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = 0 if method == "products" else sum(parameter.numel() for parameter in trained)
        self.optimizer = self._optimizer(trained)
        self.ids = torch.randint(0, 64, (options.batch, options.tokens), device=options.device)
        # A fixed random direction: the plain mean of squares behind a layer norm is a constant, without a gradient.
        self.direction = torch.randn(options.width, device=options.device)
        self.steps = 0
        self._move_schedule()

    def _optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        if self.method == "products":
            # Forward and backward with dense weight gradients, which are dropped at once: the floor of all methods that
            # need them.
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            return None
        if self.method == "ours":
            return create_pst_optimizer(self.model, torch.optim.AdamW, lr=1e-4, fused=True)
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as the Trainer has it

    def _move_schedule(self) -> None:
        if self.method == "ours":
            update_sparsity(self.model, self.steps + 1, 1)  # at the target from the first step on

    def loss(self) -> Tensor:
        return (self.model(input_ids=self.ids).last_hidden_state.float() @ self.direction).square().mean()

    def step(self) -> None:
        autocast = self.options.precision == "bf16" and self.options.device == "cpu"
        for _ in range(self.options.accumulate):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = self.loss()
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1
        self._move_schedule()

    def timed_step(self) -> float:
        """Seconds a step, over as many steps as share one selection."""
        steps = self.options.mask_interval if self.method == "ours" else 1
        synchronize(self.options.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.options.device)
        return (time.perf_counter() - start) / steps


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def timed_selection(device: str) -> Iterator[list[float]]:
    """Seconds spent on scores and selection, a number a layer."""
    seconds: list[float] = []
    original: Callable[..., Tensor] = PSTLayer._select

    def select(self: PSTLayer, *arguments: Any) -> Tensor:
        synchronize(device)
        start = time.perf_counter()
        result = original(self, *arguments)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        return result

    selecting: Any = PSTLayer
    selecting._select = select
    try:
        yield seconds
    finally:
        selecting._select = original
