"""Whose line a warning names: the user's, not one of the libraries between it and this package."""

from __future__ import annotations

import sys

_BETWEEN = ("peft_pst", "peft", "torch", "transformers", "accelerate", "contextlib")


def users_level() -> int:
    """The `stacklevel` with which `warnings.warn`, where this is called, names the nearest line of the user's own.

    Example:
        >>> users_level() >= 1
        True
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    return level
