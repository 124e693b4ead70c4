"""Optimizer parameter groups: weight update, scores and head learn at different rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from .embedding import PSTEmbeddingUpdate
from .layer import PSTLayer

_UPDATE = ("pst_U", "pst_V", "pst_S", *PSTEmbeddingUpdate.adapter_layer_names)
_SCORES = tuple(name for name in PSTLayer.adapter_layer_names if name not in _UPDATE)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    score_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a PST model into optimizer groups.

    Scores are never decayed: a decayed score is pulled towards plain magnitude. Biases and norms are not either.

    Args:
        model: a model with PST adapters.
        lr: learning rate of the weight update U, V and of its sparse residual S.
        score_lr: learning rate of the scores A, B, R, C; `lr` when None.
        head_lr: learning rate of everything else that trains (head, biases); `lr` when None.
        weight_decay: decay of the weight update and of the head's matrices.

    Returns:
        Groups with the keys `name`, `params`, `lr`, `weight_decay`; empty groups are left out.

    Raises:
        ValueError: if nothing trains, or a learning rate is negative.

    Source: movement pruning (Sanh et al. 2020, arXiv 2005.07683) trains weights at 3e-5 and scores at 1e-2.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(base, PSTConfig(target_modules=["0"], modules_to_save=["1"]))
        >>> groups = parameter_groups(model, lr=3e-3, score_lr=1e-2, head_lr=1e-3)
        >>> [(group["name"], len(group["params"]), group["lr"]) for group in groups]
        [('weight_update', 2, 0.003), ('scores', 4, 0.01), ('head', 1, 0.001), ('head_no_decay', 1, 0.001)]
    """
    rates = {"lr": lr, "score_lr": score_lr, "head_lr": head_lr}
    for name, rate in rates.items():
        if rate is not None and rate < 0:
            raise ValueError(f"{name}={rate} is negative; pass a learning rate of at least 0.")
    score_lr = lr if score_lr is None else score_lr
    head_lr = lr if head_lr is None else head_lr
    groups: dict[str, dict[str, Any]] = {
        "weight_update": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "scores": {"params": [], "lr": score_lr, "weight_decay": 0.0},
        "head": {"params": [], "lr": head_lr, "weight_decay": weight_decay},
        "head_no_decay": {"params": [], "lr": head_lr, "weight_decay": 0.0},
    }
    decayed = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name, decayed)]["params"].append(parameter)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not filled:
        raise ValueError("Nothing in the model trains; make it with get_peft_model(model, PSTConfig(...)) first.")
    return filled


def _group_of(parameter_name: str, decayed: set[str]) -> str:
    parts = parameter_name.split(".")
    if any(part in _UPDATE for part in parts):
        return "weight_update"
    if any(part in _SCORES for part in parts):
        return "scores"
    return "head" if parameter_name in decayed else "head_no_decay"


def create_pst_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    score_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over `parameter_groups`, to be passed as `Trainer(optimizers=(optimizer, None))`.

    In the manner of PEFT's `create_loraplus_optimizer`.

    Args:
        model: a model with PST adapters.
        optimizer_cls: such as `torch.optim.AdamW`.
        lr: learning rate of the weight update; see `parameter_groups` for the other rates and the decay.
        score_lr: learning rate of the scores.
        head_lr: learning rate of everything else that trains.
        weight_decay: decay of the weight update and of the head's matrices.
        **kwargs: passed on to `optimizer_cls`.

    Raises:
        ValueError: as `parameter_groups`.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), PSTConfig(target_modules=["0"]))
        >>> optimizer = create_pst_optimizer(model, torch.optim.AdamW, lr=3e-3, score_lr=1e-2, betas=(0.9, 0.98))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.003, 0.01]
    """
    groups = parameter_groups(model, lr=lr, score_lr=score_lr, head_lr=head_lr, weight_decay=weight_decay)
    return optimizer_cls(groups, **kwargs)
