"""Folders to write: refused before any work where they cannot be made, and not left behind empty."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..folders import check_replaceable
from .errors import UserError


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
    """Refuse to replace what is no checkpoint, what was not to be replaced, and what is read; see `check_replaceable`.

    Raises:
        UserError: if it must not be written.
    """
    try:
        check_replaceable(output, overwrite, sources)
    except FileExistsError as error:
        raise UserError(error) from error
