"""Folders to write: refused before any work where they cannot be made, and never seen half written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import CONFIG_NAME

from .errors import UserError


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


@contextmanager
def no_folder_left_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder that the block made, and the ones above it, when the block ends with an error.

    Args:
        folder: one that is there already is left alone, and so is a new one that holds something.
    """
    new = [level for level in (folder, *folder.parents) if not level.exists()]
    try:
        yield
    except BaseException:
        for level in new:
            with suppress(FileNotFoundError):  # never made, or removed by another process that failed too
                if not any(level.iterdir()):
                    level.rmdir()
        raise


def check_writable(output: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written to, before any work is done.

    Args:
        output: the folder, which need not exist.
        option: the option that names it, for the message.

    Raises:
        UserError: if no file can be made in it, or in the innermost folder above it that there is.
    """
    try:
        existing = next(level for level in (output.absolute(), *output.absolute().parents) if level.exists())
        # Permissions do not tell: the superuser has all, and still makes no folder in /proc.
        with tempfile.TemporaryFile(dir=existing):
            return
    except NotADirectoryError:
        problem = f"{str(existing)!r} is not a folder"
    except OSError as error:
        problem = str(error.strerror)
    raise UserError(f"cannot write to {str(output)!r}: {problem}; name another folder with --{option}.")


def check_checkpoint_folder(output: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse to replace what is no checkpoint, what was not to be replaced, and what is read.

    Args:
        output: the folder to be written, an absolute path.
        overwrite: whether a checkpoint there may be replaced.
        sources: folders that are read.

    Raises:
        UserError: if it must not be written.
    """
    if output.is_file():
        raise UserError(f"{output} is a file; pass a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(output):
            raise UserError(f"{output} cannot be written, because {source} is read from it; pass another folder.")
    if not overwrite:
        raise UserError(f"{output} exists already; pass another folder, or --overwrite to replace it.")
    if not (output / CONFIG_NAME).is_file():
        raise UserError(f"{output} holds something else than a checkpoint, so it is not replaced; pass another folder.")


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
