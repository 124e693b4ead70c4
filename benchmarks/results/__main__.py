"""`python -m benchmarks.results`: run, search and table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from peft_pst.cli.console import plain_warnings

from .launch import launch
from .runs import Machine, Run, cells, make_run
from .settings import Settings, read_settings, with_max_steps
from .tasks import data_digest

RUNS = Path(__file__).parent / "runs"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 when a run crashed."""
    options = _parser().parse_args(arguments)
    settings = with_max_steps(read_settings(options.settings), options.max_steps)
    try:
        with plain_warnings():
            return options.command(settings, options)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, help_ in (("run", run, "every method, sparsity and seed of a settings file"),):
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


def planned_runs(settings: Settings, options: argparse.Namespace) -> list[Run]:
    """The runs that the table needs, at the learning rates of the settings or of the search."""
    machine = _machine(settings, options, with_validation=True)
    rows = _chosen(list(settings.rows), options.only, "--only")
    runs = []
    for task, row, sparsity in cells(settings, machine.digests, rows, options.sparsities):
        rates = settings.rows[row].rates
        assert rates is not None
        seeds = options.seeds or settings.seeds
        runs += [make_run(settings, machine, task, row, sparsity, seed, rates) for seed in seeds]
    return runs


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run what the table lacks."""
    failed = launch(planned_runs(settings, options), _folder(settings, options), _data(settings, options), options.jobs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
