"""What is learned and how it is scored, one kind of task a file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..runs import Run
from . import classification, generation, language
from .protocol import LoadedTask, digest

_KINDS: dict[str, ModuleType] = {task: kind for kind in (classification, generation, language) for task in kind.TASKS}


def task_files(task: str, data: Path, *, with_validation: bool) -> list[Path]:
    """The local files that a run of a task reads: what it trains on, and what it is scored on if that is wanted.

    Raises:
        FileNotFoundError: if there are none under `data`.
        ValueError: for a task that is not known.
    """
    return _kind(task).task_files(task, data, with_validation=with_validation)


def data_digest(task: str, data: Path | None, *, with_validation: bool) -> str:
    """What identifies the data of a task in a run's key; empty where they come from the hub.

    Raises:
        FileNotFoundError: if there are none under `data`.
        ValueError: for a task that is not known.
    """
    _kind(task)
    return "" if data is None else digest(task_files(task, data, with_validation=with_validation))


def load_task(run: Run, data: Path | None) -> LoadedTask:
    """Read the data of a run and load its model.

    Args:
        run: names task and model.
        data: folder of local files, or None for the hub.
    """
    return _kind(run.task).load(run, data)


def _kind(task: str) -> ModuleType:
    if task not in _KINDS:
        raise ValueError(f"task {task!r} is none of {', '.join(_KINDS)}.")
    return _KINDS[task]


__all__ = ["LoadedTask", "data_digest", "load_task", "task_files"]
