"""Masks over the same matrices that PST adapts, by `torch.nn.utils.parametrize`: what the pruning rivals share.

Which entries are kept is decided by the package's own functions, so that counts and ties agree with PST's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peft_pst import cubic_sparsity, num_pruned
from peft_pst.linear import is_linear
from peft_pst.masking import select_mask
from peft_pst.schedule import COOLDOWN_RATIO, WARMUP_RATIO
from peft_pst.targets import find_block_linears

SCHEDULE = {"warmup_ratio": WARMUP_RATIO, "cooldown_ratio": COOLDOWN_RATIO}
"""Options of every method that prunes along the schedule."""


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that PST adapts in a plain model, by name."""
    targets = find_block_linears(model)
    return {
        name: module
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
        and is_linear(module, model.get_submodule(name.rpartition(".")[0]))
    }


class StraightThrough(torch.autograd.Function):
    """M * W with dM/dS = 1: the weight gets G where it is kept, the scores get G * W everywhere.

    Source: movement pruning (Sanh et al. 2020, arXiv 2005.07683).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return torch.where(mask, grads[0], 0), grads[0] * weight, None


class MaskedWeight(nn.Module):
    """Parametrization of one weight: W, with a low-rank update if there is one, zero where the mask is False.

    Args:
        weight: as the layer stores it.
        transposed: whether that is (in, out), as transformers' `Conv1D` does.
        rank: of the update B A, which starts at zero as LoRA's; 0 for none.
        learns_scores: whether importance is a parameter of the weight's shape, from zero; otherwise it is magnitude.
    """

    def __init__(self, weight: Tensor, *, transposed: bool = False, rank: int = 0, learns_scores: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        out, in_ = reversed(weight.shape) if transposed else weight.shape
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        self.scores: nn.Parameter | None = None
        if rank:
            self.A, self.B = nn.Parameter(weight.new_empty(rank, in_)), nn.Parameter(weight.new_zeros(out, rank))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if learns_scores:
            self.scores = nn.Parameter(torch.zeros_like(weight))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def dense(self, weight: Tensor) -> Tensor:
        """The weight before it is masked."""
        if self.A is None or self.B is None:
            return weight
        update = self.B @ self.A
        return weight + (update.T if self.transposed else update)

    def forward(self, weight: Tensor) -> Tensor:
        dense = self.dense(weight)
        if self.scores is None:
            return torch.where(self.mask, dense, 0)
        return StraightThrough.apply(dense, self.scores, self.mask)


class MaskedLayer:
    """A layer whose weight is masked from now on."""

    def __init__(self, layer: nn.Module, rank: int = 0, learns_scores: bool = False) -> None:
        self.layer: Any = layer
        weight = layer.get_parameter("weight").detach()
        transposed = isinstance(layer, Conv1D)
        self.masked = MaskedWeight(weight, transposed=transposed, rank=rank, learns_scores=learns_scores)
        parametrize.register_parametrization(layer, "weight", self.masked)

    @property
    def original(self) -> nn.Parameter:
        """The weight as it is stored, without update and mask."""
        return self.layer.parametrizations.weight.original

    @torch.no_grad()
    def importance(self) -> Tensor:
        """Learned scores where there are any, else magnitude; the shape of the weight."""
        scores = self.masked.scores
        return self.masked.dense(self.original).abs() if scores is None else scores.detach()


def add_masks(model: nn.Module, *, rank: int = 0, learns_scores: bool = False) -> list[MaskedLayer]:
    """Mask the layers that PST adapts; nothing is pruned yet."""
    return [MaskedLayer(layer, rank, learns_scores) for layer in block_linears(model).values()]


def merge_masks(model: nn.Module, layers: Sequence[MaskedLayer], also: Callable[[], None] | None = None) -> nn.Module:
    """Write the masked weights into the layers, which are plain again, and whatever `also` writes."""
    for layer in layers:
        parametrize.remove_parametrizations(layer.layer, "weight", leave_parametrized=True)
    if also is not None:
        also()
    return model


def prune_each(layers: Sequence[MaskedLayer], sparsity: float) -> None:
    """Mask the same share of every matrix, its lowest in importance."""
    for layer in layers:
        scores = layer.importance()
        layer.masked.mask.copy_(select_mask(scores, num_pruned(scores.numel(), sparsity)))


def prune_together(layers: Sequence[MaskedLayer], sparsity: float) -> None:
    """Mask a share of all matrices taken as one: one threshold for the whole model."""
    scores = torch.cat([layer.importance().flatten() for layer in layers])
    kept = select_mask(scores, num_pruned(scores.numel(), sparsity))
    parts = kept.split([layer.original.numel() for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.masked.mask.copy_(part.view_as(layer.masked.mask))


class ScheduleCallback(TrainerCallback):
    """Prunes along the schedule of PST, after every optimizer step.

    Args:
        prune: puts a sparsity in force.
        target_sparsity: at the end, in [0, 1).
        ratios: `warmup_ratio` and `cooldown_ratio` of the schedule.
    """

    def __init__(self, prune: Callable[[float], None], target_sparsity: float, ratios: dict[str, float]) -> None:
        self.prune, self.target_sparsity, self.ratios = prune, target_sparsity, ratios
        self.sparsity = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._follow(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._follow(state)

    def _follow(self, state: TrainerState) -> None:
        self.sparsity = cubic_sparsity(
            state.global_step, state.max_steps, target_sparsity=self.target_sparsity, **self.ratios
        )
        self.prune(self.sparsity)


def schedule_ratios(options: dict[str, Any]) -> dict[str, float]:
    """Those of a method's options that shape the schedule."""
    return {name: options[name] for name in SCHEDULE}
