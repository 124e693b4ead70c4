"""One run: everything that determines its result, and the file that its result lies in."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .methods import METHODS
from .settings import RATES, Rates, Settings, Training

Split = Literal["validation", "held_out"]


@dataclass(frozen=True)
class Teacher:
    """A dense model that a run also learns from.

    Attributes:
        run: that the model comes from.
        weight: the teacher's part of the loss, in [0, 1].
        temperature: of the distance to its predictions.
    """

    run: Run
    weight: float
    temperature: float


@dataclass(frozen=True)
class Run:
    """What determines a result.

    Attributes:
        model: as in the settings.
        task: name of the task.
        data: digest of the files that the task is read from; empty for the hub.
        method: a key of `METHODS`.
        options: of the method, as the settings give them.
        resolved: what the method makes of them, defaults included, so that a changed default is another run.
        sparsity: target, in [0, 1); 0 for a method that does not prune.
        seed: of head, adapter, dropout and the order of the batches.
        rates: learning rates by name, beside the head's.
        training: what all methods have in common.
        split: what is scored; "held_out" is a part of the training data.
        held_out: number of training examples that are left out of training for it.
        threads: of the process; sums differ in their last digits with them.
        device: "cpu" or "cuda".
        teacher: a dense model to learn from beside the labels.
    """

    model: str
    task: str
    data: str
    method: str
    options: dict[str, Any]
    resolved: dict[str, Any]
    sparsity: float
    seed: int
    rates: Rates
    training: Training
    split: Split = "validation"
    held_out: int = 0
    threads: int = 1
    device: str = "cpu"
    teacher: Teacher | None = None

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that change with any field; without a teacher, those of before there were any."""
        values = {**asdict(self), "training": self.training.given()}
        del values["teacher"]
        if self.teacher is not None:
            values["teacher"] = {**asdict(self.teacher), "run": self.teacher.run.key}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def file_name(self) -> str:
        """The key, after what a reader wants to see of it."""
        rates = "-".join(f"{name}{self.rates[name]:g}" for name in RATES if name in self.rates)
        method = self.method if self.teacher is None else f"{self.method}-taught"
        parts = [self.task, method, f"s{self.sparsity:g}", f"seed{self.seed}", rates, self.split, self.key]
        return "_".join(parts) + ".json"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_dict` makes an equal run."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The run that `to_dict` wrote."""
        teacher = values.get("teacher")  # files from before there were teachers have none
        if teacher is not None:
            teacher = Teacher(**{**teacher, "run": cls.from_dict(teacher["run"])})
        return cls(**{**values, "training": Training(**values["training"]), "teacher": teacher})


@dataclass(frozen=True)
class Machine:
    """What a result depends on beyond the settings.

    Attributes:
        digests: of the files of each task, by name; "" for the hub.
        threads: a process.
        device: "cpu" or "cuda".
    """

    digests: dict[str, str]
    threads: int = 1
    device: str = "cpu"


def make_run(
    settings: Settings,
    machine: Machine,
    task: str,
    row: str,
    sparsity: float,
    seed: int,
    rates: Rates,
    teacher_rates: Rates | None = None,
) -> Run:
    """One cell of the table for one seed; `teacher_rates` are those of the row's teacher, if it has one."""
    wanted = settings.rows[row]
    method, options, teacher = wanted.method, wanted.options, None
    if wanted.teacher is not None:
        assert teacher_rates is not None  # or the teacher could not be trained
        dense = make_run(settings, machine, task, wanted.teacher, 0.0, seed, teacher_rates)
        teacher = Teacher(dense, wanted.teacher_weight, wanted.temperature)
    return Run(
        model=settings.model,
        task=task,
        data=machine.digests[task],
        method=method,
        options=options,
        resolved=METHODS[method].resolve(options),
        sparsity=sparsity,
        seed=seed,
        rates=rates,
        training=settings.tasks[task],
        threads=machine.threads,
        device=machine.device,
        teacher=teacher,
    )


def cells(
    settings: Settings, tasks: Iterable[str], rows: Iterable[str], sparsities: Iterable[float] | None = None
) -> Iterator[tuple[str, str, float]]:
    """(task, row, sparsity) of the table; `sparsities` leaves out others, except the 0 of what does not prune."""
    wanted = None if sparsities is None else set(sparsities)
    for task in tasks:
        for row in rows:
            for sparsity in settings.sparsities_of(row):
                if wanted is None or sparsity in wanted or not METHODS[settings.rows[row].method].prunes:
                    yield task, row, sparsity


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all; numbers that are not finite become null, for which JSON has no other word."""
    text = json.dumps(_finite_or_none(content), indent=2, allow_nan=False)
    write_whole(path, lambda beside: beside.write_text(text + "\n", encoding="utf-8"))


def _finite_or_none(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite_or_none(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite_or_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside and rename, so that an interrupted write leaves no half file under the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_result(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of a finished run, or None; None too in the place of a score that is not defined."""
    path = folder / run.file_name
    if not path.is_file():
        return None
    # Of files that Python wrote with NaN in them, too.
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)["result"]
