"""Rows of the results harness that learn from a dense row beside the labels, on a tiny BERT and a tiny SST-2."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert
from tiny_results import SETTINGS, machine, write_data
from torch import nn
from transformers import TrainingArguments

from benchmarks.results import __main__ as command_line
from benchmarks.results import train as training
from benchmarks.results.runs import Run, make_run
from benchmarks.results.search import questions
from benchmarks.results.settings import Settings, read_settings
from benchmarks.results.train import ResultsTrainer, TaughtTrainer, execute, load_teacher
from peft_pst.distillation import distillation_loss

TAUGHT = """
  taught: {method: pst, rates_of: pst, teacher: lora}
"""
RATES = {"lr": 3e-3, "score_lr": 1e-2}
IDS, LABELS = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]]), torch.tensor([0, 2])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def settings_file(tmp_path: Path, bert: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SETTINGS.format(model=bert).rstrip() + TAUGHT)
    return path


@pytest.fixture
def settings(settings_file: Path) -> Settings:
    return read_settings(settings_file)


def taught_run(settings: Settings, data: Path) -> Run:
    return make_run(settings, machine(data), "sst2", "taught", 0.7, 0, RATES, {"lr": 1e-3})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_teacher_is_the_dense_rows_own_run_and_is_trained_once(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = taught_run(settings, data)
    assert run.teacher is not None
    dense = make_run(settings, machine(data), "sst2", "lora", 0.0, 0, {"lr": 1e-3})
    assert run.teacher.run == dense
    folder = tmp_path / "teachers"
    first = execute(run, data, folder)
    assert [path.name for path in folder.iterdir()] == [f"{dense.key}.safetensors"]

    trained: list[str] = []
    train = training._train
    monkeypatch.setattr(training, "_train", lambda run, *rest: trained.append(run.method) or train(run, *rest))
    kept = load_teacher(dense, data, folder)
    assert trained == []
    anew = load_teacher(dense, data, None)
    assert trained == ["lora"]
    for name, tensor in anew.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name
    second = execute(run, data, folder)
    assert trained == ["lora", "pst"]
    assert (second["scores"], second["train_loss"]) == (first["scores"], first["train_loss"])
    assert first["train_loss"] != execute(replace(run, teacher=None), data)["train_loss"]


@pytest.mark.parametrize("return_outputs", [False, True])
def test_loss_is_shared_between_labels_and_teacher_and_a_penalty_counts_while_training_alone(
    tmp_path: Path, return_outputs: bool
) -> None:
    student, teacher = tiny_bert(), tiny_bert()
    for model in (student, teacher):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    with torch.no_grad():
        teacher.classifier.weight.add_(0.5)
    inputs = {"input_ids": IDS, "labels": LABELS}
    own, apart = student(**inputs).loss.item(), student(input_ids=IDS).logits
    distance = distillation_loss(apart, teacher(input_ids=IDS).logits, 3.0).item()

    def loss(kind: Any, *, train: bool, **kwargs: Any) -> float:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        trainer = kind(model=student, args=arguments, penalty=lambda: torch.tensor(2.0), **kwargs)
        found = trainer.compute_loss(student.train(train), dict(inputs), return_outputs)
        return (found[0] if return_outputs else found).item()

    assert loss(ResultsTrainer, train=True) == pytest.approx(own + 2)
    assert loss(ResultsTrainer, train=False) == pytest.approx(own)
    shared = {"teacher": teacher, "teacher_weight": 0.25, "temperature": 3.0}
    assert loss(TaughtTrainer, train=True, **shared) == pytest.approx(0.75 * (own + 2) + 0.25 * distance, rel=1e-5)
    assert loss(TaughtTrainer, train=False, **shared) == pytest.approx(own)


def test_a_taught_row_takes_over_rates_and_is_not_searched(settings: Settings, data: Path, tmp_path: Path) -> None:
    asked = questions(settings, machine(data, with_validation=False), ["sst2"], list(settings.rows))
    assert {question.row for question in asked} == {"pst", "importance"}
    fixed = replace(settings.rows["pst"], rates=RATES, candidates=())
    fixed_settings = replace(settings, rows={**settings.rows, "pst": fixed})
    options = argparse.Namespace(
        tasks=None, only=["taught"], sparsities=[0.9], seeds=[1], data=data, threads=1, device="cpu", output=tmp_path
    )
    ((row, run),) = command_line.planned_runs(fixed_settings, options)
    assert row == "taught"
    assert run == replace(
        make_run(settings, machine(data), "sst2", "pst", 0.9, 1, RATES),
        teacher=make_run(settings, machine(data), "sst2", "taught", 0.9, 1, RATES, {"lr": 1e-3}).teacher,
    )
    assert "_pst-taught_" in run.file_name
    unsearched = replace(settings.rows["lora"], rates=None)
    with pytest.raises(ValueError, match=r"taught on sst2 at 0.9 has no learning rates for its teacher lora"):
        command_line.planned_runs(replace(fixed_settings, rows={**fixed_settings.rows, "lora": unsearched}), options)


@pytest.mark.parametrize(
    ("taught", "message"),
    [
        ("{method: pst, rates_of: magic}", "rates_of 'magic' is none of the rows lora, pst, importance, taught"),
        ("{method: pst, rates_of: pst, teacher: magic}", "teacher 'magic' is none of the rows"),
        ("{method: pst, rates_of: pst, teacher: importance}", "teacher 'importance' prunes"),
        ("{method: pst, rates_of: pst, teacher: lora, teacher_weight: 2}", "teacher_weight=2 is outside"),
        ("{method: pst, rates_of: lora}", "'lora' has other learning rates than pst takes"),
        ("{method: pst, rates_of: taught}", "rates_of goes with neither rates nor candidates, nor to a row that has"),
        ("{method: pst, rates_of: pst, rates: {lr: 1, score_lr: 1}}", "rates_of goes with neither rates nor"),
        ("{method: pst, candidates: [{lr: 1, score_lr: 1}], teacher: lora}", "a row with a teacher is not searched"),
    ],
)
def test_references_that_do_not_hold_are_refused(settings_file: Path, taught: str, message: str) -> None:
    text = settings_file.read_text()
    settings_file.write_text(text.replace("{method: pst, rates_of: pst, teacher: lora}", taught))
    with pytest.raises(ValueError, match=message):
        read_settings(settings_file)
