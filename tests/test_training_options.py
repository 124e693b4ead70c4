"""The options of the Trainer, and loss scaling: whatever is chosen, the promised zeros are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_trainer import Examples, make_trainer, promised_sparsity, tiny_model
from tiny_models import inputs, layers_of, net
from torch import Tensor, nn

from peft_pst import PSTCallback, PSTConfig, get_sparsity

OPTIONS: list[dict[str, Any]] = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"bf16": True},
    {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    {"max_steps": -1, "num_train_epochs": 0.5},
    {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    {"optim": "sgd", "weight_decay": 0.1, "label_smoothing_factor": 0.1},
    {"neftune_noise_alpha": 5.0, "dataloader_drop_last": True, "per_device_train_batch_size": 7},
    {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "batch_eval_metrics": False},
    {"save_strategy": "steps", "save_steps": 4, "save_only_model": True, "save_total_limit": 1},
    {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "best", "metric_for_best_model": "loss"},
    {"auto_find_batch_size": True, "include_num_input_tokens_seen": "all", "torch_empty_cache_steps": 2},
    {"use_liger_kernel": False, "average_tokens_across_devices": False, "logging_nan_inf_filter": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_every_option_ends_at_the_target(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_model(target_sparsity=0.6)
    trainer = make_trainer(model, tmp_path, PSTCallback(), **options)
    trainer.train()
    assert get_sparsity(model) == promised_sparsity(model, 1, total=1, target=0.6)
    for layer in layers_of(model).values():
        assert int((layer.get_masked_weight() == 0).sum()) == layer.get_num_pruned("default")
    learned = [name for name, parameter in model.named_parameters() if "pst_V" in name and parameter.any()]
    assert len(learned) == len(layers_of(model))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_checkpointing_change_nothing(tmp_path: Path, reentrant: bool) -> None:
    def trained(**options: Any) -> dict[str, Tensor]:
        model = tiny_model()
        make_trainer(model, tmp_path, PSTCallback(), max_steps=3, **options).train()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    plain = trained()
    checkpointed = trained(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, parameter in plain.items():
        assert torch.equal(checkpointed[name], parameter), name


def make_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    config = PSTConfig(target_sparsity=0.5, initial_sparsity=0.5, r=2, score_rank=2, init_weights=False)
    return get_peft_model(net(dtype), config).train()


def step_of(model: nn.Module, autocast: torch.dtype | None, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(inputs()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_loss_scaling_changes_no_step(autocast: torch.dtype | None) -> None:
    """Powers of two scale exactly, as long as nothing underflows."""
    plain = step_of(make_net(torch.float32), autocast, torch.amp.GradScaler("cpu", enabled=False))
    scaled = step_of(make_net(torch.float32), autocast, torch.amp.GradScaler("cpu", init_scale=256.0))
    for name, parameter in plain.items():
        tolerance = {"rtol": 0, "atol": 0} if autocast is None else {"rtol": 1e-2, "atol": 1e-4}
        torch.testing.assert_close(scaled[name], parameter, **tolerance)


def test_a_step_that_overflows_is_skipped_and_the_mask_stays() -> None:
    model = make_net(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    step_of(model, torch.float16, scaler)
    assert scaler.get_scale() < 2.0**127
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_examples_are_learnable(tmp_path: Path) -> None:
    """The runs above train on something: half of the labels is not the answer to all of them."""
    labels = [int(example["labels"]) for example in (Examples(64)[index] for index in range(64))]
    assert 16 < sum(labels) < 48
