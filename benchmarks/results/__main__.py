"""`python -m benchmarks.results`: run, search and table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from peft_pst.cli.console import plain_warnings
from peft_pst.cli.errors import UserError

from .launch import launch
from .pictures import plot_over_parameters, plot_over_sparsity
from .runs import Machine, Run, cells, make_run
from .search import MARKDOWN_NAME, answer, questions, rates_for, save_answers
from .settings import Settings, read_settings, with_max_steps
from .table import make_cells, save_table
from .tasks import data_digest

RUNS = Path(__file__).parent / "runs"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 when a run crashed; 2 for a mistake in the input, before anything is run."""
    options = _parser().parse_args(arguments)
    try:
        settings = with_max_steps(read_settings(options.settings), options.max_steps)
        with plain_warnings():
            return options.command(settings, options)
    except (FileNotFoundError, UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, help_ in (
        ("search", search, "find each method's learning rates on held-out training data"),
        ("run", run, "run every method, sparsity and seed"),
        ("table", table, "make the table and the pictures from what has been run"),
    ):
        sub = commands.add_parser(name, help=help_)
        sub.set_defaults(command=command)
        _add_options(sub)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, help="a YAML file of benchmarks/results/settings")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these rows alone")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks alone")
    parser.add_argument("--sparsities", nargs="+", type=float, metavar="S", help="these sparsities alone")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of those of the settings")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, help="folder of local data files (default ../shared/data, or the hub)")
    parser.add_argument("--max-steps", type=int, help="a trial of so many steps, kept apart from the real results")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of results (default %(default)s)")


def _folder(settings: Settings, options: argparse.Namespace) -> Path:
    return options.output / settings.name


def _data(settings: Settings, options: argparse.Namespace) -> Path | None:
    if options.data is not None:
        return options.data
    return Path("../shared/data") if settings.local_data else None


def _machine(settings: Settings, options: argparse.Namespace, *, with_validation: bool) -> Machine:
    data = _data(settings, options)
    tasks = _chosen(list(settings.tasks), options.tasks, "--tasks")
    digests = {task: data_digest(task, data, with_validation=with_validation) for task in tasks}
    return Machine(digests, options.threads, options.device)


def _chosen(known: Sequence[str], wanted: Sequence[str] | None, option: str) -> list[str]:
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"{option} {name} is none of {', '.join(known)}.")
    return [name for name in known if wanted is None or name in wanted]


def _rows(settings: Settings, options: argparse.Namespace) -> list[str]:
    return _chosen(list(settings.rows), options.only, "--only")


def planned_runs(
    settings: Settings, options: argparse.Namespace, *, skip_unsearched: bool = False
) -> list[tuple[str, Run]]:
    """(row, run) of all that the table needs, at the learning rates of the settings or of the search.

    Args:
        settings: of the experiment.
        options: of the command line.
        skip_unsearched: leave out what has no learning rates yet, with a note, instead of refusing.

    Raises:
        ValueError: where the settings fix no learning rates, and no search has found any.
    """
    machine = _machine(settings, options, with_validation=True)
    searched_on = _machine(settings, options, with_validation=False)
    folder, seeds = _folder(settings, options), options.seeds or settings.seeds
    planned = []
    for task, row, sparsity in cells(settings, machine.digests, _rows(settings, options), options.sparsities):
        teacher = settings.rows[row].teacher
        rates = rates_for(settings, searched_on, task, row, sparsity, folder)
        teacher_rates = rates_for(settings, searched_on, task, teacher, 0.0, folder) if teacher else None
        if rates is None or (teacher and teacher_rates is None):
            whose = "" if rates is None else f" for its teacher {teacher}"
            problem = f"{row} on {task} at {sparsity:g} has no learning rates{whose}: the settings fix none"
            if not skip_unsearched:
                raise ValueError(f"{problem}, and no search with these settings found any; run `search` first.")
            print(f"left out: {problem}, and it is not searched yet", file=sys.stderr)
            continue
        for seed in seeds:
            planned.append((row, make_run(settings, machine, task, row, sparsity, seed, rates, teacher_rates)))
    return planned


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run what the table lacks."""
    runs = [run for _, run in planned_runs(settings, options)]
    return 1 if launch(runs, _folder(settings, options), _data(settings, options), options.jobs) else 0


def search(settings: Settings, options: argparse.Namespace) -> int:
    """Run the candidates that have not been run, and report the best of each method and group of sparsities."""
    machine = _machine(settings, options, with_validation=False)
    asked = questions(settings, machine, machine.digests, _rows(settings, options), options.sparsities)
    folder = _folder(settings, options)
    failed = launch([run for each in asked for run in each.runs], folder, _data(settings, options), options.jobs)
    save_answers([answer(each, folder) for each in asked], folder)
    print(f"{len(asked)} searches are reported in {folder / MARKDOWN_NAME}")
    return 1 if failed else 0


def table(settings: Settings, options: argparse.Namespace) -> int:
    """Write the table and the pictures, and print the former."""
    folder = _folder(settings, options)
    found = make_cells(settings, planned_runs(settings, options, skip_unsearched=True), folder)
    if not found:
        raise ValueError(f"{folder} holds no results of these settings; run them first.")
    print(save_table(settings, found, folder))
    for task in dict.fromkeys(cell.task for cell in found):
        of_task = [cell for cell in found if cell.task == task]
        plot_over_sparsity(of_task, folder / f"{task}-over-sparsity.png")
        plot_over_parameters(of_task, folder / f"{task}-over-parameters.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
