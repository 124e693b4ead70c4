"""From results to a table: mean and spread over seeds, with what each method costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft_pst.cli.glue import GLUE_TASKS

from .methods import METHODS
from .runs import Run, read_result, write_json
from .search import say_rates
from .settings import Rates, Settings


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity on one task, over its seeds.

    Attributes:
        task: name of the task.
        row: name of the row.
        title: what the row is called.
        prunes: whether the method has a sparsity.
        sparsity: target, in [0, 1).
        rates: learning rates, beside the head's.
        score_name: such as accuracy.
        scores: by seed; NaN where a score is not defined, as a correlation is not with answers that are all alike.
        trained_parameters: numbers that the optimizer moves.
        peak_memory_bytes: the largest of the seeds'.
        seconds: of training, the median of the seeds': of one processor on a CPU, of the clock on a GPU.
        zeros_fraction: exact zeros of the finished model's adapted matrices over their entries.
        missing: seeds without a result.
        facts: what the method reports of itself, the mean of the seeds'.
    """

    task: str
    row: str
    title: str
    prunes: bool
    sparsity: float
    rates: Rates
    score_name: str
    scores: dict[int, float]
    trained_parameters: int
    peak_memory_bytes: int
    seconds: float
    zeros_fraction: float
    missing: list[int] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of the scores."""
        return statistics.fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores (of a sample), None for a single one."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None

    @property
    def factor(self) -> float:
        """What the score is shown times: GLUE's are shown in percent."""
        return 100.0 if self.task in GLUE_TASKS else 1.0


def make_cells(settings: Settings, planned: Iterable[tuple[str, Run]], folder: Path) -> list[Cell]:
    """The cells of which at least one seed is finished.

    Args:
        settings: of the experiment.
        planned: (row, run) of the whole table.
        folder: where results lie.
    """
    together: dict[tuple[str, str, float], list[Run]] = {}
    for row, run in planned:
        together.setdefault((run.task, row, run.sparsity), []).append(run)
    cells = [_cell(settings, row, runs, folder) for (_, row, _), runs in together.items()]
    return [cell for cell in cells if cell is not None]


def _cell(settings: Settings, row: str, runs: Sequence[Run], folder: Path) -> Cell | None:
    found = {run.seed: result for run in runs if (result := read_result(folder, run)) is not None}
    if not found:
        return None
    results, first = list(found.values()), runs[0]
    method = METHODS[settings.rows[row].method]
    clock = "cpu_seconds" if first.device == "cpu" else "wall_seconds"
    return Cell(
        task=first.task,
        row=row,
        title=method.title if row == settings.rows[row].method else row,
        prunes=method.prunes,
        sparsity=first.sparsity,
        rates=first.rates,
        score_name=results[0]["main_score"],
        scores={seed: _number(result["scores"][result["main_score"]]) for seed, result in found.items()},
        trained_parameters=results[0]["trained_parameters"],
        peak_memory_bytes=max(result["peak_memory_bytes"] for result in results),
        seconds=statistics.median(result[clock] for result in results),
        zeros_fraction=results[0]["zeros"] / results[0]["weights"],
        missing=[run.seed for run in runs if run.seed not in found],
        facts={name: statistics.fmean(_number(r["facts"][name]) for r in results) for name in results[0]["facts"]},
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def save_table(settings: Settings, cells: Sequence[Cell], folder: Path) -> str:
    """Write `table.json` and `table.md`; returns the latter."""
    rows = [{**asdict(cell), "mean": cell.mean, "spread": cell.spread} for cell in cells]
    write_json(folder / "table.json", {"settings": settings.name, "model": settings.model, "rows": rows})
    text = to_markdown(settings, cells)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def to_markdown(settings: Settings, cells: Sequence[Cell]) -> str:
    """For each task a table of scores over sparsity, and one of costs."""
    lines = [f"# {settings.name}", "", f"Model: {settings.model}."]
    for task in dict.fromkeys(cell.task for cell in cells):
        chosen = [cell for cell in cells if cell.task == task]
        lines += ["", f"## {task}", "", *_score_lines(chosen), "", *_cost_lines(chosen)]
    return "\n".join(lines) + "\n"


def _score_lines(cells: Sequence[Cell]) -> list[str]:
    sparsities = sorted({cell.sparsity for cell in cells})
    header = ["method", "trained", *(f"{100 * sparsity:g} % zeros" for sparsity in sparsities)]
    unit = ", percent" if cells[0].factor == 100 else ""
    lines = [
        f"{cells[0].score_name.capitalize().replace('_', ' ')}{unit}: mean ± standard deviation over seeds (number of "
        "seeds).",
        "",
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
    ]
    for row in dict.fromkeys(cell.row for cell in cells):
        own = {cell.sparsity: cell for cell in cells if cell.row == row}
        first = next(iter(own.values()))
        scores = [say_score(own[sparsity]) if sparsity in own else "" for sparsity in sparsities]
        lines.append(f"| {first.title} | {first.trained_parameters / 1e6:.2f} M | {' | '.join(scores)} |")
    return lines


def say_score(cell: Cell) -> str:
    """Mean, spread and number of seeds."""
    spread = "" if cell.spread is None or math.isnan(cell.mean) else f" ± {cell.factor * cell.spread:.2f}"
    return f"{_say(cell.factor * cell.mean)}{spread} ({len(cell.scores)})"


def _say(score: float) -> str:
    return "undefined" if math.isnan(score) else f"{score:.2f}"


def _cost_lines(cells: Sequence[Cell]) -> list[str]:
    header = ("method", "target", "exact zeros", "learning rates", "by seed", "peak MiB", "seconds", "missing", "also")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for cell in cells:
        columns = [
            cell.title,
            f"{100 * cell.sparsity:g} %",
            f"{100 * cell.zeros_fraction:.4f} %",
            say_rates(cell.rates),
            ", ".join(_say(cell.factor * score) for _, score in sorted(cell.scores.items())),
            f"{cell.peak_memory_bytes / 2**20:.0f}",
            f"{cell.seconds:.0f}",
            ", ".join(f"seed {seed}" for seed in cell.missing),
            ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in cell.facts.items()),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return lines
