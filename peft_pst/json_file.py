"""Writing JSON so that a failed write leaves the old file whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, values: Any) -> None:
    """Write values as indented JSON, beside the file first, then in its place.

    Args:
        path: the file; what is there is replaced at the end, and stays as it is on an error.
        values: whatever `json.dumps` takes.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "values.json"
        >>> write_json(path, {"zeros": 3})
        >>> json.loads(path.read_text())
        {'zeros': 3}
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
