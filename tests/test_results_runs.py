"""The results harness from settings to single runs and their files, on a tiny BERT and a tiny SST-2."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_results import a_run, fake, machine, write_data, write_settings
from transformers import Trainer

from benchmarks.results import __main__ as command_line
from benchmarks.results import launch as launching
from benchmarks.results.launch import launch
from benchmarks.results.runs import Run, Teacher, read_result, write_json
from benchmarks.results.settings import Settings, Training, read_settings
from benchmarks.results.tasks import load_task
from benchmarks.results.tasks.protocol import batch_order, num_steps, split_training
from benchmarks.results.train import execute


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def settings_file(tmp_path: Path, bert: str) -> Path:
    return write_settings(tmp_path / "tiny.yaml", bert)


@pytest.fixture
def settings(settings_file: Path) -> Settings:
    return read_settings(settings_file)


# One run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "precision"), [("pst", "bf16"), pytest.param("magnitude", "float32", marks=pytest.mark.slow)]
)
def test_one_seed_twice_gives_the_same_result(settings: Settings, data: Path, method: str, precision: str) -> None:
    run = a_run(settings, data, method)
    run = replace(run, training=replace(run.training, precision=precision))  # type: ignore[arg-type]
    first = execute(run, data)
    torch.rand(5)
    second = execute(run, data)
    other = execute(replace(run, seed=1), data)
    assert first["wall_seconds"] > 0
    assert first["cpu_seconds"] > 0
    for name in ("peak_memory_bytes", "wall_seconds", "cpu_seconds"):  # memory means something in a fresh process alone
        del first[name], second[name]
    assert first == second
    assert first["train_loss"] != other["train_loss"]
    assert first["zeros"] == pytest.approx(0.7 * first["weights"], abs=20)
    assert first["steps"] == 6


def test_training_examples_are_one_shuffle_and_their_order_is_the_seeds(settings: Settings, data: Path) -> None:
    run = a_run(settings, data)
    pool, held_out = split_training(40, run)
    assert len(pool) == 20
    assert held_out == []
    searching = replace(run, held_out=8, split="held_out")
    search_pool, search_held_out = split_training(40, searching)
    assert search_pool == pool
    assert len(search_held_out) == 8
    assert not set(search_held_out) & set(search_pool)
    assert split_training(40, replace(run, seed=5)) == (pool, [])
    everything = replace(searching, training=replace(run.training, train_examples=None))
    most, rest = split_training(40, everything)
    assert sorted(most + rest) == list(range(40))
    order = batch_order(20, run)
    assert len(order) == 24
    assert sorted(order[:20]) == list(range(20))
    assert order == batch_order(20, replace(run, method="magnitude", rates={"lr": 1.0}))
    assert order != batch_order(20, replace(run, seed=1))
    assert num_steps(replace(run, training=Training(epochs=1.5, batch_size=8)), 20) == 4
    with pytest.raises(ValueError, match="held_out=40 leaves none of 40 examples"):
        split_training(40, replace(run, held_out=40))


def test_batches_by_length_hold_neighbours_in_length_and_come_in_any_order(settings: Settings, data: Path) -> None:
    run = a_run(settings, data)
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 12, (20,), generator=generator).tolist()
    order = batch_order(20, run, lengths)  # 6 steps of 4: one pass, and the first batch of another
    assert sorted(order[:20]) == list(range(20))
    batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, 20, 4)]
    by_shortest = sorted(batches)
    assert [length for batch in by_shortest for length in batch] == sorted(lengths)
    assert batches != by_shortest
    assert order == batch_order(20, replace(run, method="magnitude", rates={"lr": 1.0}), lengths)
    assert order != batch_order(20, replace(run, seed=1), lengths)
    odd = batch_order(18, run, lengths[:18])
    assert sorted(odd[:18]) == list(range(18))
    assert [lengths[index] for index in odd[16:18]] == sorted(lengths[:18])[16:]  # what fills no batch comes last


def test_lengths_and_dropout_of_the_settings_reach_the_training(
    settings: Settings, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def train(trainer: Any) -> SimpleNamespace:
        seen["lengths"] = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        seen["dropout"] = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
        return SimpleNamespace(training_loss=0.0)

    monkeypatch.setattr(Trainer, "train", train)
    file = data / "glue" / "SST-2" / "train.tsv"
    header, *lines = file.read_text().splitlines()
    longer = [f"{'so ' * (7 * number % 5)}{line}" for number, line in enumerate(lines)]
    file.write_text("\n".join([header, *longer]) + "\n")
    run = a_run(settings, data, "magnitude", sparsity=0.0)
    execute(run, data)
    assert seen["dropout"] == {0.1}
    assert any(left > right for batch in _batches(seen["lengths"]) for left, right in pairwise(batch))
    execute(replace(run, training=replace(run.training, dropout=0.0, group_by_length=True)), data)
    assert seen["dropout"] == {0.0}
    assert all(batch == sorted(batch) for batch in _batches(seen["lengths"]))


def _batches(lengths: list[int]) -> list[list[int]]:
    return [lengths[start : start + 4] for start in range(0, len(lengths), 4)]


def test_a_search_does_not_open_the_dev_set(settings: Settings, data: Path) -> None:
    searched = replace(a_run(settings, data), split="held_out", held_out=8)
    (data / "glue" / "SST-2" / "dev.tsv").unlink()
    assert len(load_task(searched, data).pool) == 20
    right = 8 * execute(searched, data)["scores"]["accuracy"]
    assert right == round(right)  # of the 8 that are held out
    with pytest.raises(FileNotFoundError, match=r"dev.tsv is missing"):
        load_task(replace(searched, split="validation"), data)


# Keys and files


def test_a_key_changes_with_whatever_determines_a_result(settings: Settings, data: Path) -> None:
    run = a_run(settings, data)
    train = data / "glue" / "SST-2" / "train.tsv"
    train.write_text(train.read_text() + "a fine film\t1\n")
    changed = [
        replace(run, seed=1),
        replace(run, sparsity=0.5),
        replace(run, rates={"lr": 1e-3, "score_lr": 1e-2}),
        replace(run, training=replace(run.training, steps=7)),
        replace(run, training=replace(run.training, label_smoothing=0.1)),
        replace(run, options={"r": 4}),
        replace(run, resolved={**run.resolved, "r": 4}),
        replace(run, threads=2),
        replace(run, teacher=Teacher(replace(run, method="lora", sparsity=0.0), weight=0.5, temperature=2.0)),
        replace(run, teacher=Teacher(replace(run, method="dense", sparsity=0.0), weight=0.5, temperature=2.0)),
        replace(run, teacher=Teacher(replace(run, method="dense", sparsity=0.0), weight=0.4, temperature=2.0)),
        replace(run, data=machine(data).digests["sst2"]),
    ]
    assert len({run.key, *(other.key for other in changed)}) == len(changed) + 1
    for each in (run, changed[-1]):
        assert Run.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    older = {name: value for name, value in run.to_dict().items() if name != "teacher"}
    assert Run.from_dict(older).key == run.key


def test_results_are_read_by_key(settings: Settings, data: Path, tmp_path: Path) -> None:
    run = a_run(settings, data)
    fake(run, tmp_path, 0.25)
    found = read_result(tmp_path, run)
    assert found is not None
    assert found["scores"] == {"accuracy": 0.25}
    assert read_result(tmp_path, replace(run, seed=9)) is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# Launching


def test_finished_runs_are_skipped_and_a_crash_stops_no_other(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, started = tmp_path / "runs", []
    runs = [a_run(settings, data, seed=seed) for seed in range(4)]

    def run_one(run: Run, where: Path, files: Path | None) -> str | None:
        started.append(run.seed)
        if run.seed == 2:
            return "        it broke"
        fake(run, where, 0.5)
        return None

    monkeypatch.setattr(launching, "_run_one", run_one)
    fake(runs[0], folder, 0.5)
    assert launch([*runs, runs[1]], folder, data, jobs=2) == [runs[2]]
    assert sorted(started) == [1, 2, 3]
    assert "it broke" in capsys.readouterr().out
    assert launch(runs, folder, data, jobs=1) == [runs[2]]
    assert sorted(started) == [1, 2, 2, 3]


@pytest.mark.slow
def test_a_row_from_one_command_in_a_fresh_process(
    settings_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    options = ["--data", str(data), "--output", str(folder), "--device", "cpu", "--only", "lora", "--seeds", "0"]
    assert command_line.main(["run", str(settings_file), *options]) == 0
    assert command_line.main(["table", str(settings_file), *options]) == 0
    assert "| LoRA |" in capsys.readouterr().out
    (file,) = (folder / "tiny").glob("sst2_lora_*.json")
    content = json.loads(file.read_text())
    assert execute(Run.from_dict(content["run"]), data)["scores"] == content["result"]["scores"]
    assert {"peft_pst", "torch", "transformers", "peft"} <= content["versions"].keys()


def test_a_broken_process_is_told_of_and_shows_in_the_exit_status(
    settings_file: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text("#!/bin/sh\necho no such model >&2; exit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    options = ["--data", str(data), "--output", str(tmp_path), "--device", "cpu", "--only", "lora", "--seeds", "0"]
    assert command_line.main(["run", str(settings_file), *options]) == 1
    shown = capsys.readouterr().out
    assert "exit status 3" in shown
    assert "no such model" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--only", "magic"], "--only magic is none of lora, pst, importance"),
        (["run", "--tasks", "cola"], "--tasks cola is none of sst2"),
        (["run", "--only", "pst"], "pst on sst2 at 0.5 has no learning rates"),
        (["table"], "holds no results of these settings"),
        (["run", "--data", "/nowhere"], "/nowhere has no SST-2/train.tsv"),
    ],
)
def test_mistakes_are_said_before_anything_is_run(
    settings_file: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    message: str,
) -> None:
    command, *rest = arguments
    options = ["--data", str(data), "--output", str(tmp_path), "--device", "cpu", *rest]
    assert command_line.main([command, str(settings_file), *options]) == 2
    assert message in capsys.readouterr().err


# Settings


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seed: [0, 1]", "has no field 'seed'"),
        ("steps: 6", "step: 6", "training of sst2 has no field 'step'"),
        ("steps: 6", "epochs: 1, steps: 6", "give one of the two"),
        ("rates: {lr: 1.0e-3}", "rates: {lr: 1e-3}", "YAML reads 1e-3 as text"),
        ("rates: {lr: 1.0e-3}", "rates: {score_lr: 1.0e-3}", "lora takes lr"),
        ("method: pst-importance", "method: magic", "method 'magic' is none of dense"),
        ("sparsities: [0.5, 0.7, 0.9]", "sparsities: [0.5, 7]", "sparsities=7 is outside"),
        ("seed: 7", "seed: 1", "search.seed=1 is one of the table's seeds"),
        ("precision: float32", "precision: half", "precision='half' is neither"),
        ("precision: float32", "dropout: 1", "dropout=1 must be a number in"),
    ],
)
def test_settings_that_do_not_hold_are_refused(settings_file: Path, old: str, new: str, message: str) -> None:
    text = settings_file.read_text()
    assert old in text
    settings_file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_settings(settings_file)


def test_all_settings_files_can_be_read() -> None:
    files = sorted((Path(command_line.__file__).parent / "settings").glob("*.yaml"))
    assert files
    for file in files:
        settings = read_settings(file)
        searched = [row for row in settings.rows.values() if row.rates is None and row.rates_of is None]
        assert {len(row.candidates) for row in searched} <= {settings.search.budget}
