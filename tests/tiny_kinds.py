"""One small model with a base layer of every kind, for tests of what must hold for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TARGETS: dict[str, Any] = {
    "target_modules": ["embed", "conv", "attention", "transposed"],
    "target_parameters": ["experts.up"],
}


class Experts(nn.Module):
    """A stack of matrices, each of which sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.3 * torch.randn(3, 6, 8))  # (experts, out, in)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.up)


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.transposed = Conv1D(8, 8)
        self.experts = Experts()
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.experts(torch.tanh(self.transposed(x))))


def kinds(dtype: torch.dtype = torch.float32) -> Kinds:
    torch.manual_seed(0)
    return Kinds().to(dtype)


def token_batch(seed: int, rows: int = 8) -> Tensor:
    return torch.randint(0, 12, (rows, 5), generator=torch.Generator().manual_seed(seed))
