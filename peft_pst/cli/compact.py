"""`peft-pst compact`: a pruned checkpoint as a small one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..compact import MAX_SHARD_SIZE, CompactSizes, compact_checkpoint
from ..tables import file_size
from .console import plain_warnings, say
from .errors import UserError
from .parser import OneLineParser

_DESCRIPTION = """\
Write a pruned checkpoint as a compact one: of each sparse tensor one bit an entry and the values that are left, exact
to the bit. Load it with peft_pst.load_compact(), or make a normal checkpoint of it with `peft-pst expand`."""


def run(argv: list[str]) -> None:
    """Compact as the command line says; see `peft-pst compact --help`.

    Raises:
        UserError: for a mistake in the input; an existing output stays whole.
    """
    parser = converting_parser("compact", _DESCRIPTION)
    parser.add_argument(
        "--drop_negative_zeros",
        "--drop-negative-zeros",
        action="store_true",
        help="make 0.0 of -0.0, which otherwise takes the room of a value",
    )
    options = parser.parse(argv)
    sizes = convert(compact_checkpoint, options, negative_zeros=not options.drop_negative_zeros)
    say(f"{size_line(sizes)}. It is in {options.output}; load it with peft_pst.load_compact({options.output!r}).")


def converting_parser(command: str, description: str) -> OneLineParser:
    """The options that `compact` and `expand` share."""
    parser = OneLineParser(prog=f"peft-pst {command}", description=description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint to read")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument(
        "--max_shard_size",
        "--max-shard-size",
        metavar="SIZE",
        default=MAX_SHARD_SIZE,
        help=f"of one file at most, such as 500MB (default: {MAX_SHARD_SIZE})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUTPUT holds")
    return parser


def convert(convert_checkpoint: Callable[..., CompactSizes], options: Any, **further: Any) -> CompactSizes:
    """Convert as the options say, and turn what may go wrong into a `UserError`."""
    with plain_warnings(), _as_user_error():
        return convert_checkpoint(
            options.checkpoint,
            options.output,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            progressbar=True,
            **further,
        )


def size_line(sizes: CompactSizes) -> str:
    """What was packed, and what came of it.

    Example:
        >>> size_line(CompactSizes(dense=1_000_000, compact=200_000, packed=1, tensors=2))
        '1 of 2 tensors are packed: 200.0 kB instead of 1.0 MB, 20.00 %'
    """
    share = 100 * sizes.compact / sizes.dense if sizes.dense else 100
    return (
        f"{sizes.packed:,} of {sizes.tensors:,} tensors are packed: {file_size(sizes.compact)} instead of "
        f"{file_size(sizes.dense)}, {share:.2f} %"
    )


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(error) from error
