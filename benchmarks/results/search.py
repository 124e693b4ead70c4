"""Learning rates: the same number of candidates for every method, scored on training data that is held out.

Each method is searched once for each group of sparsities, at the group's last one, with one seed that the table does
not use. A tie goes to the candidate that the settings name first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .runs import Machine, Run, cells, make_run, read_result, write_json
from .settings import Rates, Settings

REPORT_NAME = "search.json"
MARKDOWN_NAME = "search.md"


@dataclass(frozen=True)
class Question:
    """Which of a row's candidates is best for a group of sparsities on one task.

    Attributes:
        task: name of the task.
        row: name of the row.
        sparsities: that take over the answer.
        runs: one a candidate, in the order of the settings.
    """

    task: str
    row: str
    sparsities: tuple[float, ...]
    runs: tuple[Run, ...]

    @property
    def keys(self) -> list[str]:
        """What identifies the runs, whatever device they are made on."""
        return [replace(run, device="", threads=0).key for run in self.runs]


def questions(
    settings: Settings,
    machine: Machine,
    tasks: Iterable[str],
    rows: Iterable[str],
    sparsities: Iterable[float] | None = None,
) -> list[Question]:
    """What is to be searched: all rows but those whose learning rates the settings fix, or take from another row.

    Args:
        settings: of the experiment.
        machine: what the runs are made on.
        tasks: names of tasks.
        rows: names of rows.
        sparsities: whose groups are searched; all when left open.

    Raises:
        ValueError: if a row has more or fewer candidates than the others.
    """
    asked = []
    searched = [row for row in rows if settings.rows[row].rates is None and settings.rows[row].rates_of is None]
    for row in searched:
        found = len(settings.rows[row].candidates)
        if found != settings.search.budget:
            raise ValueError(
                f"{row} has {found} candidates, but the budget of every method is {settings.search.budget}; name as "
                "many, or fix its rates."
            )
    for task, row, sparsity in cells(settings, tasks, searched, sparsities):
        asked.append(question(settings, machine, task, row, group_of(settings, row, sparsity)))
    return list({(each.task, each.row, each.sparsities): each for each in asked}.values())


def group_of(settings: Settings, row: str, sparsity: float) -> tuple[float, ...]:
    """The sparsities of a row that share one answer with this one."""
    return tuple(s for s in settings.search.group_of(sparsity) if s in settings.sparsities_of(row))


def question(settings: Settings, machine: Machine, task: str, row: str, group: tuple[float, ...]) -> Question:
    """The runs that answer for one group: trained and scored on parts of the training data."""
    search = settings.search
    held_out = search.held_out_of.get(task, search.held_out)

    def candidate(rates: Rates) -> Run:
        run = make_run(settings, machine, task, row, group[-1], search.seed, rates)
        training = run.training if search.steps is None else replace(run.training, steps=search.steps, epochs=None)
        return replace(run, split="held_out", held_out=held_out, training=training)

    return Question(task, row, group, tuple(candidate(rates) for rates in settings.rows[row].candidates))


def answer(asked: Question, folder: Path) -> dict[str, Any]:
    """The best candidate with all scores, as JSON values; a run without a result counts as failed."""
    results = [read_result(folder, run) for run in asked.runs]
    scores = [None if result is None else result["scores"][result["main_score"]] for result in results]
    finished = [(score, index) for index, score in enumerate(scores) if score is not None]
    rates = None
    if finished:
        sign = 1 if next(result for result in results if result is not None)["highest_is_best"] else -1
        best = max(finished, key=lambda pair: (sign * pair[0], -pair[1]))[1]
        rates = asked.runs[best].rates
    return {
        "task": asked.task,
        "row": asked.row,
        "sparsities": list(asked.sparsities),
        "searched_at": asked.sparsities[-1],
        "rates": rates,
        "candidates": [{"rates": run.rates, "score": score} for run, score in zip(asked.runs, scores, strict=True)],
        "keys": asked.keys,
    }


def save_answers(answers: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the report as JSON and Markdown; answers to other questions that are there already stay."""
    known = {_place(item): item for item in read_answers(folder)}
    known.update({_place(item): item for item in answers})
    ordered = list(known.values())
    write_json(folder / REPORT_NAME, {"answers": ordered})
    (folder / MARKDOWN_NAME).write_text(to_markdown(ordered), encoding="utf-8")


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """What earlier searches found; nothing where there was none."""
    path = folder / REPORT_NAME
    return json.loads(path.read_text(encoding="utf-8"))["answers"] if path.is_file() else []


def rates_for(settings: Settings, machine: Machine, task: str, row: str, sparsity: float, folder: Path) -> Rates | None:
    """Learning rates of one cell: those that the settings fix, else those that the search found for it or its model.

    None where neither is there, or the settings have changed since the search.
    """
    row = settings.rows[row].rates_of or row
    fixed = settings.rows[row].rates
    if fixed is not None:
        return fixed
    asked = question(settings, machine, task, row, group_of(settings, row, sparsity))
    for item in read_answers(folder):
        if item["keys"] == asked.keys and item["rates"] is not None:
            return item["rates"]
    return None


def to_markdown(answers: Sequence[dict[str, Any]]) -> str:
    """Every candidate with its score, the chosen one in bold."""
    lines = ["# Learning rates searched on held-out training data", ""]
    for task in dict.fromkeys(item["task"] for item in answers):
        lines += [f"## {task}", "", "| method | for sparsity | searched at | candidates: score |", "|---|---|---|---|"]
        for item in (item for item in answers if item["task"] == task):
            cells = [_candidate(entry, item["rates"]) for entry in item["candidates"]]
            sparsities = ", ".join(f"{100 * s:g} %" for s in item["sparsities"])
            lines.append(f"| {item['row']} | {sparsities} | {100 * item['searched_at']:g} % | {'; '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _candidate(entry: dict[str, Any], chosen: Rates | None) -> str:
    score = "failed" if entry["score"] is None else f"{entry['score']:.4f}"
    text = f"{say_rates(entry['rates'])}: {score}"
    return f"**{text}**" if entry["rates"] == chosen else text


def say_rates(rates: Rates) -> str:
    """Learning rates as tables have them.

    Example:
        >>> say_rates({"lr": 3e-3, "score_lr": 1e-2})
        'lr 0.003, scores 0.01'
    """
    return ", ".join(f"{name.replace('score_lr', 'scores')} {rate:g}" for name, rate in rates.items())


def _place(item: dict[str, Any]) -> tuple[str, str, tuple[float, ...]]:
    return item["task"], item["row"], tuple(item["sparsities"])
