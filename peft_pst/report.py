"""How sparse a model is: zeros counted in the tensors, layer by layer, against what was promised.

Three sources give the same `SparsityReport`: a live model (`report_model`), a checkpoint on disk
(`report_checkpoint`), and the JSON that an earlier report was saved as (`SparsityReport.load`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from .checkpoint import StoredTensor, checkpoint_files, floating_tensors, is_compact, stored_tensors
from .embedding import PSTEmbeddingUpdate
from .group_selection import entries
from .json_file import write_json
from .layer import PSTLayer
from .masking import count_zeros, num_pruned
from .model import pst_layers
from .packing import compact_ratio
from .scope import Pair
from .sharding import whole_shape
from .tables import sparsity_table
from .units import units

REPORT_NAME = "pst_report.json"
"""The file beside a merged checkpoint's weights that keeps the promise and the target of each layer."""


_TRAINED = ("modules_to_save", *PSTLayer.adapter_layer_names, *PSTEmbeddingUpdate.adapter_layer_names)


@dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one weight matrix.

    Attributes:
        name: name of the layer in the plain model, such as "encoder.layer.0.attention.self.query".
        shape: (out_features, in_features), whatever the storage. For a matrix of a checkpoint of which nothing was
            promised it is the stored shape.
        zeros: entries that are exactly zero, counted in the tensor.
        promised: zeros that the adapter says are there, from its state; None where no adapter is known.
        target_sparsity: fraction of zeros to be reached at the end, in [0, 1); None where no adapter is known.
        target_zeros: what that comes to, where it is not `num_pruned(weights, target_sparsity)`, as with whole groups,
            or with a share of what several matrices have reached together.
        shares_target: whether the matrices that share it have that fraction together, each more or less.
        transposed: whether the tensor is stored as (in, out), as transformers' `Conv1D` does.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    promised: int | None = None
    target_sparsity: float | None = None
    transposed: bool = False
    target_zeros: int | None = None
    shares_target: bool = False

    @property
    def weights(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def lost_zeros(self) -> int:
        """Promised zeros that are not there: something was written into the matrix after it was pruned."""
        return 0 if self.promised is None else max(0, self.promised - self.zeros)

    @property
    def promised_at_target(self) -> int:
        """Zeros that the target asks for; 0 where none is known."""
        if self.target_zeros is None:
            return num_pruned(self.weights, self.target_sparsity or 0.0)
        return self.target_zeros

    @property
    def misses_target(self) -> bool:
        """Whether there are fewer zeros than the target asks for, unless it is not this matrix's alone."""
        return not self.shares_target and self.zeros < self.promised_at_target


@dataclass(frozen=True)
class StoredSizes:
    """What the tensors of a checkpoint take, in bytes, without the headers of the files.

    Attributes:
        dense: all tensors, if every entry is stored.
        stored: all tensors, as the files store them.
        layers_dense: the report's `layers`, if every entry is stored.
        layers_stored: the report's `layers`, as the files store them.
        layers_theory: the report's `layers` as packed mask and values, from the zeros that were counted.
        layers_bits: of one entry of `layers`; None where they differ.
        is_compact: whether the checkpoint is a compact one.
    """

    dense: int
    stored: int
    layers_dense: int
    layers_stored: int
    layers_theory: float
    layers_bits: int | None
    is_compact: bool


@dataclass(frozen=True)
class SparsityReport:
    """Zeros of a model, counted from its tensors.

    Attributes:
        source: what was counted: a class name, or a path as it was given.
        layers: the matrices in question: the adapted ones; in a checkpoint of which nothing was promised, those inside
            numbered blocks (or all, if there are no blocks).
        others: the remaining matrices of a checkpoint, such as embeddings and head; empty for a live model.
        total_parameters: parameters of the plain model, the adapter not counted.
        trainable_parameters: parameters that the adapter trains and saves, head included; None where none is known.
        files: sizes on disk in bytes, by file name; empty for a live model.
        sizes: what the tensors take densely and packed; None for a live model.

    Example:
        >>> row = LayerSparsity("layers.0.up", (4, 8), zeros=24, promised=24, target_sparsity=0.75)
        >>> report = SparsityReport("tiny", (row,), total_parameters=40)
        >>> report.zeros, report.weights, report.sparsity, report.misses_target
        (24, 32, 0.75, ())
    """

    source: str
    layers: tuple[LayerSparsity, ...]
    others: tuple[LayerSparsity, ...] = ()
    total_parameters: int = 0
    trainable_parameters: int | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    sizes: StoredSizes | None = None

    @property
    def zeros(self) -> int:
        """Zeros in `layers`."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def weights(self) -> int:
        """Entries of `layers`."""
        return sum(layer.weights for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in `layers`, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def target_sparsity(self) -> float | None:
        """Fraction of zeros in `layers` once each has reached its target; None where a target is not known."""
        if not self.weights or any(layer.target_sparsity is None for layer in self.layers):
            return None
        return sum(layer.promised_at_target for layer in self.layers) / self.weights

    @property
    def lost_zeros(self) -> tuple[LayerSparsity, ...]:
        """Layers that hold fewer zeros than was promised."""
        return tuple(layer for layer in self.layers if layer.lost_zeros)

    @property
    def misses_target(self) -> tuple[LayerSparsity, ...]:
        """Layers that hold fewer zeros than their target asks for."""
        sharing = [layer for layer in self.layers if layer.shares_target]
        missing = sum(layer.zeros - layer.promised_at_target for layer in sharing) < 0
        return tuple(layer for layer in self.layers if layer.misses_target or (missing and layer.shares_target))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the sums included; `from_dict` reads it back."""
        return {
            "source": self.source,
            "sparsity": self.sparsity,
            "target_sparsity": self.target_sparsity,
            "zeros": self.zeros,
            "weights": self.weights,
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "files": dict(self.files),
            "sizes": None if self.sizes is None else asdict(self.sizes),
            "lost_zeros": [layer.name for layer in self.lost_zeros],
            "misses_target": [layer.name for layer in self.misses_target],
            "layers": [_row_to_dict(layer) for layer in self.layers],
            "others": [_row_to_dict(layer) for layer in self.others],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityReport:
        """The inverse of `to_dict`; sums are made anew and not read.

        Raises:
            ValueError: if a field is missing or of another type.
        """
        try:
            return cls(
                source=values["source"],
                layers=tuple(map(_row_from_dict, values["layers"])),
                others=tuple(map(_row_from_dict, values["others"])),
                total_parameters=values["total_parameters"],
                trainable_parameters=values["trainable_parameters"],
                files=dict(values["files"]),
                sizes=None if values.get("sizes") is None else StoredSizes(**values["sizes"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a sparsity report ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; an interrupted write leaves the old file whole."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> SparsityReport:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}; write it anew with `peft-pst merge`.") from error

    def to_table(self, show_all: bool | None = None) -> str:
        """A table for the terminal, with sums and remarks.

        Args:
            show_all: one line for each matrix if True, one for each kind of matrix ("attention.self.query" of all
                blocks) if False; None shows every matrix where there are at most 16.

        Returns:
            Lines of at most about 110 characters for usual names, without a trailing newline.
        """
        return sparsity_table(self, show_all)


def report_model(model: nn.Module, adapter_name: str | None = None, *, progressbar: bool = False) -> SparsityReport:
    """Count the zeros of a live model's adapted layers, one layer at a time.

    Args:
        model: a model with PST adapters, a `PeftModel` or one with injected adapters; merged or not.
        adapter_name: the adapter to report on; by default those now active. Where several are active the layer is
            zero where any of them prunes, and the highest promise and target are the ones to keep.
        progressbar: whether to show progress on a terminal.

    Raises:
        ValueError: if the model has no such adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> base = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> model = get_peft_model(base, PSTConfig(target_modules=["0"], initial_sparsity=0.75, target_sparsity=0.75))
        >>> report = report_model(model)
        >>> report.layers[0]
        LayerSparsity(name='0', shape=(4, 8), zeros=24, promised=24, target_sparsity=0.75, transposed=False, \
target_zeros=None, shares_target=False)
        >>> report.trainable_parameters, report.total_parameters
        (204, 46)
    """
    found = {layer: _adapters_to_report(layer, adapter_name) for layer in pst_layers(model)}
    pairs = [(layer, names) for layer, names in found.items() if names]
    if not pairs:
        known = sorted({name for layer in found for name in layer.pst_plans})
        wanted = "active PST adapter" if adapter_name is None else f"PST adapter named {adapter_name!r}"
        raise ValueError(f"The model has no {wanted}; it has {known or 'none'}.")
    at_target = _zeros_at_target(pairs)
    rows = tuple(
        _count_layer(layer, names, at_target) for layer, names in _progress(pairs, progressbar, "counting", "layer")
    )
    names = sorted({name for _, names in pairs for name in names})
    return SparsityReport(
        source=_plain_class_name(model),
        layers=rows,
        total_parameters=sum(
            whole_shape(parameter).numel()
            for name, parameter in model.named_parameters()
            if not set(_TRAINED).intersection(name.split("."))
        ),
        trainable_parameters=sum(_count_adapter_parameters(model, name) for name in names),
    )


def report_checkpoint(path: str | Path, *, progressbar: bool = False) -> SparsityReport:
    """Count the zeros of every floating-point matrix of a safetensors checkpoint, one tensor at a time.

    A compact checkpoint is read like a dense one, and the report says what it saves.

    A `pst_report.json` beside the weights, as `peft-pst merge` writes it, says which layers were pruned and how many
    zeros each was promised; then `layers` holds these, and a layer that lost zeros since is flagged.

    Args:
        path: a folder with `model.safetensors`, a sharded checkpoint, a compact one, or other safetensors files; or one
            such file.
        progressbar: whether to show progress on a terminal.

    Raises:
        FileNotFoundError: if there are no safetensors files, or a shard is missing.
        ValueError: if a file is damaged, or the promises belong to another checkpoint.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"layers.0.up.weight": torch.eye(4)}, f"{folder}/model.safetensors")
        ...     report = report_checkpoint(folder)
        >>> report.layers[0].name, report.layers[0].zeros, report.sparsity
        ('layers.0.up', 12, 0.75)
    """
    files = checkpoint_files(path)
    promise_file = files[0].parent / REPORT_NAME
    promise = SparsityReport.load(promise_file) if promise_file.is_file() else None
    matrices: list[LayerSparsity] = []
    tensors = [*stored_tensors(files)]
    for stored in _progress(tensors, progressbar, "counting", "tensor"):
        if stored.is_floating and len(stored.shape) > 1:
            matrices += _count_stored(stored, promise)
    layers, others = _split(matrices) if promise is None else _compare(matrices, promise, promise_file)
    return SparsityReport(
        source=str(path),
        layers=layers,
        others=others,
        total_parameters=sum(math.prod(stored.shape) for stored in tensors if stored.is_floating),
        trainable_parameters=None if promise is None else promise.trainable_parameters,
        files={file.name: file.stat().st_size for file in files},
        sizes=_sizes(tensors, layers, is_compact(files)),
    )


def _count_stored(stored: StoredTensor, promise: SparsityReport | None) -> Iterator[LayerSparsity]:
    """The rows of one tensor: itself as a matrix, or each matrix of a stack of which each was promised zeros."""
    name, weight = _layer_name(stored.key), stored.read()
    if promise is not None and any(layer.name == f"{name}.0" for layer in promise.layers):
        for index, matrix in enumerate(weight):
            yield LayerSparsity(f"{name}.{index}", (matrix.shape[0], matrix.shape[1]), count_zeros(matrix))
    else:
        yield LayerSparsity(name, (weight.shape[0], math.prod(weight.shape[1:])), count_zeros(weight))


def _sizes(tensors: Sequence[StoredTensor], layers: Sequence[LayerSparsity], compact: bool) -> StoredSizes:
    found = {_layer_name(stored.key): stored for stored in tensors}
    pairs = [(found.get(layer.name) or found[layer.name.rpartition(".")[0]], layer) for layer in layers]
    whole = {stored.key: stored for stored, _ in pairs}.values()
    bits = {stored.bits for stored, _ in pairs}
    return StoredSizes(
        dense=sum(stored.dense_bytes for stored in tensors),
        stored=sum(stored.stored_bytes for stored in tensors),
        layers_dense=sum(stored.dense_bytes for stored in whole),
        layers_stored=sum(stored.stored_bytes for stored in whole),
        layers_theory=sum(
            layer.weights * stored.bits / 8 * compact_ratio(stored.bits, layer.sparsity) for stored, layer in pairs
        ),
        layers_bits=bits.pop() if len(bits) == 1 else None,
        is_compact=compact,
    )


def checkpoint_weight(path: str | Path, layer: LayerSparsity) -> Tensor:
    """The weight of one reported layer, read from the checkpoint, (out, in).

    Raises:
        KeyError: if the checkpoint has no such layer.
    """
    stack, _, index = layer.name.rpartition(".")
    for stored in floating_tensors(checkpoint_files(path)):
        if _layer_name(stored.key) == layer.name:
            weight = stored.read().flatten(1)
            return weight.T if layer.transposed else weight
        if stored.key == stack and index.isdigit() and len(stored.shape) == 3:
            weight = stored.read()[int(index)]
            return weight.T if layer.transposed else weight
    raise KeyError(f"{str(path)!r} holds no layer {layer.name!r}.")


# Counting


def _adapters_to_report(layer: PSTLayer, adapter_name: str | None) -> list[str]:
    wanted = layer.active_adapters if adapter_name is None else [adapter_name]
    return [name for name in wanted if name in layer.pst_plans]


def _count_layer(layer: PSTLayer, names: list[str], at_targets: Mapping[Pair, int]) -> LayerSparsity:
    base = layer.get_base_layer()
    # A merged layer is counted as it stands, whatever was done to it since.
    is_merged = sorted(layer.merged_adapters) == sorted(names)
    target = max(layer.pst_plans[name].target_sparsity for name in names)
    at_target = max(at_targets[layer, name] for name in names)
    return LayerSparsity(
        name=layer.module_name,
        shape=(layer.out_features, layer.in_features),
        zeros=count_zeros(layer.get_stored_weight() if is_merged else layer.get_masked_weight(names)),
        promised=max(layer.get_num_pruned(name) for name in names),
        target_sparsity=target,
        transposed=isinstance(base, Conv1D) or getattr(layer, "_is_transposed", False),
        target_zeros=None if at_target == num_pruned(layer.num_weights, target) else at_target,
        shares_target=any(layer.pst_plans[name].shares_target for name in names),
    )


def _zeros_at_target(pairs: Sequence[tuple[PSTLayer, list[str]]]) -> dict[Pair, int]:
    """What each layer's target comes to; of a target that several share and have reached, what fell to the layer."""
    found = {(layer, name): _own_zeros_at_target(layer, name) for layer, names in pairs for name in names}
    for unit in units((layer, name, layer.pst_plans[name].target_sparsity) for layer, name in found):
        if unit.plan.shares_target and unit.in_force in unit.reach:
            found.update({(layer, name): layer.get_num_pruned(name) for layer, name in unit.pairs})
    return found


def _own_zeros_at_target(layer: PSTLayer, adapter_name: str) -> int:
    plan = layer.pst_plans[adapter_name]
    if plan.groups is None:
        return sum(layer.counts_at(adapter_name, plan.target_sparsity))
    return num_pruned(plan.groups.num_groups, plan.target_sparsity) * entries(plan.groups, layer.module_name)


def _count_adapter_parameters(model: nn.Module, adapter_name: str) -> int:
    """Parameters in the adapter's file; what else a layer keeps there, such as its zero count, is not one."""
    # Of empty tensors, since only their sizes are asked for, and what is sharded would be gathered.
    sizes = {
        name: torch.empty(whole_shape(tensor), device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    state = get_peft_model_state_dict(model, sizes, adapter_name, save_embedding_layers=False)
    return sum(
        tensor.numel() for name, tensor in state.items() if name.rpartition(".")[2] not in PSTLayer.other_param_names
    )


def _plain_class_name(model: nn.Module) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__


def _progress(items: Any, show: bool, what: str, unit: str) -> Any:
    return tqdm(items, desc=what, unit=unit, leave=False, disable=None if show else True)


# Checkpoints


def _layer_name(key: str) -> str:
    return key.removesuffix(".weight")


def _split(
    matrices: Sequence[LayerSparsity],
) -> tuple[tuple[LayerSparsity, ...], tuple[LayerSparsity, ...]]:
    """Matrices inside numbered blocks, and the rest (embeddings, pooler, head)."""
    ordered = sorted(matrices, key=_natural_order)
    inside = tuple(layer for layer in ordered if re.search(r"(^|\.)\d+\.", layer.name))
    if not inside:
        return tuple(ordered), ()
    return inside, tuple(layer for layer in ordered if layer not in inside)


def _natural_order(layer: LayerSparsity) -> list[tuple[int, str]]:
    """Block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.name.split(".")]


def _compare(
    matrices: Sequence[LayerSparsity], promise: SparsityReport, promise_file: Path
) -> tuple[tuple[LayerSparsity, ...], tuple[LayerSparsity, ...]]:
    """Each promised layer as it is now, in the order of the promise, and the rest."""
    found = {layer.name: layer for layer in matrices}
    layers = []
    for promised in promise.layers:
        layer = found.pop(promised.name, None)
        stored = promised.shape[::-1] if promised.transposed else promised.shape
        if layer is None or layer.shape != stored:
            problem = "is not in the checkpoint" if layer is None else f"has shape {layer.shape} and not {stored}"
            raise ValueError(
                f"Layer {promised.name} of {str(promise_file)!r} {problem}: the file belongs to another checkpoint; "
                "remove it, or put back the one that `peft-pst merge` wrote."
            )
        layers.append(replace(promised, zeros=layer.zeros))
    return tuple(layers), tuple(sorted(found.values(), key=_natural_order))


# JSON


def _row_to_dict(layer: LayerSparsity) -> dict[str, Any]:
    return {**asdict(layer), "shape": list(layer.shape), "weights": layer.weights, "sparsity": layer.sparsity}


def _row_from_dict(values: Mapping[str, Any]) -> LayerSparsity:
    out, in_ = (int(size) for size in values["shape"])
    names = [field.name for field in fields(LayerSparsity) if field.name != "shape" and field.name in values]
    return LayerSparsity(shape=(out, in_), **{name: values[name] for name in names})
