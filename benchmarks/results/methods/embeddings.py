"""The low-rank update of the token embeddings that PST's defaults have, for its rivals too."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peft_pst import PSTConfig
from peft_pst.embedding import PSTEmbeddingUpdate
from peft_pst.targets import find_token_embeddings


def add_embedding_updates(model: nn.Module) -> Callable[[], None]:
    """Update the embeddings from now on; what is returned writes the updates in and leaves plain embeddings."""
    updates = {}
    for name in find_token_embeddings(model):
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)  # or it would not have been found
        updates[name] = PSTEmbeddingUpdate(embedding, "default", PSTConfig(), name)
        model.set_submodule(name, updates[name])

    def write() -> None:
        for name, update in updates.items():
            update.merge(safe_merge=True)
            model.set_submodule(name, update.get_base_layer())

    return write
