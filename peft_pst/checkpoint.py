"""The tensors of a safetensors checkpoint, whole or sharded, dense or compact, without loading it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .packing import Packed, packed_bytes, unpack_tensor

# Not transformers' names: a stock loader given the folder must find no weights, rather than few of them.
COMPACT_NAME = "compact.safetensors"
COMPACT_INDEX_NAME = "compact.safetensors.index.json"
COMPACT_FORMAT = "peft_pst_compact"
COMPACT_VERSION = 1
MASK_SUFFIX, VALUES_SUFFIX = ".pst_mask", ".pst_values"

_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_MOST_AXES = 64  # as NumPy has it


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies; `read` fetches it.

    Attributes:
        file: the safetensors file.
        key: name of the tensor in the model, whatever the file calls its parts.
        shape: shape of the tensor.
        dtype: its type as safetensors names it, such as "BF16".
        kept: number of stored values where mask and values are stored instead of the tensor, else None.
        tensors: the file, open for reading.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    kept: int | None
    tensors: Any

    @property
    def is_floating(self) -> bool:
        """Whether the tensor holds floating-point numbers, of which zeros are counted."""
        return self.dtype in _FLOATING

    @property
    def bits(self) -> int:
        """Of one entry."""
        return _BITS[self.dtype]

    @property
    def dense_bytes(self) -> int:
        """What the tensor takes if every entry is stored."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def stored_bytes(self) -> int:
        """What it takes in its file."""
        return self.dense_bytes if self.kept is None else packed_bytes(math.prod(self.shape), self.kept, self.bits)

    def read(self) -> Tensor:
        """The tensor, dense.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            if self.kept is None:
                return self.tensors.get_tensor(self.key)
            parts = (self.tensors.get_tensor(self.key + suffix) for suffix in (MASK_SUFFIX, VALUES_SUFFIX))
            return unpack_tensor(Packed(*parts), self.shape)
        except (SafetensorError, ValueError) as error:
            raise _damaged(self.file, f"tensor {self.key!r}: {error}") from error


def checkpoint_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: transformers' names in its order, a compact checkpoint's, then others.

    Args:
        path: a folder with `model.safetensors`, with a sharded checkpoint and its index, with a compact checkpoint,
            or with other safetensors files; or one such file.

    Raises:
        FileNotFoundError: if there are none, or one that the index names is missing.
        ValueError: if the index is damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (COMPACT_NAME, COMPACT_INDEX_NAME)):
        if (path / whole).is_file():
            return [path / whole]
        if (path / index).is_file():
            return _indexed_files(path / index)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(path)!r} holds no safetensors files; pass the folder of a checkpoint.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.with_name(name) for name in names]  # which refuses whatever leads out of the folder
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} is damaged: {error!r}.") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{str(file)!r} is missing, although {index.name} names it.")
    return files


def floating_tensors(files: Iterable[Path]) -> Iterator[StoredTensor]:
    """The floating-point tensors of safetensors files, from their headers.

    Raises:
        ValueError: if a file is damaged.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.ones(4, 8), "ids": torch.arange(3)}, f"{folder}/model.safetensors")
        ...     [(stored.key, stored.shape) for stored in floating_tensors(checkpoint_files(folder))]
        [('up.weight', (4, 8))]
    """
    return (stored for stored in stored_tensors(files) if stored.is_floating)


def stored_tensors(files: Iterable[Path]) -> Iterator[StoredTensor]:
    """All tensors of safetensors files, from their headers; those that a compact checkpoint stores in parts, whole.

    Raises:
        ValueError: if a file is damaged, or two hold a tensor of the same name.
    """
    seen: dict[str, Path] = {}
    for file in files:
        for stored in _tensors_of(file):
            if stored.key in seen:
                raise _damaged(file, f"tensor {stored.key!r} is in {seen[stored.key].name} too")
            seen[stored.key] = file
            yield stored


def is_compact(files: Iterable[Path]) -> bool:
    """Whether some of these files are of a compact checkpoint.

    Raises:
        ValueError: if a file is damaged.
    """
    return any(file_metadata(file).get("format") == COMPACT_FORMAT for file in files)


def file_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself.

    Raises:
        ValueError: if the file is damaged.
    """
    return _open(file).metadata() or {}


def original_metadata(files: Iterable[Path]) -> dict[str, str]:
    """What the dense checkpoint said of itself, also where these files are of a compact one.

    Raises:
        ValueError: if a file is damaged.
    """
    found: dict[str, str] = {}
    for file in files:
        metadata = file_metadata(file)
        if metadata.get("format") == COMPACT_FORMAT:
            metadata = _read_json(file, metadata, "original")
        found |= {key: value for key, value in metadata.items() if isinstance(value, str)}
    return found


def _read_json(file: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise _damaged(file, f"its metadata {key!r} cannot be read ({error!r})") from error
    if not isinstance(value, dict):
        raise _damaged(file, f"its metadata {key!r} is no JSON object")
    return value


def compact_metadata(shapes: Mapping[str, tuple[int, ...]], original: Mapping[str, str]) -> dict[str, str]:
    """What a file of a compact checkpoint says of itself.

    Args:
        shapes: of the tensors that are stored in parts.
        original: what the dense checkpoint said of itself.
    """
    return {
        "format": COMPACT_FORMAT,
        "version": str(COMPACT_VERSION),
        "shapes": json.dumps(shapes),
        "original": json.dumps(original),
    }


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _tensors_of(file: Path) -> list[StoredTensor]:
    tensors = _open(file)
    stored = {}
    for key in tensors.keys():  # noqa: SIM118  # not a dict
        piece = tensors.get_slice(key)
        stored[key] = StoredTensor(file, key, tuple(piece.get_shape()), piece.get_dtype(), None, tensors)
        if stored[key].dtype not in _BITS:
            raise _damaged(file, f"tensor {key!r} is of the unknown type {stored[key].dtype}")
    metadata = tensors.metadata() or {}
    if metadata.get("format") != COMPACT_FORMAT:
        return [*stored.values()]
    if metadata.get("version") != str(COMPACT_VERSION):
        raise ValueError(
            f"{str(file)!r} is of version {metadata.get('version')!r} of the compact format, and this release of "
            f"peft_pst reads {COMPACT_VERSION}; try `pip install --upgrade peft-pst`."
        )
    shapes = _read_json(file, metadata, "shapes")
    try:
        compact = {key: _joined(key, _checked_shape(key, shape), stored) for key, shape in shapes.items()}
    except ValueError as error:
        raise _damaged(file, error) from error
    clash = compact.keys() & stored.keys()
    if clash:
        raise _damaged(file, f"tensor {min(clash)!r} is there twice, dense and in parts")
    return [*stored.values(), *compact.values()]


def _checked_shape(key: str, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        raise ValueError(f"the shape of tensor {key!r} is no list of at most {_MOST_AXES} sizes")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"the shape of tensor {key!r} holds what is no size")
    return tuple(shape)


def _joined(key: str, shape: tuple[int, ...], stored: dict[str, StoredTensor]) -> StoredTensor:
    """The tensor of which mask and values are stored; takes these out of what the file holds."""
    try:
        mask, values = stored.pop(key + MASK_SUFFIX), stored.pop(key + VALUES_SUFFIX)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    numel = math.prod(shape)
    if mask.dtype != "U8" or mask.shape != (math.ceil(numel / 8),):
        raise ValueError(
            f"{mask.key} is {mask.dtype} of shape {list(mask.shape)}, but a tensor of {numel} entries has a mask of "
            f"{math.ceil(numel / 8)} bytes"
        )
    if len(values.shape) != 1 or values.shape[0] > numel or values.bits < 8:
        raise ValueError(f"{values.key} is {values.dtype} of shape {list(values.shape)}, for {numel} entries")
    return StoredTensor(mask.file, key, shape, values.dtype, values.shape[0], mask.tensors)


def _damaged(file: Path, problem: object) -> ValueError:
    return ValueError(f"{str(file)!r} is damaged: {problem}; save or download it anew.")
