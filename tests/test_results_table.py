"""Search reports, tables and pictures of the results harness, from results that nothing was run for."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_results import fake, machine, write_data, write_settings

from benchmarks.results import __main__ as command_line
from benchmarks.results.pictures import choose_looks, plot_over_parameters, plot_over_sparsity, spread_apart
from benchmarks.results.runs import make_run
from benchmarks.results.search import answer, group_of, question, questions, rates_for, save_answers
from benchmarks.results.settings import Settings, read_settings, with_max_steps
from benchmarks.results.table import make_cells, save_table, to_markdown


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    return write_settings(tmp_path / "tiny.yaml", "a-model")


@pytest.fixture
def settings(settings_file: Path) -> Settings:
    return read_settings(settings_file)


# Searching


def test_a_search_asks_once_for_each_group_and_its_winner_is_taken(
    settings: Settings, data: Path, tmp_path: Path
) -> None:
    where = machine(data)
    asked = questions(settings, where, ["sst2"], settings.rows)
    assert [(each.row, each.sparsities, each.runs[0].sparsity) for each in asked] == [
        ("pst", (0.5, 0.7), 0.7),
        ("pst", (0.9,), 0.9),
        ("importance", (0.5, 0.7), 0.7),
        ("importance", (0.9,), 0.9),
    ]
    assert {run.split for each in asked for run in each.runs} == {"held_out"}
    assert {run.seed for each in asked for run in each.runs} == {7}
    fake(asked[0].runs[0], tmp_path, 0.8)
    fake(asked[0].runs[1], tmp_path, 0.9)
    fake(asked[1].runs[0], tmp_path, 0.7)  # the other candidate failed
    fake(asked[2].runs[0], tmp_path, 0.6)
    fake(asked[2].runs[1], tmp_path, 0.6)  # a tie
    save_answers([answer(each, tmp_path) for each in asked[:1]], tmp_path)
    save_answers([answer(each, tmp_path) for each in asked[1:]], tmp_path)
    found = {
        (row, s): rates_for(settings, where, "sst2", row, s, tmp_path)
        for row in settings.rows
        for s in settings.sparsities_of(row)
    }
    first, second = settings.rows["pst"].candidates
    assert found["lora", 0.0] == {"lr": 1e-3}
    assert found["pst", 0.5] == found["pst", 0.7] == second
    assert found["pst", 0.9] == first
    assert found["importance", 0.5] == {"score_lr": 1e-3}
    assert found["importance", 0.9] is None
    text = (tmp_path / "search.md").read_text()
    assert "lr 0.001, scores 0.001: 0.8000; **lr 0.003, scores 0.01: 0.9000**" in text
    assert "failed" in text
    longer = with_max_steps(settings, 7)
    assert rates_for(longer, where, "sst2", "pst", 0.5, tmp_path) is None
    on_a_gpu = replace(where, device="cuda")
    assert rates_for(settings, on_a_gpu, "sst2", "pst", 0.5, tmp_path) == second


def test_of_perplexities_the_lowest_wins(settings: Settings, data: Path, tmp_path: Path) -> None:
    asked = question(settings, machine(data), "sst2", "pst", (0.9,))
    for run, score in zip(asked.runs, (30.0, 20.0), strict=True):
        fake(run, tmp_path, score, highest_is_best=False)
    assert answer(asked, tmp_path)["rates"] == asked.runs[1].rates


def test_a_score_that_is_not_defined_wins_no_search(settings: Settings, data: Path, tmp_path: Path) -> None:
    asked = question(settings, machine(data), "sst2", "pst", (0.9,))
    for run, score in zip(asked.runs, (math.nan, -0.1), strict=True):
        fake(run, tmp_path, score)
    assert answer(asked, tmp_path)["rates"] == asked.runs[1].rates
    python_wrote = tmp_path / asked.runs[0].file_name
    python_wrote.write_text(python_wrote.read_text().replace("null", "NaN", 1))
    assert answer(asked, tmp_path)["rates"] == asked.runs[1].rates


def test_every_method_has_the_same_budget(settings_file: Path, data: Path) -> None:
    settings_file.write_text(settings_file.read_text().replace("{score_lr: 1.0e-3}, {score_lr", "{score_lr"))
    settings = read_settings(settings_file)
    with pytest.raises(ValueError, match="importance has 1 candidates, but the budget of every method is 2"):
        questions(settings, machine(data), ["sst2"], settings.rows)


def test_a_sparsity_in_no_group_is_searched_alone(settings: Settings) -> None:
    settings = replace(settings, sparsities=(0.5, 0.8))
    assert group_of(settings, "pst", 0.5) == (0.5,)
    assert group_of(settings, "pst", 0.8) == (0.8,)


def test_a_search_may_be_shorter_than_the_runs(settings: Settings, data: Path) -> None:
    shorter = replace(settings, search=replace(settings.search, steps=3))
    (asked, *_) = questions(shorter, machine(data), ["sst2"], ["pst"])
    assert {run.training.steps for run in asked.runs} == {3}


# Tables


def test_a_table_of_fake_runs(settings: Settings, data: Path, tmp_path: Path) -> None:
    planned = []
    for row, sparsity, scores in (("lora", 0.0, (0.8, 0.9)), ("pst", 0.5, (0.7,)), ("pst", 0.9, (0.6, 0.62))):
        for seed in (0, 1):
            run = make_run(settings, machine(data), "sst2", row, sparsity, seed, {"lr": 1e-3})
            planned.append((row, run))
            if seed < len(scores):
                fake(run, tmp_path, scores[seed], peak_memory_bytes=(seed + 1) * 2**20, cpu_seconds=seed * 2.0)
    cells = make_cells(settings, planned, tmp_path)
    assert [(cell.row, cell.sparsity, cell.missing) for cell in cells] == [
        ("lora", 0.0, []),
        ("pst", 0.5, [1]),
        ("pst", 0.9, []),
    ]
    assert cells[0].mean == pytest.approx(0.85)
    assert cells[0].spread == pytest.approx(0.1 / 2**0.5)
    assert cells[1].spread is None
    assert cells[0].peak_memory_bytes == 2 * 2**20
    assert cells[0].seconds == 1.0
    text = to_markdown(settings, cells)
    assert "| LoRA | 0.00 M | 85.00 ± 7.07 (2) |  |  |" in text
    assert "| PST | 0.00 M |  | 70.00 (1) | 61.00 ± 1.41 (2) |" in text
    assert "| PST | 50 % | 70.0000 % | lr 0.001 | 70.00 | 1 | 0 | seed 1 |  |" in text


def test_a_score_that_is_not_defined_is_in_the_table_and_not_in_the_pictures(
    settings: Settings, data: Path, tmp_path: Path
) -> None:
    dense = make_run(settings, machine(data), "sst2", "lora", 0.0, 0, {"lr": 1e-3})
    constant = make_run(settings, machine(data), "sst2", "pst", 0.5, 0, {"lr": 1e-3})
    fake(dense, tmp_path, 0.8)
    fake(constant, tmp_path, math.nan)  # the correlation of one and the same prediction for all
    cells = make_cells(settings, [("lora", dense), ("pst", constant)], tmp_path)
    assert "| undefined (1) |" in to_markdown(settings, cells)
    save_table(settings, cells, tmp_path)
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    for plot in (plot_over_sparsity, plot_over_parameters):
        with_it, without = (plot(those, tmp_path / "p.png").read_bytes() for those in (cells, cells[:1]))
        assert with_it == without


def test_the_command_writes_table_and_pictures(
    settings_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read_settings(settings_file)
    folder = tmp_path / "runs" / "tiny"
    for seed in (0, 1):
        fake(make_run(settings, machine(data), "sst2", "lora", 0.0, seed, {"lr": 1e-3}), folder, 0.8)
    answers = []
    for asked in questions(settings, machine(data, with_validation=False), ["sst2"], ["pst"]):
        fake(asked.runs[0], folder, 0.5)
        answers.append(answer(asked, folder))
        for sparsity in asked.sparsities:
            run = make_run(settings, machine(data), "sst2", "pst", sparsity, 0, asked.runs[0].rates)
            fake(run, folder, 1 - sparsity)
    save_answers(answers, folder)
    options = ["--data", str(data), "--output", str(tmp_path / "runs"), "--device", "cpu"]
    assert command_line.main(["table", str(settings_file), *options]) == 0
    captured = capsys.readouterr()
    assert "left out: importance on sst2 at 0.5" in captured.err
    assert captured.out.strip() == (folder / "table.md").read_text().strip()
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [(row["row"], row["sparsity"], round(row["mean"], 2)) for row in rows] == [
        ("lora", 0.0, 0.8),
        ("pst", 0.5, 0.5),
        ("pst", 0.7, 0.3),
        ("pst", 0.9, 0.1),
    ]
    for name in ("sst2-over-sparsity.png", "sst2-over-parameters.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


# Pictures


def test_no_two_methods_look_alike(settings: Settings, data: Path, tmp_path: Path) -> None:
    names = ["pst", "pst-paper", "pst-importance", *(f"rival{number}" for number in range(9))]
    wide = replace(settings, rows=dict.fromkeys(names, settings.rows["pst"]))
    planned = []
    for seed, name in enumerate(names):
        run = make_run(wide, machine(data), "sst2", name, 0.5, seed, {"lr": 1e-3})
        fake(run, tmp_path, 0.5)
        planned.append((name, run))
    looks = choose_looks(make_cells(wide, planned, tmp_path))
    assert len(looks) == len(set(looks.values())) == 12


def test_names_are_spread_apart_without_changing_their_order() -> None:
    values = [0.3, 0.31, 0.1, 0.9, 0.305, 0.33]
    places = spread_apart(values, 0.05)
    ordered = [places[i] for i in sorted(range(6), key=values.__getitem__)]
    assert all(b - a >= 0.05 - 1e-12 for a, b in pairwise(ordered))
    assert places[2] == 0.1
    assert places[3] == 0.9
    assert sum(places) == pytest.approx(sum(values))
