"""Pruning at once: masks made in one go, and held while training goes on."""

from __future__ import annotations

from typing import get_args

from torch import nn

from .model import active_adapters, get_sparsity
from .plan import Criterion
from .schedule import check_sparsity
from .units import units


def prune_once(model: nn.Module, sparsity: float, *, by: Criterion = "scores") -> float:
    """Prune every adapted matrix to a sparsity now, and hold the masks from here on.

    Nothing else changes, so training may go on with the same model, with or without `PSTCallback`. Saved, loaded and
    merged, the adapter keeps these masks.

    Args:
        model: a model with PST adapters, made with `mask_interval=None`; all active adapters are pruned.
        sparsity: fraction of zeros in each adapted matrix, in [0, 1).
        by: what is kept. "scores": the highest scores, which are the largest |W| = |W0 + beta U V + S| where no scores
            are learned; "weights": the largest |W0|, whatever was trained; "update": the largest |beta U V + S|.

    Returns:
        The sparsity now in force, over all adapted weights, in [0, 1).

    Raises:
        ValueError: if the model has no active PST adapter, a mask would not be held, an argument is out of its range,
            or, on the CPU, if a weight is NaN. The model is then as it was, except for a NaN.
        RuntimeError: if an adapter is merged.

    Source: the unstructured pruning of DSEE (Chen et al., ACL 2023, arXiv 2111.00160).

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, PSTConfig.dsee(target_modules=["0"], r=2, residual=3))
        >>> prune_once(model, 0.5)
        0.5
    """
    check_sparsity("sparsity", sparsity)
    if by not in get_args(Criterion):
        raise ValueError(f'by={by!r} is none of "scores", "weights" and "update".')
    pairs = active_adapters(model)
    for layer, name in pairs:
        layer.check_holds_mask(name)
    prepared = [
        change for unit in units((layer, name, sparsity) for layer, name in pairs) for change in unit.prepare(by)
    ]
    for layer, name, change in prepared:
        layer.put_in_force(name, change)
    return get_sparsity(model)
