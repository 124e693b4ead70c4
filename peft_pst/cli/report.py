"""`peft-pst report`: count the zeros of an adapter or a checkpoint, print them, and write report.json and pictures."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..comparison import SparsityComparison, compare_sparsity
from ..model import pst_layers
from ..plots import plot_kept_weights, plot_layer_sparsity, plot_training
from ..report import LayerSparsity, SparsityReport, checkpoint_weight, report_checkpoint, report_model
from .errors import UserError, require
from .loading import is_adapter, load_adapted_model
from .parser import OneLineParser
from .replace import check_writable

DESCRIPTION = """\
Count the zeros in the tensors of a PST adapter (on its base model) or of a safetensors checkpoint, layer by layer,
against the target. Prints a table; writes report.json and pictures: the sparsity of every layer, the kept weights of
one layer, and, where there is a trainer_state.json, the training run."""

REPORT_FOLDER = "report"
COMPARISON_NAME = "comparison.json"

# What stands in for the table's signs on terminals without Unicode.
_PLAIN = str.maketrans({"━": "#", "╸": "#", "─": "-", "✓": "ok", "✗": "!!", "…": "~"})


def run(arguments: Sequence[str]) -> int:
    """Report on an adapter or a checkpoint; raises `UserError` before anything is written.

    Returns:
        1 where zeros of what `--against` names were lost, else 0.
    """
    options = _parser().parse(arguments)
    require("matplotlib", "cli")
    path = Path(options.path)
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist; pass the folder of an adapter or of a checkpoint.")
    output = Path(options.output or (path.parent if path.is_file() else path) / REPORT_FOLDER)
    check_writable(output, "output")
    history = _log_history(path)
    report, read_mask, counted = _read(path, options.base_model)
    pictured = _find_layer(report, options.layer)
    comparison = None if options.against is None else _compare(counted, options.against, report.source)
    if options.json:
        against = {} if comparison is None else {"against": comparison.to_dict()}
        print_text(json.dumps({**report.to_dict(), **against}, indent=2))
    else:
        tables = [report.to_table(options.all or None), *([comparison.to_table(options.all)] if comparison else [])]
        print_text("\n\n".join(tables))
    try:
        written = write_report(output, report, read_mask(pictured), pictured.name, history)
        if comparison is not None:
            comparison.save(output / COMPARISON_NAME)
            written.append(output / COMPARISON_NAME)
    except OSError as error:
        raise UserError(f"cannot write to {str(output)!r}: {error.strerror}; name a folder with --output.") from error
    print(f"\nWritten to {output}: {', '.join(file.name for file in written)}", file=sys.stderr)
    return int(comparison is not None and comparison.lost > 0)


def _compare(counted: PeftModel | Path, reference: str, source: str) -> SparsityComparison:
    if not Path(reference).exists():
        raise UserError(f"--against {reference}: there is no such file or folder.")
    try:
        return replace(compare_sparsity(counted, reference, progressbar=True), source=source)
    except (OSError, ValueError) as error:
        raise UserError(f"--against {reference}: {error}") from error


def report_adapter(
    adapter: str | Path, base_model: str | None = None, *, progressbar: bool = False
) -> tuple[SparsityReport, PeftModel]:
    """Count the zeros that a saved adapter puts into its base model.

    Args:
        adapter: the adapter's folder.
        base_model: folder or hub name of the base; by default what the adapter's configuration names.
        progressbar: whether to show progress on a terminal.

    Returns:
        The report, with the sizes of the adapter's files, and the model it was counted in.

    Raises:
        UserError: as `load_adapted_model`.
    """
    model = load_adapted_model(adapter, base_model)
    files = [Path(adapter) / name for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)]
    report = replace(
        report_model(model, progressbar=progressbar),
        source=str(adapter),
        files={file.name: file.stat().st_size for file in files},
    )
    return report, model


def print_text(text: str) -> None:
    """Print, with plain signs where the terminal's encoding has no others."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    print(text)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="peft-pst report", description=DESCRIPTION)
    parser.add_argument("path", metavar="PATH", help="folder of an adapter or of a checkpoint, or one safetensors file")
    parser.add_argument(
        "--base_model", "--base-model", metavar="BASE", help="base model of the adapter, folder or name"
    )
    parser.add_argument(
        "--output", metavar="DIR", help=f"where to write (default: the folder `{REPORT_FOLDER}` inside PATH)"
    )
    parser.add_argument(
        "--against",
        metavar="MASKS",
        help="a checkpoint, or a safetensors file of masks: say which of its zeros are there no longer, and end with "
        "status 1 if any",
    )
    parser.add_argument("--layer", metavar="NAME", help="layer whose kept weights are drawn (default: the first)")
    parser.add_argument("--all", action="store_true", help="one line for every layer, not for every kind of layer")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    return parser


def _read(
    path: Path, base_model: str | None
) -> tuple[SparsityReport, Callable[[LayerSparsity], Tensor], PeftModel | Path]:
    """The report, the way to one layer's mask, and what was counted."""
    if is_adapter(path):
        report, model = report_adapter(path, base_model, progressbar=True)
        layers = {layer.module_name: layer for layer in pst_layers(model)}
        return report, lambda row: layers[row.name].get_mask("default"), model
    if base_model is not None:
        raise UserError(f"--base_model {base_model!r} is for adapters, but {str(path)!r} has no {CONFIG_NAME}.")
    try:
        report = report_checkpoint(path, progressbar=True)
    except (OSError, ValueError) as error:
        raise UserError(error) from error
    if not report.layers:
        raise UserError(f"{str(path)!r} holds no floating-point matrices, so there is nothing to count.")
    return report, lambda row: checkpoint_weight(path, row) != 0, path


def _find_layer(report: SparsityReport, name: str | None) -> LayerSparsity:
    """The layer of this name, or the one whose name ends in it."""
    if name is None:
        return report.layers[0]
    rows = [*report.layers, *report.others]
    exact = [row for row in rows if row.name == name]
    found = exact or [row for row in rows if row.name.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    close = [row.name for row in found] or difflib.get_close_matches(name, [row.name for row in rows], cutoff=0.3)
    problem = f"means {len(found)} layers" if found else "is not a layer of the model"
    raise UserError(f"--layer {name!r} {problem}; try {' or '.join(close[:3]) or rows[0].name}.")


def _log_history(path: Path) -> list[dict[str, Any]]:
    """The Trainer's log in or under a folder, the longest if there are several (one in each training checkpoint)."""
    histories: list[list[dict[str, Any]]] = []
    for file in sorted(path.glob("trainer_state.json")) + sorted(path.glob("*/trainer_state.json")):
        try:
            histories.append(json.loads(file.read_text(encoding="utf-8"))["log_history"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(file)!r} is damaged ({error!r}); remove it to report without the training."
            ) from error
    return max(histories, key=len, default=[])


def write_report(
    output: Path, report: SparsityReport, mask: Tensor, layer_name: str, history: list[dict[str, Any]]
) -> list[Path]:
    """Write report.json and the pictures into a folder; returns the files.

    Args:
        output: the folder, made if need be.
        report: what was counted.
        mask: the mask to draw, (out, in), True = keep.
        layer_name: the layer that it belongs to.
        history: the Trainer's log; without one there is no picture of the training.
    """
    output.mkdir(parents=True, exist_ok=True)
    report.save(output / "report.json")
    written = [
        output / "report.json",
        plot_layer_sparsity(report, output / "layer_sparsity.png"),
        plot_kept_weights(mask, output / "kept_weights.png", title=layer_name),
    ]
    return [*written, plot_training(history, output / "training.png")] if history else written
