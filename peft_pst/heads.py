"""Pruning whole attention heads: scores are summed over heads, heads are selected, the masks are expanded."""

from __future__ import annotations

from torch import Tensor, nn

from .architecture import find_heads
from .coupling import group_masks, group_scores
from .group_selection import adapted_groups
from .layer import PSTLayer
from .masking import select_mask
from .model import active_adapters


def prune_heads(model: nn.Module, count: int) -> dict[str, list[int]]:
    """Drop the attention heads that training has changed least, and hold the masks from here on.

    A head is scored by the sum of |beta U V + S| over its rows of the query, key and value projections and its columns
    of the output projection; entries that are pruned already count nothing. In every attention layer the `count` lowest
    are dropped: all their weights become zero, and the number of zeros of each matrix follows. Biases stay, which
    changes nothing, because the output projection no longer reads the head. Where query heads share keys and values
    (grouped-query attention), a head of keys and values is scored and dropped with all its query heads.

    Args:
        model: a transformer with one active PST adapter, made with `mask_interval=None`, on the projections of its
            attention layers.
        count: heads of keys and values to drop in every attention layer, at least 0 and fewer than it has.

    Returns:
        The dropped heads, ascending, by the name of the attention layer.

    Raises:
        ValueError: if no attention layer is found, one is adapted in part, `count` is out of its range, a mask would
            not be held, or more than one adapter is active. The model is then as it was.
        RuntimeError: if the adapter is merged.

    Source: the structured pruning of DSEE (Chen et al., ACL 2023, arXiv 2111.00160), 3 heads of 12.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> from transformers import BertConfig, BertModel
        >>> shape = {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> model = get_peft_model(BertModel(BertConfig(vocab_size=9, **shape)), PSTConfig.dsee(r=2, residual=4))
        >>> value = model.base_model.model.encoder.layer[0].attention.self.value
        >>> with torch.no_grad():  # training touches heads 1 and 3 alone
        ...     _ = value.pst_U["default"][[2, 3, 6, 7]] = value.pst_V["default"][:] = 1.0
        ...     _ = value.pst_U["default"][[0, 1, 4, 5]] = 0.0
        >>> prune_heads(model, 2)
        {'encoder.layer.0.attention': [0, 2]}
        >>> value.get_num_pruned("default"), value.num_weights
        (32, 64)
    """
    adapter_name = _only_adapter(model)
    layers = {layer.module_name: layer for layer, _ in active_adapters(model)}
    attentions = adapted_groups(find_heads(model), layers)
    for attention in attentions:
        if not 0 <= count < attention.num_groups:
            raise ValueError(
                f"count={count} is outside [0, {attention.num_groups}), the number of heads of {attention.name}; at "
                "least one has to stay."
            )
        for name in attention.modules:
            layers[name].check_holds_mask(adapter_name)
    kept = {}
    for attention in attentions:
        updates = {name: _update_in_force(layers[name], adapter_name) for name in attention.modules}
        kept[attention] = select_mask(group_scores(attention, updates), count)
    for attention, keep in kept.items():
        for name, mask in group_masks(attention, keep).items():
            in_force = layers[name].get_mask(adapter_name)
            layers[name].set_mask(adapter_name, in_force & mask.to(in_force.device))
    return {attention.name: (~keep).nonzero().squeeze(1).tolist() for attention, keep in kept.items()}


def _update_in_force(layer: PSTLayer, adapter_name: str) -> Tensor:
    """|beta U V + S| where the mask keeps, (out, in)."""
    return layer.get_update(adapter_name).abs() * layer.get_mask(adapter_name)


def _only_adapter(model: nn.Module) -> str:
    names = sorted({name for _, name in active_adapters(model)})
    if len(names) > 1:
        raise ValueError(f"Adapters {names} are active; activate the one whose update decides, with set_adapter().")
    return names[0]
