"""Compact checkpoints: small files for pruned models, exact to the bit, and back again.

A compact checkpoint is a folder of plain safetensors files beside the model's own configuration and tokenizer. Of a
tensor with enough zeros it stores one bit an entry and the other values; other tensors are stored as they are.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import convert_file_size_to_int
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint import (
    COMPACT_INDEX_NAME,
    COMPACT_NAME,
    MASK_SUFFIX,
    VALUES_SUFFIX,
    StoredTensor,
    checkpoint_files,
    compact_metadata,
    is_compact,
    original_metadata,
    stored_tensors,
)
from .folders import check_replaceable, replaced_folder
from .packing import kept_values, num_negative_zeros, pack_tensor, packed_bytes, without_negative_zeros

MAX_SHARD_SIZE = "2GB"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class CompactSizes(NamedTuple):
    """What the tensors of a checkpoint take.

    Attributes:
        dense: bytes of all tensors, each stored densely.
        compact: bytes of all tensors as a compact checkpoint stores them.
        packed: number of tensors that are stored as mask and values.
        tensors: number of all tensors.
    """

    dense: int
    compact: int
    packed: int
    tensors: int


def compact_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    negative_zeros: bool = True,
    overwrite: bool = False,
    progressbar: bool = False,
) -> CompactSizes:
    """Write a checkpoint anew, with the zeros of its sparse tensors left out.

    One tensor is made at a time, and at most one file of them is held until it is written. Every bit comes back from
    `expand_checkpoint` and `load_compact`: -0.0, which is not left out, infinities, and NaNs with their payloads. A
    tensor is packed only where that is smaller. Stock loaders find no weights in the folder, and say so.

    Args:
        checkpoint: a folder with safetensors weights, whole or sharded, or one such file.
        output: the folder to write; it appears once it is complete. Files that are no weights, such as the
            configuration and the tokenizer, are copied along.
        max_shard_size: bytes of one file at most, as a number or as a text such as "2GB"; a single larger tensor still
            gets a file of its own.
        negative_zeros: whether -0.0, which multiplying by a mask leaves behind, comes back as what it is. It then takes
            the room of any value; False makes 0.0 of it, in all tensors.
        overwrite: whether to replace a checkpoint that `output` holds.
        progressbar: whether to show progress on a terminal.

    Returns:
        How large the tensors were and are.

    Raises:
        FileNotFoundError: if there are no safetensors files, or a shard is missing.
        FileExistsError: if `output` exists and is not to be replaced, or is what is read.
        ValueError: if a file is damaged or compact already, or `max_shard_size` is no size.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.eye(64)}, f"{folder}/model.safetensors")
        ...     compact_checkpoint(folder, f"{folder}/compact")
        CompactSizes(dense=16384, compact=768, packed=1, tensors=1)
    """
    files = checkpoint_files(checkpoint)
    if is_compact(files):
        raise ValueError(f"{str(checkpoint)!r} is compact already; `peft-pst expand` makes a dense checkpoint of it.")
    original = original_metadata(files)
    stored = _with_progress(stored_tensors(files), "packing", progressbar)
    with _checkpoint_beside(Path(checkpoint), Path(output), overwrite) as folder:
        _write_shards(
            folder,
            (COMPACT_NAME, COMPACT_INDEX_NAME),
            _packed_entries(stored, negative_zeros),
            _as_bytes(max_shard_size),
            lambda shapes: compact_metadata(shapes, original),
        )
        return compact_sizes(folder)


def expand_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progressbar: bool = False,
) -> CompactSizes:
    """Write a compact checkpoint as a normal one, which loads everywhere: the inverse of `compact_checkpoint`.

    Args:
        checkpoint: the compact folder.
        output: as for `compact_checkpoint`.
        max_shard_size: as for `compact_checkpoint`.
        overwrite: as for `compact_checkpoint`.
        progressbar: as for `compact_checkpoint`.

    Returns:
        How large the tensors are and were.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: as for `compact_checkpoint`.
        ValueError: if a file is damaged or not compact, or `max_shard_size` is no size.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import load_file
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.eye(64)}, f"{folder}/model.safetensors")
        ...     _ = compact_checkpoint(folder, f"{folder}/compact")
        ...     _ = expand_checkpoint(f"{folder}/compact", f"{folder}/dense")
        ...     torch.equal(load_file(f"{folder}/dense/model.safetensors")["up.weight"], torch.eye(64))
        True
    """
    files = _compact_files(checkpoint)
    original = original_metadata(files)
    stored = _with_progress(stored_tensors(files), "expanding", progressbar)
    with _checkpoint_beside(Path(checkpoint), Path(output), overwrite) as folder:
        _write_shards(
            folder,
            (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
            (_Entry({tensor.key: tensor.read()}) for tensor in stored),
            _as_bytes(max_shard_size),
            lambda shapes: original,
        )
    return compact_sizes(checkpoint)


def load_compact(
    checkpoint: str | Path, model_class: type | None = None, *, config: PreTrainedConfig | None = None, **options: Any
) -> PreTrainedModel:
    """Load a compact checkpoint into a stock transformers model, as its `from_pretrained` loads a dense one.

    The model holds dense weights; each tensor is read, checked and expanded when its turn comes, so that there is no
    second copy of them.

    Args:
        checkpoint: the compact folder.
        model_class: a model class or an Auto class of transformers; by default the class that the configuration names.
        config: instead of the one in the folder, for example with other `num_labels`.
        options: further options of `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the checkpoint is damaged or not compact, or the configuration names no class of transformers.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> with TemporaryDirectory() as folder:
        ...     BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)
        ...     _ = compact_checkpoint(folder, f"{folder}/compact")
        ...     type(load_compact(f"{folder}/compact")).__name__
        'BertModel'
    """
    files = _compact_files(checkpoint)
    state = {tensor.key: _ReadInTurn(tensor) for tensor in stored_tensors(files)}
    if config is None:
        config = AutoConfig.from_pretrained(checkpoint)
    found: Any = _model_class(config, model_class)
    model = found.from_pretrained(None, config=config, state_dict=state, **options)
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    if model.can_generate() and (Path(checkpoint) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


def compact_sizes(checkpoint: str | Path) -> CompactSizes:
    """What the tensors of a compact checkpoint take, from the headers of its files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.
    """
    stored = [*stored_tensors(checkpoint_files(checkpoint))]
    return CompactSizes(
        dense=sum(tensor.dense_bytes for tensor in stored),
        compact=sum(tensor.stored_bytes for tensor in stored),
        packed=sum(tensor.kept is not None for tensor in stored),
        tensors=len(stored),
    )


# Reading


class _ReadInTurn:
    """What transformers take for a tensor that still lies in its file."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def __getitem__(self, index: Any) -> Tensor:
        return self._stored.read()[index]

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.read().dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def _compact_files(checkpoint: str | Path) -> list[Path]:
    files = checkpoint_files(checkpoint)
    if not is_compact(files):
        raise ValueError(
            f"{str(checkpoint)!r} is a dense checkpoint; load it with from_pretrained(), or make a compact one with "
            "`peft-pst compact`."
        )
    return files


def _model_class(config: PreTrainedConfig, model_class: type | None) -> type:
    if model_class is None:
        name = next(iter(getattr(config, "architectures", None) or []), None)
        model_class = getattr(transformers, str(name), None)
        if model_class is None:
            raise ValueError(
                f"The configuration names the class {name!r}, which transformers do not have; pass model_class."
            )
    if not issubclass(model_class, PreTrainedModel) and hasattr(model_class, "from_config"):
        with torch.device("meta"):  # an Auto class tells its choice by making a model
            model_class = type(model_class.from_config(config))
    if not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"model_class={model_class!r} is no model class of transformers.")
    return model_class


# Writing


class _Entry(NamedTuple):
    """What a file holds of one tensor of the model: itself, or mask and values and its shape, by their names there."""

    tensors: dict[str, Tensor]
    shape: tuple[str, tuple[int, ...]] | None = None

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _packed_entries(stored: Iterable[StoredTensor], negative_zeros: bool) -> Iterator[_Entry]:
    """Each tensor, packed where that is smaller; says at the end what -0.0 has cost."""
    negative, numel = 0, 0
    for tensor in stored:
        _check_name(tensor)
        dense = tensor.read()
        numel += dense.numel()
        if tensor.bits >= 8:
            negative += num_negative_zeros(dense)
            dense = dense if negative_zeros else without_negative_zeros(dense)
        yield _packed_where_smaller(tensor, dense)
        del dense  # or it would be held until the next one is read
    if negative_zeros and negative > 0.01 * numel:
        warnings.warn(
            f"{negative:,} of {numel:,} weights are -0.0, as multiplying by a mask leaves them; each is stored as a "
            "value, so that it comes back. negative_zeros=False (--drop_negative_zeros) makes 0.0 of them, which takes "
            "less.",
            stacklevel=2,
        )


def _check_name(stored: StoredTensor) -> None:
    if stored.key.endswith((MASK_SUFFIX, VALUES_SUFFIX)):
        raise ValueError(
            f"Tensor {stored.key!r} of {str(stored.file)!r} has a name that the compact format keeps for itself, "
            f"ending in {MASK_SUFFIX!r} or {VALUES_SUFFIX!r}; rename it."
        )


def _packed_where_smaller(stored: StoredTensor, dense: Tensor) -> _Entry:
    if stored.bits >= 8:
        size = packed_bytes(dense.numel(), kept_values(dense), stored.bits)
        # The header names two tensors instead of one, and a shape.
        if size + 2 * len(stored.key) + 128 < stored.dense_bytes:
            parts = zip((MASK_SUFFIX, VALUES_SUFFIX), pack_tensor(dense), strict=True)
            return _Entry({stored.key + suffix: part for suffix, part in parts}, (stored.key, stored.shape))
    return _Entry({stored.key: dense})


@contextmanager
def _checkpoint_beside(checkpoint: Path, output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder with what else the checkpoint's folder holds, to write weights into; it then becomes `output`."""
    output = output.resolve()
    check_replaceable(output, overwrite, sources=[checkpoint])
    with replaced_folder(output) as folder:
        if checkpoint.is_dir():
            _copy_others(checkpoint, folder)
        yield folder


def _copy_others(source: Path, target: Path) -> None:
    """Copy what is neither weights nor hidden; a folder with weights in it belongs to something else."""
    for entry in sorted(source.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() and not entry.name.endswith(_WEIGHTS):
            shutil.copy2(entry, target / entry.name)
        elif entry.is_dir() and any(inside.name.endswith(_WEIGHTS) for inside in entry.rglob("*")):
            warnings.warn(f"The folder {str(entry)!r} holds other weights, and was not copied.", stacklevel=2)
        elif entry.is_dir():
            shutil.copytree(entry, target / entry.name)


def _write_shards(
    folder: Path,
    names: tuple[str, str],
    entries: Iterable[_Entry],
    max_bytes: int,
    metadata: Callable[[dict[str, tuple[int, ...]]], dict[str, str]],
) -> None:
    """Write entries into one file, or into several and an index.

    Args:
        folder: where to write.
        names: of the file, if one will do, and of the index.
        entries: made one at a time, and held until their file is written.
        max_bytes: of one file, unless a single entry is larger.
        metadata: from the shapes of the tensors that a file stores in parts, what it says of itself.
    """
    whole, index = names
    parts: list[Path] = []
    keys: list[list[str]] = []
    total = 0
    for shard in _shards(entries, max_bytes):
        parts.append(folder / f"{len(parts)}.part")
        keys.append(_save_shard(shard, parts[-1], metadata))
        total += sum(entry.size for entry in shard)
        del shard  # or it would be held until the next one is complete
    stem = whole.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, (part, names_in_part) in enumerate(zip(parts, keys, strict=True), start=1):
        name = whole if len(parts) == 1 else f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        part.rename(folder / name)
        weight_map |= dict.fromkeys(names_in_part, name)
    if len(parts) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save_shard(
    shard: list[_Entry], file: Path, metadata: Callable[[dict[str, tuple[int, ...]]], dict[str, str]]
) -> list[str]:
    """Write one file; returns the names of its tensors."""
    tensors = {name: tensor for entry in shard for name, tensor in entry.tensors.items()}
    save_file(tensors, file, metadata(dict(entry.shape for entry in shard if entry.shape is not None)))
    return [*tensors]


def _shards(entries: Iterable[_Entry], max_bytes: int) -> Iterator[list[_Entry]]:
    """Entries in groups of at most so many bytes, at least one group."""
    shard: list[_Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.size > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.size
    yield shard


def _as_bytes(size: int | str) -> int:
    try:
        number = convert_file_size_to_int(size)
    except ValueError as error:
        raise ValueError(
            f"max_shard_size={size!r} is no size; pass a number of bytes, or a text like '2GB'."
        ) from error
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} is below 1 byte; pass a number of bytes, or a text like '2GB'.")
    return number


def _with_progress(stored: Iterable[StoredTensor], what: str, show: bool) -> Iterable[StoredTensor]:
    return tqdm([*stored], desc=what, unit="tensor", leave=False, disable=None if show else True)
