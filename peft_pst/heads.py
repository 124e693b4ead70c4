"""Pruning whole attention heads: scores are summed over heads, heads are selected, the masks are expanded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from .layer import PSTLayer
from .masking import select_mask
from .model import active_adapters

# How the projections of an attention layer are called, by the ends of their names.
_SEPARATE = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),  # BERT, RoBERTa
    ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("q", "k", "v", "o"),  # T5
)
_FUSED = (("attn.c_attn", "attn.c_proj"),)  # GPT-2: query, key and value one below the other, and the output


class Part(NamedTuple):
    """Where the heads of one attention layer lie in one of its matrices: side by side, all of one width.

    Attributes:
        layer: the adapted projection.
        axis: 0 where heads are rows (query, key, value), 1 where they are columns (output).
        start: the first row or column of the first head.
    """

    layer: PSTLayer
    axis: int
    start: int


class Attention(NamedTuple):
    """The heads of one attention layer.

    Attributes:
        name: what the paths of its projections have in common.
        num_heads: how many heads it has.
        head_width: rows or columns of a head, the same in each part.
        parts: where the heads lie.
    """

    name: str
    num_heads: int
    head_width: int
    parts: tuple[Part, ...]


def prune_heads(model: nn.Module, count: int) -> dict[str, list[int]]:
    """Drop the attention heads that training has changed least, and hold the masks from here on.

    A head is scored by the sum of |beta U V + S| over its rows of the query, key and value projections and its columns
    of the output projection; entries that are pruned already count nothing. In every attention layer the `count` lowest
    are dropped: all their weights become zero, and the number of zeros of each matrix follows. Biases stay, which
    changes nothing, because the output projection no longer reads the head.

    Args:
        model: a transformer with one active PST adapter, made with `mask_interval=None`, on the projections of its
            attention layers.
        count: heads to drop in every attention layer, at least 0 and fewer than it has.

    Returns:
        The dropped heads, ascending, by the name of the attention layer.

    Raises:
        ValueError: if no attention layer is found, one is adapted in part, keys and values are shared between heads
            (grouped-query attention), `count` is out of its range, a mask would not be held, or more than one adapter
            is active. The model is then as it was.
        RuntimeError: if the adapter is merged.

    Source: the structured pruning of DSEE (Chen et al., ACL 2023, arXiv 2111.00160), 3 heads of 12.

    Example:
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
    attentions = find_attentions(model, adapter_name)
    for attention in attentions:
        if not 0 <= count < attention.num_heads:
            raise ValueError(
                f"count={count} is outside [0, {attention.num_heads}), the number of heads of {attention.name}; at "
                "least one has to stay."
            )
        for part in attention.parts:
            part.layer.check_holds_mask(adapter_name)
    kept = [select_mask(head_scores(attention, adapter_name), count) for attention in attentions]
    for attention, keep in zip(attentions, kept, strict=True):
        for layer, mask in head_masks(attention, adapter_name, keep).items():
            layer.set_mask(adapter_name, mask)
    pairs = zip(attentions, kept, strict=True)
    return {attention.name: (~keep).nonzero().squeeze(1).tolist() for attention, keep in pairs}


def find_attentions(model: nn.Module, adapter_name: str) -> list[Attention]:
    """The attention layers of a model whose projections all carry an adapter, in the order of the model.

    Projections are known by the names that BERT, RoBERTa, ViT, DistilBERT, Llama, OPT, BART, T5 and GPT-2 give them,
    and with them most models of transformers. The number of heads is read from the attention module, its configuration
    or the model's.

    Raises:
        ValueError: if there is none, one is adapted in part, its number of heads is not known or does not fit its
            matrices, or heads share keys and values.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base.named_modules())
    attentions = []
    for names in _projections(modules):
        found = [modules[name] for name in names]
        adapted = [isinstance(module, PSTLayer) and adapter_name in module.pst_plans for module in found]
        if any(adapted):
            missing = [name for name, is_adapted in zip(names, adapted, strict=True) if not is_adapted]
            if missing:
                raise ValueError(
                    f"{missing} are not adapted, but the rest of their attention layer is; a head can only be dropped "
                    "as a whole. Add them to target_modules."
                )
            owner = modules[names[0].rpartition(".")[0]]
            sources = [owner, *(getattr(module, "config", None) for module in (owner, base))]
            attentions.append(_attention(_common_path(names), found, sources))
    if not attentions:
        raise ValueError(
            f"Adapter {adapter_name!r} is on no attention layer whose projections are known by name. Set the masks of "
            "its layers with PSTLayer.set_mask()."
        )
    return attentions


def head_scores(attention: Attention, adapter_name: str) -> Tensor:
    """Sum of |beta U V + S| over the weights of each head that are in force, (num_heads,), on the CPU."""
    total = torch.zeros(attention.num_heads, dtype=torch.float64)
    for layer, axis, start in attention.parts:
        update = layer.get_update(adapter_name).abs() * layer.get_mask(adapter_name)
        sums = update.sum(1 - axis).narrow(0, start, attention.num_heads * attention.head_width)
        total += sums.view(attention.num_heads, attention.head_width).sum(1).cpu()
    return total


def head_masks(attention: Attention, adapter_name: str, keep: Tensor) -> dict[PSTLayer, Tensor]:
    """The masks in force, boolean (out, in), without the heads that are not in `keep`, boolean (num_heads,)."""
    masks: dict[PSTLayer, Tensor] = {}
    for layer, axis, start in attention.parts:
        mask = masks[layer] if layer in masks else layer.get_mask(adapter_name)
        heads = mask.narrow(axis, start, attention.num_heads * attention.head_width)
        heads &= keep.to(mask.device).repeat_interleave(attention.head_width).unsqueeze(1 - axis)
        masks[layer] = mask
    return masks


def _only_adapter(model: nn.Module) -> str:
    names = sorted({name for _, name in active_adapters(model)})
    if len(names) > 1:
        raise ValueError(f"Adapters {names} are active; activate the one whose update decides, with set_adapter().")
    return names[0]


def _projections(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """The names of the projections of every attention layer, in the order of `_SEPARATE` or `_FUSED`."""
    for name in modules:
        for ends in _SEPARATE + _FUSED:
            if name == ends[0] or name.endswith(f".{ends[0]}"):
                stem = name.removesuffix(ends[0])
                names = tuple(stem + end for end in ends)
                if all(other in modules for other in names):
                    yield names


def _attention(name: str, projections: Sequence[PSTLayer], sources: Sequence[Any]) -> Attention:
    num_heads = _number(sources, ("num_attention_heads", "num_heads", "n_heads"))
    if num_heads is None:
        raise ValueError(f"The number of heads of {name} is not known: neither it nor a configuration has one.")
    shared = _number(sources, ("num_key_value_heads",))
    if shared is not None and shared != num_heads:
        raise ValueError(
            f"{name} has {num_heads} query heads on {shared} heads of keys and values (grouped-query attention); a "
            "query head cannot be dropped with keys and values that others use."
        )
    *inputs, output = projections
    size = output.in_features
    parts = [Part(layer, 0, start) for layer in inputs for start in range(0, layer.out_features, size)]
    parts.append(Part(output, 1, 0))
    rows = sum(layer.out_features for layer in inputs)
    if rows != 3 * size or len(parts) != 4 or size % num_heads:
        raise ValueError(
            f"{name} is not made of {num_heads} heads of one width: its queries, keys and values have {rows} rows in "
            f"all, its output projection {size} columns."
        )
    return Attention(name, num_heads, size // num_heads, tuple(parts))


def _number(sources: Sequence[Any], names: Sequence[str]) -> int | None:
    """The first of these attributes that is a number, looked for in one source after the other."""
    found = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _common_path(names: Sequence[str]) -> str:
    levels = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
