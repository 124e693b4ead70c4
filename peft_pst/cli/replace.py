"""Writing a folder so that whoever looks finds the old one or the new one, and never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
