"""The committed results: files under their keys, the table made of nothing else, and what is quoted of it."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results.__main__ import RUNS
from benchmarks.results.runs import Run
from benchmarks.results.settings import Settings, read_settings
from benchmarks.results.table import Cell, to_markdown

SETTINGS = Path(__file__).parents[1] / "benchmarks" / "results" / "settings"
FOLDERS = sorted(path for path in RUNS.iterdir() if path.is_dir())
TABLES = [folder for folder in FOLDERS if (folder / "table.json").is_file()]


def results(folder: Path) -> list[tuple[Run, dict[str, Any]]]:
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*_seed*.json"))]
    return [(Run.from_dict(content["run"]), content) for content in contents]


def number(score: float | None) -> float:
    return math.nan if score is None else score


def is_of_cell(run: Run, cell: Cell, settings: Settings) -> bool:
    row = settings.rows[cell.row]
    return (
        run.split == "validation"
        and (run.task, run.method, run.sparsity, run.rates) == (cell.task, row.method, cell.sparsity, cell.rates)
        and run.options == row.options
        and run.training == settings.tasks[cell.task]
        and (run.teacher is None) == (row.teacher is None)
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_result_lies_under_its_key(folder: Path) -> None:
    found = results(folder)
    assert found
    for run, content in found:
        assert run.key == content["key"]
        assert (folder / run.file_name).is_file()


@pytest.mark.parametrize("folder", TABLES, ids=lambda path: path.name)
def test_a_table_shows_the_runs_and_nothing_else(folder: Path) -> None:
    settings = read_settings(SETTINGS / f"{folder.name}.yaml")
    found = results(folder)
    rows = json.loads((folder / "table.json").read_text(encoding="utf-8"))["rows"]
    cells = []
    for row in rows:
        mean, scores = row.pop("mean"), {int(seed): number(score) for seed, score in row.pop("scores").items()}
        del row["spread"]
        cell = Cell(**row, scores=scores)
        runs = {run.seed: content["result"] for run, content in found if is_of_cell(run, cell, settings)}
        expected = {seed: number(result["scores"][cell.score_name]) for seed, result in runs.items()}
        expected = {seed: score for seed, score in expected.items() if seed in settings.seeds}
        assert scores == pytest.approx(expected, rel=0, nan_ok=True)  # the correlation of a constant is not defined
        assert number(mean) == pytest.approx(statistics.fmean(scores.values()), nan_ok=True)
        cells.append(cell)
    assert (folder / "table.md").read_text(encoding="utf-8") == to_markdown(settings, cells)


def test_the_readme_quotes_the_table() -> None:
    lines = (RUNS.parent / "README.md").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in lines if re.search(r"\(\d\) \|", line)]
    table = (RUNS / "minilm-sst2" / "table.md").read_text(encoding="utf-8").splitlines()
    assert quoted
    assert set(quoted) <= set(table)
