"""The command line, `peft-pst` or `python -m peft_pst`: one file a command, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .errors import UserError, say_mistake

COMMANDS = {
    "train": "fine-tune and prune a model",
    "merge": "turn an adapter into a pruned checkpoint that stock transformers load",
    "shrink": "remove the heads and neurons that do nothing from a pruned checkpoint",
    "report": "count the zeros of an adapter or a checkpoint",
    "bench": "measure what the zeros buy on this machine",
    "compact": "write a pruned checkpoint as a small one",
    "expand": "turn a compact checkpoint into a normal one again",
    "demo": "fine-tune, prune, merge and reload a small real model on real data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake ends in one line on standard error and status 2.

    Where several processes run the command, one of them says it. A command may return a status of its own, as
    `report --against` does where zeros were lost.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .._version import __version__

        print(f"peft-pst {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"peft-pst: error: {command!r} is none of {', '.join(COMMANDS)}; see peft-pst --help.", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f".{command}", __name__).run(rest) or 0
    except UserError as error:
        say_mistake(f"peft-pst {command}: error: {error}")
        return 2


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_}" for name, help_ in COMMANDS.items()]
    return "\n".join(
        ["usage: peft-pst COMMAND [options]", "", *lines, "", "peft-pst COMMAND --help lists the options."]
    )
