"""A low-rank update of token embeddings, which train with the pruned matrices and are never pruned themselves."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from .blocks import CACHE_NUMEL, row_blocks
from .callers import users_level
from .config import PSTConfig
from .offloading import at_hand
from .plan import check_rank
from .scoring import score_dtype
from .sharding import copy_of, replace_values, whole, whole_shape
from .tuner_layer import PSTTunerLayer, broken_message


def updated_rows(rows: Tensor, U: Tensor, V: Tensor, beta: float = 1.0, *, keep_zeros: bool = False) -> Tensor:
    """rows + beta U V, each entry summed in one order, whatever the number of rows.

    A matrix product would sum in another order for a few rows than for many, and what is looked up would differ in its
    last digits from what is merged.

    Args:
        rows: of an embedding, (..., dim), any floating dtype.
        U: the rows' own coefficients, (..., r).
        V: what all rows share, (r, dim).
        beta: scale of the update.
        keep_zeros: whether what is zero stays zero.

    Returns:
        (..., dim), in the dtype of `rows`.

    Example:
        >>> updated_rows(torch.zeros(2, 3), torch.tensor([[1.0], [2.0]]), torch.ones(1, 3), beta=0.5)
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 1.0000, 1.0000]])
    """
    updated = rows.to(score_dtype(rows.dtype))
    for column, direction in zip(U.to(updated.dtype).unbind(-1), V.to(updated.dtype).unbind(0), strict=True):
        updated = torch.addcmul(updated, column.unsqueeze(-1), direction, value=beta)
    return (updated.where(rows != 0, 0) if keep_zeros else updated).to(rows.dtype)


def is_plain_embedding(module: object) -> bool:
    """Whether a module looks up its rows as they are: not scaled, not renormalised, with a dense gradient.

    Example:
        >>> is_plain_embedding(nn.Embedding(5, 4)), is_plain_embedding(nn.Embedding(5, 4, max_norm=1.0))
        (True, False)
    """
    # A subclass may do anything with them; Gemma's scales them.
    return type(module) is nn.Embedding and module.max_norm is None and not module.sparse


class _Forward(threading.local):
    """What the forward now under way in this thread is: one of a PST model, which trains embeddings, or any other."""

    def __init__(self) -> None:
        self.trains_embeddings = False  # of the thread's own, since torch.compile looks for it there


_FORWARD = _Forward()


@contextmanager
def training_embeddings() -> Iterator[None]:
    """Let the updates of embeddings train in the forwards within, also in evaluation mode."""
    # Not set on the layers: to look for them takes most of a millisecond in a BERT, and others may join them.
    before = _FORWARD.trains_embeddings
    _FORWARD.trains_embeddings = before or torch.is_grad_enabled()
    try:
        yield
    finally:
        _FORWARD.trains_embeddings = before


def check_embedding(module: nn.Module, name: str) -> None:
    """Refuse what is no plain lookup of its own rows.

    Raises:
        ValueError: saying why.

    Example:
        >>> check_embedding(nn.Linear(2, 2), "head")
        Traceback (most recent call last):
        ...
        ValueError: head, named in embedding_modules, is a Linear and no plain torch.nn.Embedding; take it out.
    """
    if not is_plain_embedding(module):
        raise ValueError(
            f"{name}, named in embedding_modules, is a {type(module).__name__} and no plain torch.nn.Embedding; "
            "take it out."
        )


class PSTEmbeddingUpdate(nn.Module, PSTTunerLayer):
    """`nn.Embedding` with E + beta U V in the place of E; only the rows that are looked up are made.

    For each adapter the layer holds `pst_embedding_U` (num_embeddings, r), which starts at zero, so that each token
    learns for itself, and `pst_embedding_V` (r, embedding_dim), random with a variance of
    1 / embedding_dim. The row of `padding_idx` stays as it is.

    In evaluation mode, what is looked up by whoever asks the layer itself has no gradient, as from a frozen embedding:
    PEFT and its users count on this. Then only a forward of the `PeftModel` or of its tuner trains it; in training mode
    any does.

    Args:
        base_layer: a plain embedding, whose weight is its own.
        adapter_name: of the first adapter.
        config: its configuration.
        module_name: name of the embedding in the plain model.

    Source: LoRA on embeddings (Hu et al. 2021, arXiv 2106.09685), as PEFT starts it.

    Example:
        >>> layer = PSTEmbeddingUpdate(nn.Embedding(5, 4), "default", PSTConfig(embedding_r=2), "tokens")
        >>> layer.pst_embedding_U["default"].shape, layer.pst_embedding_V["default"].shape
        (torch.Size([5, 2]), torch.Size([2, 4]))
        >>> torch.equal(layer(torch.tensor([3])), layer.base_layer(torch.tensor([3])))
        True
    """

    adapter_layer_names = ("pst_embedding_U", "pst_embedding_V")
    other_param_names = ("pst_configs",)

    def __init__(self, base_layer: nn.Embedding, adapter_name: str, config: PSTConfig, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.pst_embedding_U = nn.ParameterDict()
        self.pst_embedding_V = nn.ParameterDict()
        self.pst_configs: dict[str, PSTConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._dense_weight: Tensor | None = None  # the base weight while an adapter is merged
        self._active_adapter = adapter_name
        self._was_trained, self._was_left_out = False, False  # by a lookup since the last step
        self.update_layer(adapter_name, config)
        self.training = base_layer.training  # as the model is that it becomes a part of

    @property
    def in_features(self) -> int:
        """The number of tokens, as PEFT's tuners have it."""
        return self._base.num_embeddings

    @property
    def out_features(self) -> int:
        """The dimension that a token is given."""
        return self._base.embedding_dim

    def update_layer(self, adapter_name: str, config: PSTConfig) -> None:
        """Add an adapter, or start an existing one afresh.

        Raises:
            ValueError: if the rank is above what the embedding's size allows.
        """
        tokens, dim = whole_shape(self._base.weight)
        try:
            check_rank("embedding_r", config.embedding_r, (tokens, dim))
        except ValueError as error:
            raise ValueError(f"Layer {self.module_name}: {error}") from error
        self.pst_configs[adapter_name] = config
        self.pst_embedding_U[adapter_name] = nn.Parameter(torch.zeros(tokens, config.embedding_r))
        self.pst_embedding_V[adapter_name] = nn.Parameter(torch.empty(config.embedding_r, dim))
        self._reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _reset_parameters(self, adapter_name: str, config: PSTConfig) -> None:
        U, V = self.pst_embedding_U[adapter_name], self.pst_embedding_V[adapter_name]
        std = V.shape[1] ** -0.5
        nn.init.normal_(V, std=std)
        if config.init_weights is False:
            nn.init.normal_(U, std=std)
            if self._base.padding_idx is not None:
                U[self._base.padding_idx] = 0.0  # it gets no gradient, so it would stay random

    def _in_force(self) -> list[str]:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.pst_embedding_U]

    def forward(self, input: Tensor) -> Tensor:
        names = self._in_force()
        embedded = self.base_layer(input)
        for name in names:
            U, V = self.pst_embedding_U[name], self.pst_embedding_V[name]
            self.check_loaded(name, [U, V])
            trains = self.training or _FORWARD.trains_embeddings
            if torch.is_grad_enabled() and U.requires_grad:
                self._was_trained, self._was_left_out = self._was_trained or trains, self._was_left_out or not trains
            if not trains:
                U, V = U.detach(), V.detach()
            embedded = self._updated(embedded, F.embedding(input, U, self._base.padding_idx), V, name)
        return embedded

    def warn_if_left_out(self) -> None:
        """Warn, after a step, if it was computed in evaluation mode, where embeddings do not train."""
        left_out = self._was_left_out and not self._was_trained
        self._was_trained, self._was_left_out = False, False
        if left_out:
            warnings.warn(
                f"The step was computed in evaluation mode and not by the PeftModel, so that the update of "
                f"{self.module_name} does not train; call model.train() before, or leave the embeddings alone with "
                "PSTConfig(embedding_r=0).",
                stacklevel=users_level(),
            )

    def _updated(self, rows: Tensor, U: Tensor, V: Tensor, adapter_name: str) -> Tensor:
        config = self.pst_configs[adapter_name]
        return updated_rows(rows, U, V, config.beta, keep_zeros=config.keep_zeros)

    def get_weight_in_force(self) -> Tensor:
        """What is looked up now, (num_embeddings, embedding_dim)."""
        if self.merged or self.disable_adapters:
            return self._own_weight()
        return self._updated_weight([name for name in self.active_adapters if name in self.pst_embedding_U])

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the updated weight into the embedding; `unmerge` restores the former one bit for bit.

        Raises:
            ValueError: with `safe_merge`, when the updated weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.pst_embedding_U]
        if not names:
            return
        if self._is_offloaded:
            with onload_layer(self):  # as PEFT's own methods do, which write back what they have merged
                self.merge(safe_merge, names)
            return
        self._check_writable()
        merged_names = self.merged_adapters + names
        merged = self._updated_weight(merged_names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(broken_message(names[-1], self.module_name))
        if self._dense_weight is None:
            self._dense_weight = copy_of(self._stored)
        replace_values(self._stored, merged)
        self.merged_adapters = merged_names

    @torch.no_grad()
    def _updated_weight(self, adapter_names: list[str]) -> Tensor:
        weight = self._own_weight() if self._dense_weight is None else whole(self._dense_weight)
        updated = weight.to(self._device, self._stored.dtype, copy=True)
        for name in adapter_names:
            U, V = whole(self.pst_embedding_U[name]), whole(self.pst_embedding_V[name])
            self.check_loaded(name, [U, V])
            for block in row_blocks(0, updated.shape[0], updated.shape[1], CACHE_NUMEL):
                updated[block] = self._updated(updated[block], U[block], V, name)
        return updated

    def _own_weight(self) -> Tensor:
        """What the embedding holds now, whole and on the device where it computes."""
        weight = at_hand(self._base, "weight")
        if weight is None:
            raise ValueError(f"Layer {self.module_name} has no data (meta device); load the model first.")
        return whole(weight).detach()

    def train(self, mode: bool = True) -> PSTEmbeddingUpdate:
        self.keep_adapters_at_hand()
        return super().train(mode)

    def __repr__(self) -> str:
        return "pst." + super().__repr__()
