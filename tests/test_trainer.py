"""`PSTCallback` in a real `Trainer`: steps, logs, interruption, the best model, and its warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_pst import PSTCallback, PSTConfig, PSTLayer, create_pst_optimizer, cubic_sparsity, get_sparsity
from peft_pst.masking import num_pruned

STEPS = 10


class Examples(torch.utils.data.Dataset):
    """Sentences whose label is the parity of their first token."""

    def __init__(self, number: int) -> None:
        self.tokens = torch.randint(0, 40, (number, 6), generator=torch.Generator().manual_seed(number))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, 0] % 2}


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=10, **shape))


def tiny_model(**options: object) -> PeftModel:
    return get_peft_model(tiny_bert(), PSTConfig(**{"task_type": "SEQ_CLS", "r": 2, "score_rank": 2, **options}))


def injected_model(**options: object) -> BertForSequenceClassification:
    model = tiny_bert()
    model.add_adapter(PSTConfig(**{"r": 2, "score_rank": 2, "modules_to_save": ["classifier"], **options}))
    return model


def make_trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    settings = arguments | options
    metrics = settings.pop("compute_metrics", None)
    optimizers = settings.pop("optimizers", (None, None))
    return Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=Examples(64),
        eval_dataset=Examples(8),
        compute_metrics=metrics,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


class Recorder(TrainerCallback):
    """Notes the sparsity in force in every micro-batch, and after every step."""

    def __init__(self) -> None:
        self.in_micro_batches: list[float] = []
        self.after_steps: dict[int, float] = {}

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.in_micro_batches.append(get_sparsity(kwargs["model"]))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.after_steps[state.global_step] = get_sparsity(kwargs["model"])


class StopAt(TrainerCallback):
    """The interruption: training ends after a step, whatever was planned."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def promised_sparsity(model: nn.Module, step: int, total: int = STEPS, target: float = 0.9) -> float:
    """What the schedule comes to in whole weights, over all layers."""
    sizes = [layer.num_weights for layer in model.modules() if isinstance(layer, PSTLayer)]
    sparsity = cubic_sparsity(step, total, target_sparsity=target)
    return sum(num_pruned(size, sparsity) for size in sizes) / sum(sizes)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_are_finished_optimizer_steps(tmp_path: Path, accumulation: int) -> None:
    model, recorder = tiny_model(), Recorder()
    make_trainer(model, tmp_path, PSTCallback(), recorder, gradient_accumulation_steps=accumulation).train()
    promised = {step: promised_sparsity(model, step) for step in range(STEPS + 1)}
    assert recorder.after_steps == {step: promised[step] for step in range(1, STEPS + 1)}
    within = [promised[step] for step in range(STEPS) for _ in range(accumulation - 1)]
    assert recorder.in_micro_batches == within
    assert model.get_sparsity() == promised_sparsity(model, STEPS) == pytest.approx(0.9, abs=0.01)


def test_total_steps_is_filled_in_and_saved(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = make_trainer(model, tmp_path, PSTCallback(), max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert model.peft_config["default"].total_steps == trainer.state.max_steps == 16
    trainer.save_model(tmp_path / "saved")
    assert PeftConfig.from_pretrained(tmp_path / "saved").total_steps == 16


def test_total_steps_of_the_configuration_is_kept(tmp_path: Path) -> None:
    model = tiny_model(total_steps=8)
    recorder = Recorder()
    make_trainer(model, tmp_path, PSTCallback(), recorder).train()
    assert model.peft_config["default"].total_steps == 8
    assert recorder.after_steps[4] == promised_sparsity(model, 4, total=8)


def test_sparsity_is_logged(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = make_trainer(model, tmp_path, PSTCallback(), eval_strategy="steps", eval_steps=5)
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    for entry in losses:
        assert entry["sparsity"] == round(promised_sparsity(model, entry["step"]), 6)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["sparsity"] for entry in evaluations] == [
        round(promised_sparsity(model, step), 6) for step in (5, 10)
    ]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: layer.get_mask(layer.active_adapters[0])
        for name, layer in model.named_modules()
        if isinstance(layer, PSTLayer)
    }


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {name: entry[name] for name in ("step", "loss", "grad_norm", "learning_rate", "sparsity")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("interrupted_at", [1, 4, 8])  # on the first plateau, on the ramp, at the target
def test_resuming_equals_never_stopping(tmp_path: Path, interrupted_at: int) -> None:
    options = {"save_strategy": "steps", "save_steps": interrupted_at, "gradient_accumulation_steps": 2}
    whole = tiny_model()
    whole_trainer = make_trainer(whole, tmp_path / "whole", PSTCallback(), **options)
    whole_trainer.train()

    make_trainer(tiny_model(), tmp_path / "parts", PSTCallback(), StopAt(interrupted_at), **options).train()
    resumed = tiny_model()
    resumed_trainer = make_trainer(resumed, tmp_path / "parts", PSTCallback(), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts anew.*")
        resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{interrupted_at}"))

    expected = tensors(whole)
    for name, tensor in tensors(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    expected = masks(whole)
    for name, mask in masks(resumed).items():
        assert torch.equal(mask, expected[name]), name
    assert logged(resumed_trainer) == logged(whole_trainer)


class Falling:
    """A metric that only falls, as when pruning costs accuracy: the first evaluation is the best."""

    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        self.value -= 0.01
        return {"score": self.value}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


@pytest.mark.parametrize(("best_at_target", "best_step"), [(True, 7), (False, 1)])
def test_best_model_at_the_target(tmp_path: Path, best_at_target: bool, best_step: int) -> None:
    model = tiny_model()
    callback = PSTCallback(best_at_target=best_at_target)
    trainer = make_trainer(model, tmp_path, callback, compute_metrics=Falling(), **BEST)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best_step}"
    assert trainer.state.best_metric == pytest.approx(1 - 0.01 * best_step)
    assert model.get_sparsity() == promised_sparsity(model, best_step)


def test_best_model_at_the_target_after_resuming(tmp_path: Path) -> None:
    callbacks = (PSTCallback(best_at_target=True), StopAt(3))
    make_trainer(tiny_model(), tmp_path, *callbacks, compute_metrics=Falling(), **BEST).train()
    metric = Falling()
    metric.value = 0.5
    model = tiny_model()
    trainer = make_trainer(model, tmp_path, PSTCallback(best_at_target=True), compute_metrics=metric, **BEST)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-7"
    assert model.get_sparsity() == promised_sparsity(model, STEPS)


def test_with_a_limit_on_checkpoints_the_best_one_stays(tmp_path: Path) -> None:
    model = tiny_model()
    callback = PSTCallback(best_at_target=True)
    trainer = make_trainer(model, tmp_path, callback, compute_metrics=Falling(), save_total_limit=1, **BEST)
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} >= {"checkpoint-7"}
    assert model.get_sparsity() == promised_sparsity(model, STEPS)


def test_a_schedule_longer_than_the_run_warns(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"Training ends after 10 steps, before the schedule of total_steps=100 reaches target_sparsity=0\.9",
    ):
        make_trainer(tiny_model(total_steps=100), tmp_path, PSTCallback()).train()


def test_a_schedule_that_starts_anew_warns(tmp_path: Path) -> None:
    model = tiny_model()
    make_trainer(model, tmp_path, PSTCallback()).train()
    with pytest.warns(
        UserWarning, match=r"starts anew at step 0: sparsity falls from 0\.\d+ to 0\.0000.*initial_spars"
    ):
        make_trainer(model, tmp_path, PSTCallback(), max_steps=4).train()
    assert model.peft_config["default"].total_steps == 4  # the next run's length, not the first one's
    assert model.get_sparsity() == promised_sparsity(model, 4, total=4)


@pytest.mark.parametrize("make", [tiny_bert, lambda: get_peft_model(tiny_bert(), PSTConfig()).unload()])
def test_without_an_adapter_training_does_not_start(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"no active PST adapter\. Make one with get_peft_model"):
        make_trainer(make(), tmp_path, PSTCallback()).train()


def test_the_callback_counts_as_driving(tmp_path: Path) -> None:
    """Evaluation before the first step sees a sparsity of 0, but somebody is at the wheel."""
    options = {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prunes nothing.*")
        make_trainer(tiny_model(), tmp_path, PSTCallback(), **options).train()


def test_forgetting_the_callback_warns(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=2)
    trainer.train()
    with pytest.warns(UserWarning, match="prunes nothing"):
        trainer.evaluate()


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.11"),
    reason="transformers 5.10's load_adapter leaves modules_to_save at random, whatever the tuner",
)
def test_injected_adapters_train_save_and_load(tmp_path: Path) -> None:
    model = injected_model()
    trainer = make_trainer(model, tmp_path, PSTCallback())
    trainer.train()
    assert get_sparsity(model) == promised_sparsity(model, STEPS)
    trainer.save_model(tmp_path / "saved")
    loaded = tiny_bert()
    loaded.load_adapter(str(tmp_path / "saved"))
    batch = {"input_ids": Examples(8).tokens}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_own_optimizer_with_a_rate_for_the_scores(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = create_pst_optimizer(model, torch.optim.AdamW, lr=1e-3, score_lr=1e-2)
    before = tensors(model)
    trainer = make_trainer(model, tmp_path, PSTCallback(), optimizers=(optimizer, None), lr_scheduler_type="constant")
    trainer.train()
    after = tensors(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in moved if "num_pruned" not in name} == trainable


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        make_trainer(model, tmp_path, PSTCallback(), gradient_checkpointing=checkpointing, max_steps=4).train()
        results.append(tensors(model))
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name
