"""What decoding and perplexity ask of a model alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode without gradients, and each back into its own afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def max_positions(model: Any) -> int | None:
    """Tokens that the model can read, or None where its configuration names no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
