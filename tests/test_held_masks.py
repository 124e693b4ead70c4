"""Masks that are held from step to step: when they are selected, and that they are state of the adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_tensors, inputs, layers_of, masks, net, outputs, shake
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, cubic_sparsity, topk_mask, update_sparsity
from peft_pst.masking import num_pruned
from peft_pst.scoring import importance_scores, updated_weight

OPTIONS = {"target_sparsity": 0.6, "r": 2, "score_rank": 3}


def held_net(interval: int | None, **options: object) -> PeftModel:
    return get_peft_model(net(), PSTConfig(**{**OPTIONS, "mask_interval": interval, **options}))


def selected_now(model: nn.Module) -> dict[str, Tensor]:
    """What the scores would select, by the pure functions alone."""
    result = {}
    for name, layer in layers_of(model).items():
        factors = layer.get_factors("default")
        scores = importance_scores(updated_weight(layer.get_base_layer().weight, factors), factors).detach()
        result[name] = topk_mask(scores, (layer.get_num_pruned("default") + 0.5) / scores.numel())
    return result


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@given(interval=st.integers(1, 12), total=st.integers(1, 40), cooldown=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_masks_are_selected_at_multiples_of_the_interval_and_when_the_target_is_reached(interval, total, cooldown):
    options = {"warmup_ratio": 0.0, "cooldown_ratio": cooldown}
    model = held_net(interval, **options)
    schedule = {"target_sparsity": 0.6, **options}
    held, pruned = masks(model), 0
    for step in range(total + 1):
        shake(model, step)
        update_sparsity(model, step, total)
        sparsity = cubic_sparsity(step, total, **schedule)
        count = num_pruned(96, sparsity)  # all four layers have 96 weights
        if step % interval == 0 or (sparsity == 0.6 and count != pruned):
            pruned, held = count, selected_now(model)
        assert {layer.get_num_pruned("default") for layer in layers_of(model).values()} == {pruned}
        assert same(masks(model), held), step
    assert pruned == num_pruned(96, 0.6)


def test_an_interval_of_none_holds_the_mask_while_the_sparsity_stays():
    model = held_net(None, initial_sparsity=0.6)
    start = masks(model)
    assert same(start, selected_now(model)), "held from the moment the adapter exists"
    for step in range(11):
        shake(model, step)
        update_sparsity(model, step, 10)
    assert same(masks(model), start)
    assert not same(selected_now(model), start), "the scores have moved, or this test shows nothing"


def test_setting_a_sparsity_selects_anew():
    model = held_net(None, initial_sparsity=0.6)
    shake(model, 0)
    for layer in layers_of(model).values():
        layer.set_sparsity("default", 0.6)
    assert same(masks(model), selected_now(model))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_forward_and_the_merge_use_the_held_mask(grad, training):
    model = held_net(5)
    update_sparsity(model, 10, 10)
    held = masks(model)
    shake(model, 1)
    model.train(training)
    reference = copy.deepcopy(net())
    for name, layer in layers_of(model).items():
        factors = layer.get_factors("default")
        weight = updated_weight(layer.get_base_layer().weight, factors) * held[name]
        reference.get_submodule(name.removeprefix("base_model.model.")).weight.data = weight.detach()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(inputs()), reference(inputs()))
    merged = model.merge_and_unload()
    assert_same_tensors(
        {name: p == 0 for name, p in merged.named_parameters() if "weight" in name},
        {name: p == 0 for name, p in reference.named_parameters() if "weight" in name},
    )


def test_a_held_mask_is_not_selected_again():
    model = held_net(5)
    update_sparsity(model, 10, 10)
    for layer in layers_of(model).values():
        layer._select = None  # calling it would fail
    shake(model, 1)
    model.train()(inputs()).sum().backward()
    outputs(model.eval())
    update_sparsity(model, 11, 10)


def reload_from_file(model: PeftModel, folder: Path, **options: object) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(net(), folder, **options)


def reload_state(model: PeftModel, folder: Path) -> PeftModel:
    other = get_peft_model(net(), copy.deepcopy(model.peft_config["default"]))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    return other


@pytest.mark.parametrize(
    "reload",
    [reload_from_file, lambda m, f: reload_from_file(m, f, low_cpu_mem_usage=True), reload_state, copy.deepcopy],
    ids=["file", "low_cpu_mem_usage", "state", "copy"],
)
def test_a_held_mask_survives(reload: Callable[..., PeftModel], tmp_path):
    model = held_net(5)
    update_sparsity(model, 5, 10)
    shake(model, 1)
    assert not same(selected_now(model), masks(model))
    other = reload(model, tmp_path) if reload is not copy.deepcopy else copy.deepcopy(model)
    assert same(masks(other), masks(model))
    assert torch.equal(outputs(other.eval()), outputs(model.eval()))


def test_the_state_holds_one_bit_a_weight_and_only_where_masks_are_held():
    state = get_peft_model_state_dict(held_net(2))
    packed = {name: tensor for name, tensor in state.items() if "pst_mask" in name}
    assert {(t.dtype, t.numel()) for t in packed.values()} == {(torch.uint8, 12)}
    assert len(packed) == 4
    assert not any("pst_mask" in name for name in get_peft_model_state_dict(held_net(1)))


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_mask_that_contradicts_the_count_is_refused(damage, tmp_path):
    model = held_net(5)
    update_sparsity(model, 10, 10)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("layers.1.up.pst_mask"))
    if damage == "missing":
        del state[key]
    else:
        state[key][0] ^= 1
    save_file(state, file)
    problem = {"flipped": r"pst_mask prunes \d+ weights, but", "missing": "pst_mask is missing"}[damage]
    with pytest.raises(ValueError, match=rf"layers\.1\.up, adapter 'default': {problem}"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_a_refused_selection_changes_nothing():
    model = held_net(2)
    update_sparsity(model, 4, 10)
    before, sparsity = masks(model), model.get_sparsity()
    weight = model.base_model.model.layers[1].down.get_base_layer().weight
    kept = weight.data.clone()
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.down.*NaN"):
        update_sparsity(model, 6, 10)
    weight.data.copy_(kept)
    assert model.get_sparsity() == sparsity
    assert same(masks(model), before)
    update_sparsity(model, 6, 10)
    assert model.get_sparsity() > sparsity


@pytest.mark.parametrize("interval", [1, 5])
def test_a_backward_uses_the_mask_of_its_forward(interval):
    gradients = []
    for moves in (False, True):
        model = held_net(interval).train()
        update_sparsity(model, 5, 10)
        shake(model, 0)
        loss = model(inputs()).square().sum()
        if moves:
            update_sparsity(model, 10, 10)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same_tensors(*gradients)


def test_adding_the_adapter_anew_leaves_nothing_of_the_old_one():
    model = held_net(5)
    layer = model.base_model.model.layers[0].up
    layer.update_layer("default", PSTConfig(r=0, target_sparsity=0.5), layer.pst_plans["default"].status)
    assert "default" not in layer.pst_mask
    assert "default" not in layer.pst_U
    assert layer.get_factors("default").U is None


def test_deleting_an_adapter_deletes_its_mask():
    model = held_net(5)
    model.add_adapter("other", PSTConfig(**OPTIONS, mask_interval=None))
    model.delete_adapter("other")
    assert all(set(layer.pst_mask) == {"default"} for layer in layers_of(model).values())


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_what_is_no_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"mask_interval=.* is not a number of steps; pass an integer of at least 1"):
        PSTConfig(mask_interval=value)


class Rows(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(32, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.x[index][:3] > 0}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": (logits - labels.float()).square().mean(), "logits": logits}


def trainer(model: nn.Module, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=10,
        save_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[PSTCallback()])


def test_a_run_resumed_between_two_selections_ends_as_the_uninterrupted_one(tmp_path):
    def fresh() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(Regression(), PSTConfig(**OPTIONS, mask_interval=3))

    whole = fresh()
    trainer(whole, tmp_path / "whole").train()
    resumed = fresh()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_tensors(get_peft_model_state_dict(resumed), get_peft_model_state_dict(whole))
    assert same(masks(resumed), masks(whole))
