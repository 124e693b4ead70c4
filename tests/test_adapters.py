"""Several named adapters on one model: switching, combining, disabling, deleting."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from peft import (
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny_models import (
    activate,
    assert_same_tensors,
    layers_of,
    net,
    outputs,
    pruned_net,
    snapshot,
    train_a_little,
    two_adapters,
)

from peft_pst import PSTConfig
from peft_pst.masking import num_pruned


def test_set_adapter_switches() -> None:
    model = two_adapters()
    results = {}
    for name in "abab":
        model.set_adapter(name)
        result = outputs(model)
        assert torch.equal(results.setdefault(name, result), result)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable
        assert {parameter.rsplit(".", 1)[1] for parameter in trainable} == {name}
    assert not torch.equal(results["a"], results["b"])
    alone = PSTConfig(target_sparsity=0.5, r=2)
    other = get_peft_model(net(), alone)
    state = get_peft_model_state_dict(model, adapter_name="a")
    set_peft_model_state_dict(other, state)
    assert torch.equal(outputs(other.eval()), results["a"])


def test_two_active_adapters_are_zero_where_either_prunes() -> None:
    model = two_adapters()
    activate(model, ["a", "b"])
    active = outputs(model)
    masks = {name: layer.get_mask("a") & layer.get_mask("b") for name, layer in layers_of(model).items()}
    model.merge_adapter(adapter_names=["a", "b"])
    assert torch.equal(outputs(model), active)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.get_base_layer().weight != 0, masks[name])


def test_merging_two_adapters_in_any_order() -> None:
    merged = []
    for steps in ([["a", "b"]], [["b", "a"]], [["a"], ["b"]], [["b"], ["a"]]):
        model = two_adapters()
        activate(model, ["a", "b"])
        dense = snapshot(model)
        for names in steps:
            model.merge_adapter(adapter_names=names)
        merged.append(
            {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers_of(model).items()}
        )
        model.unmerge_adapter()
        assert_same_tensors(snapshot(model), dense)
    for other in merged[1:]:
        for name, weight in merged[0].items():
            assert torch.equal(other[name] == 0, weight == 0)
            torch.testing.assert_close(other[name], weight, rtol=1e-6, atol=1e-6)
    assert_same_tensors(merged[2], merged[0])
    assert_same_tensors(merged[3], merged[1])


def test_merge_and_unload_of_one_of_two() -> None:
    model = two_adapters()
    model.set_adapter("b")
    expected = outputs(model)
    model.set_adapter("a")
    merged = model.merge_and_unload(adapter_names=["b"])
    assert torch.equal(outputs(merged), expected)


def test_two_adapters_against_the_oracle() -> None:
    model = two_adapters()
    activate(model, ["b", "a"])
    for layer in layers_of(model).values():
        weight = layer.get_base_layer().weight.detach()
        adapters = []
        for name in ("b", "a"):
            factors = layer.get_factors(name)
            tensors = dict(zip("UVABRCS", factors.tensors, strict=True))
            adapters.append(oracle.Adapter(**tensors, count=num_pruned(96, 0.5 if name == "a" else 0.6)))
        expected = oracle.effective_weight(weight, adapters)
        torch.testing.assert_close(layer.get_masked_weight(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_adapters_with_different_targets() -> None:
    model = get_peft_model(net(), PSTConfig(target_modules=["up"], target_sparsity=0.5), adapter_name="ups")
    train_a_little(model)
    model.eval()
    ups = outputs(model)
    model.add_adapter("downs", PSTConfig(target_modules=["down"], target_sparsity=0.7, initial_sparsity=0.3))
    assert torch.equal(outputs(model), ups)  # it prunes from the start, but is not active yet
    model.set_adapter("downs")
    train_a_little(model)
    assert model.get_sparsity() == num_pruned(96, 0.7) / 96
    downs = outputs(model)
    activate(model, ["ups", "downs"])
    both = outputs(model)
    assert not torch.equal(both, downs)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(outputs(merged), both)
    zeros = [int((merged.layers[0].get_submodule(name).weight == 0).sum()) for name in ("up", "down")]
    assert zeros == [num_pruned(96, 0.5), num_pruned(96, 0.7)]
    model.delete_adapter("downs")
    model.set_adapter("ups")
    assert torch.equal(outputs(model), ups)


def test_delete_adapter_leaves_nothing_behind() -> None:
    model = two_adapters()
    model.set_adapter("a")
    expected = outputs(model)
    model.delete_adapter("b")
    assert torch.equal(outputs(model), expected)
    assert list(model.peft_config) == ["a"]
    assert not [name for name in model.state_dict() if name.endswith(".b")]
    for layer in layers_of(model).values():
        assert "b" not in layer.pst_plans
    model.add_adapter("b", PSTConfig(r=1, initial_sparsity=0.2))
    model.set_adapter("b")
    assert model.get_sparsity() == num_pruned(96, 0.2) / 96


def test_disable_adapter_is_the_base_bit_for_bit() -> None:
    dense = outputs(net())
    model = pruned_net()
    pruned = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), dense)
    assert torch.equal(outputs(model), pruned)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model), dense)
    assert torch.equal(outputs(model), pruned)


def test_model_and_layer_status() -> None:
    model = two_adapters()
    status = model.get_model_status()
    assert status.adapter_model_type == "PSTModel"
    assert set(status.peft_types.values()) == {"PST"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["b"], [])
    assert status.requires_grad == {"a": False, "b": True}
    assert set(status.available_adapters) == {"a", "b"}
    assert status.num_adapter_layers == 4
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    model.merge_adapter()
    for layer in model.get_layer_status():
        assert layer.module_type == "pst.PSTLinear"
        assert layer.merged_adapters == ["b"]
        assert layer.devices == {"a": ["cpu"], "b": ["cpu"]}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_the_schedule_moves_all_active_adapters_or_none() -> None:
    model = two_adapters()
    activate(model, ["a", "b"])
    model.merge_adapter(["b"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"adapter 'b' cannot change while it is merged; call unmerge_adapter\(\)"):
        model.update_sparsity(5, 10)
    assert_same_tensors(snapshot(model), before)


def test_deleting_the_active_adapter_activates_one_of_the_others_everywhere() -> None:
    model = get_peft_model(net(), PSTConfig(target_modules=["up", "down"]), adapter_name="first")
    model.add_adapter("downs", PSTConfig(target_modules=["down"]))
    model.add_adapter("ups", PSTConfig(target_modules=[r"layers.1.up"]))
    model.delete_adapter("first")
    assert model.active_adapters == ["downs"]
    active = {name: layer.active_adapters for name, layer in layers_of(model).items()}
    assert all(names == ["downs"] for names in active.values())
    outputs(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.endswith(".downs") and "down." in name
    }
    model.delete_adapter("downs")
    assert model.active_adapters == ["ups"]
