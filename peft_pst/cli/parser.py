"""The argument parser of every command: complaints are one line instead of the usage and all its options."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, and takes options only under their full names.

    Example:
        >>> parser = OneLineParser(prog="peft-pst merge")
        >>> _ = parser.add_argument("--overwrite", action="store_true")
        >>> parser.parse(["--overwrit"])
        Traceback (most recent call last):
        ...
        peft_pst.cli.errors.UserError: --overwrit is not an option; did you mean --overwrite?
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read a command line; an argument that is none of the options is refused."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            self.refuse(unknown[0])
        return parsed

    def refuse(self, unknown: str) -> NoReturn:
        """Complain about an argument that is none of the options."""
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help."
        raise UserError(f"{unknown} is not an option; {hint}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")
