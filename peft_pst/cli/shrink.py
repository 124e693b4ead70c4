"""`peft-pst shrink`: from a pruned checkpoint to a smaller one that answers alike, for stock transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..answers import check_same_answers, made_up_inputs
from ..architecture import find_heads, find_neurons
from ..checkpoint import checkpoint_files
from ..folders import replaced_folder
from ..report import REPORT_NAME
from ..shrinking import ShrinkReport, shrink
from .console import plain_warnings, quiet_transformers, say
from .errors import UserError, said_in_one_line
from .parser import OneLineParser
from .replace import check_checkpoint_folder
from .report import print_text

SHRINK_REPORT_NAME = "shrink_report.json"

_DESCRIPTION = """\
Remove the attention heads and feed-forward neurons that do nothing from a pruned checkpoint, as `peft-pst merge` writes
it, and write a smaller one that gives the same answers. It loads with stock from_pretrained(), without this package.
The answers are compared before anything is kept."""

# What the new checkpoint has of its own; the other files, such as a tokenizer's, are taken over.
_OWN_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, REPORT_NAME, SHRINK_REPORT_NAME)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def run(argv: list[str]) -> None:
    """Shrink as the command line says; see `peft-pst shrink --help`.

    Raises:
        UserError: for a mistake in the input, or where nothing can be removed; an existing output stays whole.
    """
    options = _parser().parse(argv)
    source, output = Path(options.checkpoint), Path(options.output).resolve()
    if not (source / CONFIG_NAME).is_file():
        raise UserError(f"{str(source)!r} is not the folder of a checkpoint: it has no {CONFIG_NAME}.")
    check_checkpoint_folder(output, options.overwrite, sources=[source])
    try:
        with plain_warnings(), quiet_transformers(bars=False), replaced_folder(output) as folder:
            report = _write_shrunk(source, folder, options.only)
            before, after = (_weight_bytes(each) for each in (source, folder))
            values = {"source": options.checkpoint, **report.to_dict(), "bytes_before": before, "bytes_after": after}
            (folder / SHRINK_REPORT_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.output} could not be written: {error}") from error
    print_text(report.to_table())
    say(
        f"weights on disk: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({100 * after / before:.1f} %)",
        "",
        f"The checkpoint is in {options.output}; it loads with from_pretrained() of stock transformers.",
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="peft-pst shrink", description=_DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the pruned checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write the smaller one to")
    parser.add_argument(
        "--only", choices=("heads", "neurons"), help="remove these alone, and leave the others as zeros"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUTPUT holds")
    return parser


def _write_shrunk(source: Path, folder: Path, only: str | None) -> ShrinkReport:
    """Shrink into `folder`, and see that what was written answers alike."""
    model = _load(source)
    try:
        found = {"heads": find_heads, "neurons": find_neurons}[only](model) if only else None
        small, report = shrink(model, found)
        small.save_pretrained(folder)
        check_same_answers(model, type(model).from_pretrained(folder, dtype="auto"), made_up_inputs(model))
    except (ValueError, RuntimeError) as error:
        raise UserError(error) from error
    for file in source.iterdir():
        if file.is_file() and file.name not in _OWN_FILES and not file.name.endswith(_WEIGHTS):
            shutil.copy2(file, folder / file.name)
    return report


def _load(source: Path) -> PreTrainedModel:
    with said_in_one_line(f"{str(source)!r} could not be loaded"):
        config = AutoConfig.from_pretrained(source)
        if not config.architectures:
            raise UserError(f"{str(source / CONFIG_NAME)!r} does not say the model's class under `architectures`.")
        return getattr(transformers, config.architectures[0]).from_pretrained(source, dtype="auto")


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint_files(folder))
