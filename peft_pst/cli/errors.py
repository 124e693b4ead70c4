"""What the command line says about a user's mistake."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in the input, said in one line: the thing, the value, the bound and the remedy."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise UserError(f"this needs the package {error.name!r}; run: pip install 'peft-pst[{extra}]'") from error
