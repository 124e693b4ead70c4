"""`peft-pst expand`: a compact checkpoint as a normal one again."""

from __future__ import annotations

from ..compact import expand_checkpoint
from .compact import convert, converting_parser, size_line
from .console import say

_DESCRIPTION = """\
Write a compact checkpoint as a normal one, bit for bit what `peft-pst compact` was given. It loads with
from_pretrained() of stock transformers, without this package."""


def run(argv: list[str]) -> None:
    """Expand as the command line says; see `peft-pst expand --help`.

    Raises:
        UserError: for a mistake in the input; an existing output stays whole.
    """
    options = converting_parser("expand", _DESCRIPTION).parse(argv)
    sizes = convert(expand_checkpoint, options)
    say(f"{size_line(sizes)}. The dense checkpoint is in {options.output}; it loads with from_pretrained().")
