"""Prune the pretrained weights once, then train LoRA under the mask: the way of SPP and SQFT.

W = M * (W0 + B A), so the update merges without losing a zero (SPP: Lu et al. 2024, arXiv 2405.16057; SQFT: Munoz et
al. 2024, arXiv 2410.03750). The mask comes from |W0|, or from Wanda's |W0| times the norm of what each input feature
brings (Sun et al. 2024, arXiv 2306.11695), which prunes every output row alike. With embeddings,
their low-rank update is PST's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_pst import num_pruned
from peft_pst.masking import select_mask

from .embeddings import add_embedding_updates
from .masked import MaskedLayer, add_masks, block_linears, merge_masks
from .protocol import Goal, Method, Prepared, Start, rate_groups

Importance = Callable[[Start], dict[str, Tensor]]
"""Scores of each layer by name, in the weight's own layout."""


def magnitude(start: Start) -> dict[str, Tensor]:
    """|W0| of each layer."""
    return {name: layer.weight.detach().abs() for name, layer in _layers(start.model).items()}


def wanda(start: Start) -> dict[str, Tensor]:
    """The rank of each |W0| * ||x|| within its output row, so that one cut over the matrix cuts all rows alike.

    Where the rows cannot all lose equally many, some lose one more.
    """
    norms = input_norms(start)
    ranks = {}
    for name, layer in _layers(start.model).items():
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.detach()
        scores = (weight.T if transposed else weight).abs() * norms[name]
        rank = scores.argsort(dim=1, stable=True).argsort(dim=1).to(weight.dtype)
        ranks[name] = rank.T if transposed else rank
    return ranks


@torch.no_grad()
def input_norms(start: Start) -> dict[str, Tensor]:
    """Euclidean norm of each input feature of each layer over the calibration examples, (in,)."""
    squares: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float()
        total = x.square().reshape(-1, x.shape[-1]).sum(0)
        squares[name] = squares[name] + total if name in squares else total

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in _layers(start.model).items()]
    training = start.model.training
    start.model.eval()
    for batch in start.calibration():
        start.model(**batch)
    start.model.train(training)
    for hook in hooks:
        hook.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def _layers(model: nn.Module) -> dict[str, Any]:
    return dict(block_linears(model))


def _prepare(start: Start, goal: Goal, *, importance: Importance, embeddings: bool = False) -> Prepared:
    scores = importance(start)
    for name, parameter in start.model.named_parameters():
        parameter.requires_grad_(start.is_head(name))
    layers = add_masks(start.model, rank=goal.options["r"])
    for layer, values in zip(layers, scores.values(), strict=True):
        _prune(layer, values, goal.sparsity)
    write = add_embedding_updates(start.model) if embeddings else None
    groups = rate_groups(start.model, goal, start.is_head)
    return Prepared(start.model, groups, finish=partial(merge_masks, start.model, layers, write))


def _prune(layer: MaskedLayer, scores: Tensor, sparsity: float) -> None:
    layer.masked.mask.copy_(select_mask(scores, num_pruned(scores.numel(), sparsity)))


METHODS = {
    "one-shot-magnitude": Method(
        "one-shot magnitude, masked LoRA", ("lr",), partial(_prepare, importance=magnitude), {"r": 8}
    ),
    "one-shot-wanda": Method("one-shot Wanda, masked LoRA", ("lr",), partial(_prepare, importance=wanda), {"r": 8}),
    "one-shot-wanda-embeddings": Method(
        "Wanda, LoRA, embeddings too",
        ("lr",),
        partial(_prepare, importance=wanda, embeddings=True),
        {"r": 8},
    ),
}
