"""Finding the attention heads and feed-forward neurons of a transformer, by the names and shapes of its projections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .coupling import CoupledGroups, Kind, Part


class Projections(NamedTuple):
    """How the projections of an attention layer or a feed-forward are called.

    Attributes:
        inputs: ends of the names of the matrices whose rows make a head or a neuron: query, key and value, in this
            order, or one that holds all three; up and gate, in any order, or one that holds both.
        output: the end of the name of the matrix that reads them.
        interleaved: of one matrix that holds several: whether all rows of a head or neuron are together. Else they are
            one below the other, all queries before all keys.

    Example:
        >>> Projections(("wq", "wk", "wv"), "wo").inputs
        ('wq', 'wk', 'wv')
    """

    inputs: tuple[str, ...]
    output: str
    interleaved: bool = False


_ATTENTIONS = (
    Projections(("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"),
    Projections(
        ("crossattention.self.query", "crossattention.self.key", "crossattention.self.value"),
        "crossattention.output.dense",
    ),
    Projections(
        ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"), "attention.output.dense"
    ),  # DeBERTa
    Projections(
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"), "attention.output.dense"
    ),
    Projections(("attention.query", "attention.key", "attention.value"), "attention.dense"),  # ALBERT
    Projections(("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, ViT
    Projections(("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT, BART
    Projections(("q_proj", "k_proj", "v_proj"), "dense"),  # Phi
    Projections(("q_lin", "k_lin", "v_lin"), "out_lin"),  # DistilBERT
    Projections(("q", "k", "v"), "o"),  # T5
)

# How one matrix is divided among query, key and value does not show in its shape; the type of the model decides.
_FUSED_ATTENTIONS = {
    "gpt2": Projections(("attn.c_attn",), "attn.c_proj"),
    "imagegpt": Projections(("attn.c_attn",), "attn.c_proj"),
    "gpt_bigcode": Projections(("attn.c_attn",), "attn.c_proj", interleaved=True),
    "phi3": Projections(("qkv_proj",), "o_proj"),
    "mpt": Projections(("attn.Wqkv",), "attn.out_proj"),
    "modernbert": Projections(("attn.Wqkv",), "attn.Wo"),
    "gpt_neox": Projections(("query_key_value",), "dense", interleaved=True),
    "bloom": Projections(("query_key_value",), "dense", interleaved=True),
    "falcon": Projections(("query_key_value",), "dense", interleaved=True),
}

_FEED_FORWARDS = (
    Projections(("gate_proj", "up_proj"), "down_proj"),  # Llama
    Projections(("gate_up_proj",), "down_proj"),  # Phi-3
    Projections(("up_proj",), "down_proj"),  # MPT
    Projections(("wi_0", "wi_1"), "wo"),  # gated T5
    Projections(("wi",), "wo"),  # T5
    Projections(("mlp.Wi",), "mlp.Wo"),  # ModernBERT
    Projections(("intermediate.dense",), "output.dense"),  # BERT
    Projections(("lin1",), "lin2"),  # DistilBERT
    Projections(("ffn",), "ffn_output"),  # ALBERT
    Projections(("c_fc",), "c_proj"),  # GPT-2
    Projections(("fc_in",), "fc_out"),  # GPT-J
    Projections(("fc1",), "fc2"),  # OPT, BART, ViT
    Projections(("dense_h_to_4h",), "dense_4h_to_h"),  # BLOOM, GPT-NeoX
)
_HOLD_GATE_AND_UP = ("gate_up_proj", "mlp.Wi")  # other matrices of twice the neurons are not understood

_NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


def find_heads(
    model: nn.Module, projections: Sequence[Projections] | None = None, *, num_heads: int | None = None
) -> list[CoupledGroups]:
    """The attention heads of every attention layer, in the order of the model.

    Projections are known by the names that BERT, RoBERTa, DeBERTa, ALBERT, ViT, DistilBERT, Llama, Phi, OPT, BART, T5,
    GPT-2, BLOOM, GPT-NeoX, Falcon, MPT and ModernBERT give them, and with them most models of transformers. Attention
    layers of other names are not listed.

    Args:
        model: a transformer, plain or with adapters of any PEFT method.
        projections: what the projections are called, instead of the known names.
        num_heads: query heads of every attention layer; by default what the attention module, its configuration or
            the model's says.

    Returns:
        For each attention layer, rows of the query, key and value projections and columns of the output projection.
        Where query heads share keys and values, a group is a head of keys and values with its query heads. Paths are
        those of the base model.

    Raises:
        ValueError: if no attention layer is found, or the number of heads is not known or does not fit the matrices.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> shape = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 6}
        >>> heads = find_heads(LlamaModel(LlamaConfig(vocab_size=9, num_hidden_layers=1, **shape)))[0]
        >>> heads.name, heads.num_groups
        ('layers.0.self_attn', 2)
        >>> [(part.module.rpartition(".")[2], part.axis, part.width) for part in heads.parts]
        [('q_proj', 0, 4), ('k_proj', 0, 2), ('v_proj', 0, 2), ('o_proj', 1, 4)]
    """
    base = _base(model)
    found = _all_heads(base, projections or _attentions_of(base), num_heads)
    return found or _refuse("attention layer", projections, base, ("query, key and value", "output"))


def find_neurons(model: nn.Module, projections: Sequence[Projections] | None = None) -> list[CoupledGroups]:
    """The neurons of every feed-forward, in the order of the model.

    Projections are known by the names that BERT, RoBERTa, ALBERT, ViT, DistilBERT, Llama, Phi, OPT, BART, T5, GPT-2,
    GPT-J, BLOOM, GPT-NeoX, Falcon, MPT and ModernBERT give them, and with them most models of transformers.
    Feed-forwards of other names, and experts stored as three-dimensional parameters, are not listed.

    Args:
        model: a transformer, plain or with adapters of any PEFT method.
        projections: what the projections are called, instead of the known names.

    Returns:
        For each feed-forward, rows of the up projection, and of the gate where there is one, and columns of the down
        projection. Paths are those of the base model.

    Raises:
        ValueError: if no feed-forward is found, or the rows of one do not fit its columns.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> shape = {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 6}
        >>> neurons = find_neurons(BertModel(BertConfig(vocab_size=9, **shape)))[0]
        >>> neurons.name, neurons.num_groups, neurons.modules
        ('encoder.layer.0', 6, ('encoder.layer.0.intermediate.dense', 'encoder.layer.0.output.dense'))
    """
    base = _base(model)
    found = _all_neurons(base, projections or _FEED_FORWARDS, is_named=projections is not None)
    return found or _refuse("feed-forward", projections, base, ("up and gate", "down"))


def find_groups(model: nn.Module) -> list[CoupledGroups]:
    """What `find_heads` and `find_neurons` find, as far as the names of a model's projections are known.

    Raises:
        ValueError: if neither finds anything, or sizes do not fit.
    """
    base = _base(model)
    found = [*_all_heads(base, _attentions_of(base), None), *_all_neurons(base, _FEED_FORWARDS, is_named=False)]
    return found or _refuse("attention layer or feed-forward", None, base, ("inputs", "output"))


def _all_heads(base: Any, known: Iterable[Projections], num_heads: int | None) -> list[CoupledGroups]:
    modules = dict(base.named_modules())
    found = []
    for names, projections in _matches(modules, known):
        owner = modules[names[0].rpartition(".")[0]]
        sources = [owner, *(getattr(module, "config", None) for module in (owner, base))]
        shapes = [_shape(modules[name]) for name in names]
        found.append(_heads(names, shapes, projections, num_heads or _number(sources)))
    return found


def _all_neurons(base: nn.Module, known: Iterable[Projections], *, is_named: bool) -> list[CoupledGroups]:
    modules = dict(base.named_modules())
    return [
        _neurons(names, [_shape(modules[name]) for name in names], projections, is_named=is_named)
        for names, projections in _matches(modules, known)
    ]


def _base(model: nn.Module) -> Any:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _attentions_of(base: Any) -> list[Projections]:
    configs = (getattr(module, "config", None) for module in base.modules())
    types = dict.fromkeys(getattr(config, "model_type", None) for config in configs)
    return [*_ATTENTIONS, *(_FUSED_ATTENTIONS[kind] for kind in types if kind in _FUSED_ATTENTIONS)]


def _matches(
    modules: Mapping[str, nn.Module], known: Iterable[Projections]
) -> Iterator[tuple[tuple[str, ...], Projections]]:
    """The paths of the projections, inputs first, of everything so called; what is called earlier comes first."""
    places = {name: place for place, name in enumerate(modules)}
    found: dict[str, tuple[tuple[str, ...], Projections]] = {}
    for projections in known:
        ends = (*projections.inputs, projections.output)
        for name in modules:
            if name != ends[0] and not name.endswith(f".{ends[0]}"):
                continue
            names = tuple(name.removesuffix(ends[0]) + end for end in ends)
            if all(_is_matrix(modules.get(other)) for other in names):
                found.setdefault(names[-1], (names, projections))
    return iter(sorted(found.values(), key=lambda match: places[match[0][0]]))


def _unwrapped(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_matrix(module: nn.Module | None) -> bool:
    return isinstance(_unwrapped(module), (nn.Linear, Conv1D))


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in), also where the weight is stored transposed, or packed into fewer numbers."""
    matrix = _unwrapped(module)
    return (matrix.nf, matrix.nx) if isinstance(matrix, Conv1D) else (matrix.out_features, matrix.in_features)


def _heads(
    names: Sequence[str], shapes: Sequence[tuple[int, int]], known: Projections, num_heads: int | None
) -> CoupledGroups:
    path = _common_path(names)
    if num_heads is None:
        raise ValueError(
            f"The number of heads of {path} is not known: neither it nor a configuration has one. Pass num_heads."
        )
    columns, rows = shapes[-1][1], sum(out for out, _ in shapes[:-1])
    # As many columns as queries, and as many values as keys.
    keys = (rows - columns) // 2
    groups = num_heads * keys // columns
    fits = not columns % num_heads and keys > 0 and num_heads * keys == groups * columns and not num_heads % groups
    sizes = [columns, keys, keys] if len(shapes) == 2 else [out for out, _ in shapes[:-1]]
    if not fits or sizes != [columns, keys, keys] or rows != sum(sizes):
        raise ValueError(
            f"{path} is not made of {num_heads} heads of one width: its queries, keys and values have {rows} rows in "
            f"all, its output projection {columns} columns."
        )
    return _groups(path, "heads", groups, names, shapes, known, sizes)


def _neurons(
    names: Sequence[str], shapes: Sequence[tuple[int, int]], known: Projections, *, is_named: bool
) -> CoupledGroups:
    path, columns = _common_path(names), shapes[-1][1]
    rows = [out for out, _ in shapes[:-1]]
    may_be_fused = len(rows) == 1 and (is_named or known.inputs[0] in _HOLD_GATE_AND_UP)
    sizes = [columns] * (2 if may_be_fused and rows == [2 * columns] else len(rows))
    if sum(sizes) != sum(rows) or (len(rows) > 1 and rows != sizes):
        raise ValueError(
            f"The neurons of {path} are not understood: {', '.join(names[:-1])} have {rows} rows, but {names[-1]} has "
            f"{columns} columns. Say with projections=[Projections(...)] which belong together."
        )
    return _groups(path, "neurons", columns, names, shapes, known, sizes)


def _groups(
    path: str,
    kind: Kind,
    num_groups: int,
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    known: Projections,
    sizes: Sequence[int],
) -> CoupledGroups:
    """The groups, given how many rows each of the maps has that make them, in the order of the rows."""
    if known.interleaved:
        sizes = [out for out, _ in shapes[:-1]]
    inputs, parts = iter(zip(names[:-1], shapes[:-1], strict=True)), []
    end, name, shape = 0, "", (0, 0)
    for size in sizes:
        if end == shape[0]:
            end, (name, shape) = 0, next(inputs)
        parts.append(Part(name, 0, end, size // num_groups, shape))
        end += size
    parts.append(Part(names[-1], 1, 0, shapes[-1][1] // num_groups, shapes[-1]))
    return CoupledGroups(path, kind, num_groups, tuple(parts))


def _number(sources: Iterable[Any]) -> int | None:
    """The number of heads, looked for in one source after the other."""
    found = (getattr(source, name, None) for source in sources for name in _NUM_HEADS)
    return next((value for value in found if isinstance(value, int)), None)


def _common_path(names: Sequence[str]) -> str:
    levels = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _refuse(
    what: str, projections: Sequence[Projections] | None, base: nn.Module, roles: tuple[str, str]
) -> list[CoupledGroups]:
    names = [name for name, module in base.named_modules() if _is_matrix(module)]
    known = "the names given" if projections else "names that are known for this type of model"
    raise ValueError(
        f"The model has no {what} whose projections bear {known}; its linear layers are {names[:8]}"
        f"{' and others' if len(names) > 8 else ''}. Say with projections=[Projections(...)] what {roles[0]} "
        f"({roles[1]}) are called."
    )
