"""What is learned and how it is scored, one kind of task a file."""

from __future__ import annotations

from pathlib import Path

from peft_pst.cli.glue import GLUE_TASKS

from ..runs import Run
from . import classification
from .protocol import LoadedTask, digest


def task_files(task: str, data: Path, *, with_validation: bool) -> list[Path]:
    """The local files that a run of a task reads.

    Raises:
        FileNotFoundError: if there are none under `data`.
        ValueError: for a task that is not known.
    """
    _check_known(task)
    return classification.task_files(task, data, with_validation=with_validation)


def data_digest(task: str, data: Path | None, *, with_validation: bool) -> str:
    """What identifies the data of a task in a run's key; empty where they come from the hub."""
    return "" if data is None else digest(task_files(task, data, with_validation=with_validation))


def load_task(run: Run, data: Path | None) -> LoadedTask:
    """Read the data of a run and load its model.

    Args:
        run: names task and model.
        data: folder of local files, or None for the hub.
    """
    _check_known(run.task)
    return classification.load(run, data)


def _check_known(task: str) -> None:
    if task not in GLUE_TASKS:
        raise ValueError(f"task {task!r} is none of {', '.join(GLUE_TASKS)}.")


__all__ = ["LoadedTask", "data_digest", "load_task", "task_files"]
