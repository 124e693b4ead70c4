"""Pruning at once: which weights, that the masks stay through training, saving and merging, and DSEE's stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_models import (
    NEVER_PRUNED,
    assert_same_tensors,
    inputs,
    layers_of,
    masks,
    net,
    outputs,
    shake,
    tiny_bert,
    tiny_gpt2,
)
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, get_sparsity, prune_once, update_sparsity
from peft_pst.masking import num_pruned


def dense_net(**options: object) -> PeftModel:
    """After a dense stage: every trainable tensor has moved."""
    model = get_peft_model(net(), PSTConfig.dsee(**{"r": 2, "residual": 5, **options}))
    shake(model, 0)
    return model


def written_out(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The base weight and its update, (out, in), from the tensors and the formula."""
    weight = layer.get_base_layer().weight.detach()
    update = layer.pst_U["default"].detach() @ layer.pst_V["default"].detach()
    for position, value in zip(layer.pst_positions["default"], layer.pst_S["default"], strict=True):
        update.view(-1)[position] += value.detach()
    return weight, update


# Which weights


def test_the_presets_setting() -> None:
    config = PSTConfig.dsee(task_type="SEQ_CLS", residual_positions="magnitude")
    setting = (0.0, 0.0, 16, 64, "magnitude", 0, False, None, 0.5, 0.5, True, "SEQ_CLS")
    names = "target_sparsity initial_sparsity r residual residual_positions score_rank structured mask_interval"
    names += " warmup_ratio cooldown_ratio init_weights task_type"
    assert tuple(getattr(config, name) for name in names.split()) == setting


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("by", ["scores", "weights", "update"])
def test_the_largest_stay(by: str, sparsity: float) -> None:
    model = dense_net()
    count = num_pruned(96, sparsity)
    assert prune_once(model, sparsity, by=by) == count / 96 == get_sparsity(model)
    for layer in layers_of(model).values():
        weight, update = written_out(layer)
        importance = {"scores": weight + update, "weights": weight, "update": update}[by].abs()
        keep, mask = importance.flatten().topk(96 - count).indices, layer.get_mask("default")
        assert set(keep.tolist()) == set(mask.flatten().nonzero().squeeze(1).tolist())
        expected = (weight + update) * mask
        torch.testing.assert_close(layer.get_masked_weight(), expected, rtol=1e-6, atol=1e-6)


def test_ties_and_a_half_precision_base() -> None:
    model = get_peft_model(net(torch.bfloat16), PSTConfig.dsee(r=2, residual=5))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.get_base_layer().weight.fill_(0.5)
    prune_once(model, 0.25, by="weights")
    for layer in layers_of(model).values():
        assert layer.get_mask("default").flatten().tolist() == [False] * 24 + [True] * 72


def test_conv1d() -> None:
    model = get_peft_model(tiny_gpt2(), PSTConfig.dsee(r=2, residual=5))
    prune_once(model, 0.5, by="weights")
    for layer in layers_of(model).values():
        weight = layer.get_base_layer().weight.detach().T.abs()
        assert weight[layer.get_mask("default")].min() >= weight[~layer.get_mask("default")].max()


def test_pruning_further_and_back() -> None:
    model = dense_net()
    assert [round(prune_once(model, sparsity), 2) for sparsity in (0.5, 0.75, 0.25, 0.0)] == [0.5, 0.75, 0.25, 0.0]
    assert torch.cat([mask.flatten() for mask in masks(model).values()]).all()


# Held


def test_nothing_moves_the_mask_but_a_schedule_that_asks_for_more() -> None:
    model = dense_net(target_sparsity=0.6, warmup_ratio=0.1, cooldown_ratio=0.1)
    prune_once(model, 0.4)
    held = masks(model)
    sparsities = []
    for step in range(11):
        shake(model, step)
        sparsities.append(update_sparsity(model, step, 10))
        if sparsities[-1] == sparsities[0]:
            assert_same_tensors(masks(model), held)
    assert sparsities[0] == num_pruned(96, 0.4) / 96
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == num_pruned(96, 0.6) / 96


def test_a_new_run_over_the_same_schedule_holds_what_was_pruned() -> None:
    model = dense_net(target_sparsity=0.5)
    assert [update_sparsity(model, step, 10) for step in (0, 4, 5, 10)] == [0.0, 0.0, 0.5, 0.5]
    held = masks(model)
    for step in range(11):
        shake(model, step)
        assert update_sparsity(model, step, 10) == 0.5
    assert_same_tensors(masks(model), held)


def test_pruned_weights_stay_zero_and_the_others_train() -> None:
    model = dense_net()
    prune_once(model, 0.5)
    before = {name: layer.get_masked_weight() for name, layer in layers_of(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in layers_of(model).items():
        after = layer.get_masked_weight()
        assert torch.equal(after == 0, before[name] == 0)
        assert int((after != before[name]).sum()) == 48


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_loaded_and_merged_masks_are_the_ones_in_force(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = dense_net()
    prune_once(model, 0.5, by="update")
    shake(model, 1)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same_tensors(masks(loaded), masks(model))
    assert torch.equal(outputs(loaded), outputs(model))
    pruned = loaded.merge_and_unload(safe_merge=True)
    assert torch.equal(outputs(pruned), outputs(model))
    zeros = [int((layer.weight == 0).sum()) for block in pruned.layers for layer in (block.up, block.down)]
    assert zeros == [48] * 4


class Sentences(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 40, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids[0] % 3}


@pytest.mark.parametrize("callbacks", [[], [PSTCallback()]], ids=["no callback", "callback"])
def test_dense_stage_prune_retrain(tmp_path: Path, callbacks: list[PSTCallback]) -> None:
    model = get_peft_model(tiny_bert(), PSTConfig.dsee(task_type="SEQ_CLS", r=2, residual=5))

    def train(folder: str) -> None:
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=4, learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True
        )
        Trainer(model, args, train_dataset=Sentences(), callbacks=callbacks).train()

    train("dense")
    assert get_sparsity(model) == 0.0
    prune_once(model, 0.2)
    held, state = masks(model), get_peft_model_state_dict(model)
    state = {name: tensor.clone() for name, tensor in state.items()}
    train("retrain")
    assert_same_tensors(masks(model), held)
    moved = {name.rsplit(".", 1)[1] for name, t in get_peft_model_state_dict(model).items() if not t.equal(state[name])}
    assert moved >= {"pst_U", "pst_V", "pst_S"}
    assert not moved & {"pst_mask", "pst_num_pruned", "pst_positions"}


def test_both_stages_as_one_run(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), PSTConfig.dsee(task_type="SEQ_CLS", target_sparsity=0.5, r=2, residual=5))
    args = TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    trainer = Trainer(model, args, train_dataset=Sentences(), callbacks=[PSTCallback()])
    trainer.train()
    assert [log["sparsity"] for log in trainer.state.log_history if "loss" in log] == [0.0, 0.0, 0.5, 0.5, 0.5, 0.5]


def test_no_complaint_that_the_schedule_never_moved(recwarn: pytest.WarningsRecorder) -> None:
    model = dense_net(target_sparsity=0.5)
    prune_once(model, 0.5)
    outputs(model.eval())
    assert not any(NEVER_PRUNED in str(warning.message) for warning in recwarn)


# A mask made elsewhere


def test_set_mask() -> None:
    model = dense_net()
    layer = model.base_model.model.layers[0].up
    keep = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)) > 0.3
    before = outputs(model.eval())
    layer.set_mask("default", keep)
    assert torch.equal(layer.get_mask("default"), keep)
    assert layer.get_num_pruned("default") == int((~keep).sum()) == int(layer.pst_num_pruned["default"])
    assert not torch.equal(outputs(model), before)
    assert torch.equal(layer.get_masked_weight() != 0, keep)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            torch.ones(8, 12, dtype=torch.bool),
            r"the mask is torch\.bool of shape \(8, 12\); pass a boolean one of shape \(12, 8\), \(out, in\)",
        ),
        (torch.ones(12, 8), r"the mask is torch\.float32 of shape \(12, 8\); pass a boolean one"),
        (torch.zeros(12, 8, dtype=torch.bool), r"the mask keeps none of 96 weights; keep at least one"),
    ],
    ids=["transposed", "float", "empty"],
)
def test_masks_of_another_kind_are_refused(keep: Tensor, message: str) -> None:
    model = dense_net()
    with pytest.raises(ValueError, match=rf"Layer layers\.0\.up: {message}"):
        model.base_model.model.layers[0].up.set_mask("default", keep)
    assert get_sparsity(model) == 0.0


@pytest.mark.parametrize("interval", [1, 5])
def test_where_a_mask_would_not_stay_it_is_refused(interval: int) -> None:
    model = dense_net(mask_interval=interval)
    message = rf"Layer layers\.0\.up: with mask_interval={interval}, adapter 'default' selects its mask anew.*None"
    with pytest.raises(ValueError, match=message):
        prune_once(model, 0.5)


def test_a_merged_adapter_is_refused() -> None:
    model = dense_net()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="cannot change while it is merged"):
        prune_once(model, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 is outside \[0, 1\)"),
        ({"sparsity": 0.5, "by": "magnitude"}, r'by=\'magnitude\' is none of "scores", "weights" and "update"'),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_once(dense_net(), **arguments)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no active PST adapter"):
        prune_once(net(), 0.5)
