"""The tensors of a safetensors checkpoint, whole or sharded, without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class StoredTensor(NamedTuple):
    """Where one tensor lies; `read` fetches it."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.key)


def checkpoint_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, looked for in transformers' order.

    Args:
        path: a folder with `model.safetensors`, with a sharded checkpoint and its index, or with other safetensors
            files; or one such file.

    Raises:
        FileNotFoundError: if there are none, or one that the index names is missing.
        ValueError: if the index is damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if (path / SAFE_WEIGHTS_NAME).is_file():
        return [path / SAFE_WEIGHTS_NAME]
    index = path / SAFE_WEIGHTS_INDEX_NAME
    files = _indexed_files(index) if index.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(path)!r} holds no safetensors files; pass the folder of a checkpoint.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is damaged: {error!r}.") from error
    files = [index.with_name(name) for name in names]
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
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # not a dict
                    piece = tensors.get_slice(key)
                    if piece.get_dtype() in _FLOATING:
                        yield StoredTensor(file, key, tuple(piece.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged: {error}; save or download it anew.") from error
