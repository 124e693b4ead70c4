"""Masks and masked weights are made once and never stale."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny_models import (
    assert_same_tensors,
    inputs,
    layers_of,
    net,
    outputs,
    pruned_net,
)
from torch import Tensor, nn

import peft_pst
from peft_pst import PSTConfig


def fresh_outputs(model: nn.Module) -> Tensor:
    """The same numbers without any cache: a new model that is given the tensors."""
    config = next(iter(layers_of(model).values())).pst_plans["default"].config
    other = get_peft_model(net(), copy.deepcopy(config)).eval()
    other.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    dtype = next(model.parameters()).dtype
    return outputs(other.to(dtype))


def write_in_place(model: PeftModel) -> None:
    with torch.no_grad():
        model.base_model.model.layers[0].up.pst_V["default"].mul_(-3)


def write_scores(model: PeftModel) -> None:
    with torch.no_grad():
        model.base_model.model.layers[0].up.pst_R["default"].add_(torch.linspace(-5, 5, 12))


def write_base_weight(model: PeftModel) -> None:
    with torch.no_grad():
        model.base_model.model.layers[0].up.get_base_layer().weight.mul_(-2)


def write_count(model: PeftModel) -> None:
    model.base_model.model.layers[0].up.pst_num_pruned["default"].fill_(90)


def replace_data(model: PeftModel) -> None:
    parameter = model.base_model.model.layers[0].up.pst_V["default"]
    parameter.data = parameter.data * -3


def replace_parameter(model: PeftModel) -> None:
    parameters = model.base_model.model.layers[0].up.pst_V
    parameters["default"] = nn.Parameter(parameters["default"].detach() * -3)


def load_state(model: PeftModel) -> None:
    model.load_state_dict({name: -2 * t if "pst_V" in name else t for name, t in model.state_dict().items()})


def load_adapter_state(model: PeftModel) -> None:
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: -2 * t if "pst_V" in name else t for name, t in state.items()})


def optimizer_step(model: PeftModel, **kind: bool) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, **kind)
    model(inputs()).square().sum().backward()
    optimizer.step()


def fused_optimizer_step(model: PeftModel) -> None:
    """The Trainer's default, whose writes autograd's counter does not see."""
    optimizer_step(model, fused=True)


def foreach_optimizer_step(model: PeftModel) -> None:
    optimizer_step(model, foreach=True)


class RawOptimizer(torch.optim.SGD):
    """Writes behind autograd's back, as optimizers with kernels of their own do."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] * parameter.grad


def raw_optimizer_step(model: PeftModel) -> None:
    optimizer = RawOptimizer([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model(inputs()).square().sum().backward()
    optimizer.step()


def move_schedule(model: PeftModel) -> None:
    model.update_sparsity(3, 10)


def change_dtype(model: PeftModel) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def train_in_between(model: PeftModel) -> None:
    model.train()
    optimizer_step(model)
    model.eval()


def write_through_data_in_training(model: PeftModel) -> None:
    """As some optimizers do; autograd's counter of writes does not see it, the step of the schedule tells."""
    model.base_model.model.layers[0].up.pst_V["default"].data.mul_(-3)
    model.update_sparsity(10, 10)


CHANGES = [
    write_in_place,
    write_scores,
    write_base_weight,
    write_count,
    replace_data,
    replace_parameter,
    load_state,
    load_adapter_state,
    optimizer_step,
    fused_optimizer_step,
    foreach_optimizer_step,
    raw_optimizer_step,
    move_schedule,
    change_dtype,
    train_in_between,
    write_through_data_in_training,
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(change: Callable[[PeftModel], None], training: bool) -> None:
    model = pruned_net().train(training)
    before = outputs(model)
    assert torch.equal(before, fresh_outputs(model))
    change(model)
    model.train(training)
    after = outputs(model)
    assert torch.equal(after, fresh_outputs(model))
    assert not torch.equal(after, before)
    graph = model(inputs())
    assert torch.equal(graph, after)


def test_a_deep_copy_is_independent() -> None:
    model = pruned_net()
    before = outputs(model)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    write_in_place(twin)
    twin.update_sparsity(4, 10)
    assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(twin), fresh_outputs(twin))
    write_scores(model)
    assert torch.equal(outputs(model), fresh_outputs(model))


def test_a_deep_copy_of_a_merged_model_unmerges() -> None:
    model = pruned_net()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same_tensors(twin.unload().state_dict(), net().state_dict())
    assert model.base_model.model.layers[0].up.merged


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a mask was selected, and how often a masked weight was made."""
    counter: Counter[str] = Counter()

    def count(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*arguments: object, **options: object) -> Tensor:
            counter[name] += 1
            return original(*arguments, **options)

        return counting

    for name in ("select_adapter_mask", "effective_weight"):
        monkeypatch.setattr(peft_pst.layer, name, count(name, getattr(peft_pst.layer, name)))
    return counter


def test_evaluation_ranks_once(calls: Counter[str]) -> None:
    model = pruned_net()
    for _ in range(3):
        outputs(model)
    assert calls == {"select_adapter_mask": 4, "effective_weight": 4}  # one for each layer
    model.train()
    model.eval()
    outputs(model)
    model.merge_adapter()
    outputs(model)
    assert calls["select_adapter_mask"] == 4


def test_training_ranks_once_a_step(calls: Counter[str]) -> None:
    model = get_peft_model(net(), PSTConfig(total_steps=10)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        for _ in range(3):  # micro-batches
            model(inputs()).sum().backward()
        optimizer.step()
        model.update_sparsity(step)
        assert calls["select_adapter_mask"] == 4 * step


def test_dropped_models_are_freed() -> None:
    model = pruned_net()
    outputs(model)
    reference = weakref.ref(model.base_model.model.layers[0].up)
    del model
    gc.collect()
    assert reference() is None


def test_a_copy_and_a_pickle_leave_behind_what_can_be_made_again() -> None:
    model = pruned_net().eval()
    expected = outputs(model)
    layer = model.base_model.model.layers[0].up
    assert layer._masks
    assert layer._masked_weight is not None
    twin = copy.deepcopy(model)
    copied = twin.base_model.model.layers[0].up
    assert not copied._masks
    assert copied._masked_weight is None
    assert torch.equal(outputs(twin), expected)
