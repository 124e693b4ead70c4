"""Numbers that are not finite, also where a GPU is not asked, and numbers that are absurd: a clear error in time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_faults_training import Poison, Sentences
from tiny_models import layers_of, net, pruned_net, tiny_bert
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, get_sparsity, masking
from peft_pst.cli.labels import Labels
from peft_pst.cli.options import RunOptions
from peft_pst.cli.trainer import PSTTrainer


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection as on a GPU, where a NaN is kept, since to ask for one would stall it."""
    monkeypatch.setattr(masking, "_select_on_cpu", masking._select_on_device)


class InfiniteLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss * (float("inf") if self.state.global_step == 2 else 1)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {"max_steps": 8, "logging_steps": 2, "save_steps": 4, **options}
    return TrainingArguments(str(folder), report_to=[], disable_tqdm=True, use_cpu=True, **options)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_bert(), PSTConfig(task_type="SEQ_CLS", r=2, score_rank=2))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("part", ["pst_U", "pst_B", "pst_R"])
def test_a_nan_that_no_selection_sees_is_found_when_the_trainer_logs(tmp_path: Path, part: str) -> None:
    callbacks: list[TrainerCallback] = [PSTCallback(), Poison(3, f"query.{part}", float("nan"))]
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=Sentences(), callbacks=callbacks)
    with pytest.raises(ValueError, match=r"After step 4, .* hold a NaN .*(layer\.\d\.attention|word_embeddings)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.usefixtures("as_on_a_device")
def test_a_loss_that_is_infinite_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    trainer = InfiniteLoss(adapted(), arguments(tmp_path), train_dataset=Sentences(), callbacks=[PSTCallback()])
    with pytest.raises(ValueError, match=r"After step 4, \d+ of \d+ trained tensors hold a NaN"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("part", ["pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_factor_is_refused_in_a_loop_of_ones_own(part: str, value: float) -> None:
    model = pruned_net()
    before = get_sparsity(model)
    layer = layers_of(model)["base_model.model.layers.1.up"]
    with torch.no_grad():
        getattr(layer, part)["default"].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"Layer layers\.1\.up, adapter 'default': {part} holds an infinity"):
        model.update_sparsity(1, 10)
    assert get_sparsity(model) == before
    with torch.no_grad():
        getattr(layer, part)["default"].view(-1)[0] = 0.0
    assert model.update_sparsity(1, 10) < before


def test_the_command_lines_trainer_looks_before_it_saves(tmp_path: Path) -> None:
    trainer = PSTTrainer(
        run=RunOptions(),
        labels=Labels(["a", "b", "c"]),
        model=adapted(),
        args=arguments(tmp_path, logging_strategy="no"),
        train_dataset=Sentences(),
    )
    trainer.add_callback(Poison(4, "modules_to_save.default.weight", float("nan")))
    with pytest.raises(ValueError, match="After step 4"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("part", ["pst_U", "pst_A", "pst_C"])
def test_safe_merge_refuses_what_no_selection_saw(part: str) -> None:
    model = pruned_net()
    with torch.no_grad():
        getattr(layers_of(model)["base_model.model.layers.1.up"], part)["default"].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 10**12}, r"Layer layers\.0\.up: r=10{12} is above 64, the most for a matrix of 12 x 8\."),
        ({"score_rank": 10**12}, r"Layer layers\.0\.up: score_rank=10{12} is above 64"),
        ({"residual": 10**12}, r"Layer layers\.0\.up: residual=10{12} is above 96"),
        ({"rank_pattern": {"layers.1.down": 10**12}}, r"Layer layers\.1\.down: r=10{12} is above 64"),
    ],
    ids=str,
)
def test_parts_that_outgrow_their_matrix_take_no_memory(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        get_peft_model(net(), PSTConfig(**options))


def test_a_large_matrix_may_have_its_own_rank() -> None:
    base = nn.Sequential(nn.Linear(70, 80))
    layer = get_peft_model(base, PSTConfig(target_modules=["0"], r=70)).base_model.model[0]
    assert layer.pst_U["default"].shape == (80, 70)
    with pytest.raises(ValueError, match="r=71 is above 70, the most for a matrix of 80 x 70"):
        get_peft_model(nn.Sequential(nn.Linear(70, 80)), PSTConfig(target_modules=["0"], r=71))


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns", "4x4"])
def test_a_target_near_one_keeps_one_of_what_it_ranks(pattern: str) -> None:
    model = pruned_net(target_sparsity=1 - 1e-9, pattern=pattern)
    for layer in layers_of(model).values():
        assert 0 < int(layer.get_mask("default").sum()) <= max(layer.out_features, layer.in_features, 16)


def test_every_fault_on_the_page_has_its_test() -> None:
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `(\w+\.py)::(\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == page.count("\n| ") - 1, "every row but the heading names one"
    for file, name in rows:
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8"), f"{file}::{name}"
