"""A run that is killed at any moment, also while it saves, goes on and ends as one that never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from ranks import processes
from safetensors.torch import load_file
from tiny_models import TOKENS, assert_same_tensors, tiny_bert
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, last_whole_checkpoint

STEPS, EVERY = 8, 2
ADAPTER = "adapter_model.safetensors"
OPTIONS: dict[str, dict[str, Any]] = {
    "held masks and residual": {"residual": 3, "residual_positions": "random", "mask_interval": 3},
    "one budget": {"scope": "global"},
    "rows, held": {"pattern": "rows", "target_sparsity": 0.6, "mask_interval": 4},
    "one budget of rows, held": {"pattern": "rows", "target_sparsity": 0.6, "scope": "global", "mask_interval": 4},
}
NAMES = list(OPTIONS)
MOMENTS = 20


class Sentences(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index % 2].roll(index), "labels": torch.tensor(index % 3)}


def make_trainer(folder: str, name: str) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), PSTConfig(task_type="SEQ_CLS", r=2, score_rank=2, **OPTIONS[name]))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_steps=EVERY,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=Sentences(), callbacks=[PSTCallback()])


def train(folder: str, name: str, fatal_write: int | None = None, seconds: float | None = None) -> None:
    """Go on with the run in a folder; die after some seconds, or before the given file of a checkpoint is opened.

    Files are counted from 1. A run that ends leaves word of how long it took.
    """
    writes = 0

    def die(event: str = "", arguments: tuple[Any, ...] = ()) -> None:
        nonlocal writes
        if event == "open" and "checkpoint-" in str(arguments[0]) and str(arguments[1]).startswith("w"):
            writes += 1
        if not event or (event == "open" and writes == fatal_write):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    trainer = make_trainer(folder, name)
    start = time.monotonic()
    if seconds is not None:
        threading.Timer(seconds, die).start()
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    trainer.save_model(f"{folder}/final")
    Path(folder, "seconds").write_text(str(time.monotonic() - start), encoding="utf-8")
    os._exit(0)  # before a timer that is still to come


def run(folder: Path, name: str, fatal_write: int | None = None, seconds: float | None = None) -> int | None:
    """Exit status of `train` in a process of its own."""
    process = processes.Process(target=train, args=(str(folder), name, fatal_write, seconds))
    process.start()
    process.join()
    return process.exitcode


Whole = tuple[dict[str, Tensor], float, Path]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """The adapter, the seconds and the folder of a run that nothing stops, by the name of its options."""

    @cache
    def whole_run(name: str) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        assert run(folder, name) == 0
        return load_file(folder / "final" / ADAPTER), float((folder / "seconds").read_text(encoding="utf-8")), folder

    return whole_run


@pytest.fixture
def whole(whole_runs: Callable[[str], Whole]) -> Whole:
    return whole_runs(NAMES[0])


def assert_resumes(folder: Path, name: str, expected: dict[str, Tensor]) -> None:
    assert run(folder, name) == 0
    assert_same_tensors(load_file(folder / "final" / ADAPTER), expected)
    assert last_whole_checkpoint(folder) == str(folder / f"checkpoint-{STEPS}")


@pytest.mark.parametrize(
    "fatal_write", [9, *(pytest.param(write, marks=pytest.mark.slow) for write in (1, 2, 3, 4, 5, 7, 8, 11))]
)
def test_killed_while_saving(whole: tuple[Any, ...], tmp_path: Path, fatal_write: int) -> None:
    assert run(tmp_path, NAMES[0], fatal_write) == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = last_whole_checkpoint(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names, "it died in the folder of a checkpoint"
    assert left is None or Path(left).name != names[-1], "the last one is half written"
    assert_resumes(tmp_path, NAMES[0], whole[0])


@pytest.mark.parametrize("moment", [0, *(pytest.param(moment, marks=pytest.mark.slow) for moment in range(1, MOMENTS))])
def test_killed_at_a_random_moment(
    whole_runs: Callable[[str], Whole], tmp_path: Path, moment: int, record_property: Callable[[str, object], None]
) -> None:
    name = NAMES[moment % len(NAMES)]
    expected, seconds, _ = whole_runs(name)
    moment_of_death = random.Random(moment).uniform(0, seconds)
    while run(tmp_path, name, seconds=moment_of_death) == 0:  # the machine was slower when the time was taken
        shutil.rmtree(tmp_path)
        moment_of_death *= 0.7
    record_property("checkpoints left", len(list(tmp_path.glob("checkpoint-*"))))
    assert not (tmp_path / "seconds").exists()
    assert_resumes(tmp_path, name, expected)


def test_a_damaged_checkpoint_is_passed_over(whole: tuple[Any, ...], tmp_path: Path) -> None:
    last, before = f"checkpoint-{STEPS}", f"checkpoint-{STEPS - EVERY}"
    files = sorted(file.name for file in (whole[2] / last).iterdir() if file.name != "README.md")
    assert {ADAPTER, "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(files)
    for name in files:
        folder = tmp_path / name
        for checkpoint in (last, before):
            shutil.copytree(whole[2] / checkpoint, folder / checkpoint)
        assert last_whole_checkpoint(folder) == str(folder / last)
        file = folder / last / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
        with pytest.warns(UserWarning, match=rf"{last} was not written to its end .*{name}"):
            assert last_whole_checkpoint(folder) == str(folder / before)


def test_a_state_of_another_step_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    with pytest.warns(UserWarning, match="is of step 2"):
        assert last_whole_checkpoint(tmp_path) is None


def test_the_final_adapter_loads(whole: tuple[Any, ...]) -> None:
    model = PeftModel.from_pretrained(tiny_bert(), str(whole[2] / "final"))
    assert model.base_model.get_sparsity() == pytest.approx(0.9, abs=0.01)
