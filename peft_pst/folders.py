"""Folders that take the place of what was there: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output` to write into; it takes that name when the block ends without an error.

    Args:
        output: an absolute path. Whatever is there is replaced at the end, and stays as it is on an error.

    Example:
        >>> import tempfile
        >>> output = Path(tempfile.mkdtemp()) / "model"
        >>> with replaced_folder(output) as folder:
        ...     _ = (folder / "config.json").write_text("{}")
        >>> [file.name for file in output.iterdir()]
        ['config.json']
    """
    beside = output.with_name(f".{output.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        yield beside
        _swap(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # it is gone unless something failed


def check_replaceable(output: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse to replace what is no checkpoint, what was not to be replaced, and what is read.

    Args:
        output: an absolute path; what is not there yet, or is an empty folder, is never refused.
        overwrite: whether a checkpoint that is there may be replaced.
        sources: what is read while `output` is written.

    Raises:
        FileExistsError: naming `output` and what to do.
    """
    if output.is_file():
        raise FileExistsError(f"{output} is a file; pass a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(output):
            raise FileExistsError(f"{output} cannot be written, because {source} is read from it; pass another folder.")
    if not overwrite:
        raise FileExistsError(f"{output} exists already; pass another folder, or --overwrite to replace it.")
    if not (output / CONFIG_NAME).is_file():
        raise FileExistsError(
            f"{output} holds something else than a checkpoint, so it is not replaced; pass another folder."
        )


def _swap(new: Path, output: Path) -> None:
    if not output.exists():
        new.rename(output)
        return
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)
