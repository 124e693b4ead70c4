"""The sparse residual: where it stands, that it stays sparse, and its way through PEFT's doors."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import (
    activate,
    assert_same_tensors,
    inputs,
    layers_of,
    logits,
    net,
    outputs,
    pruned_net,
    tiny_gpt2,
    train_a_little,
)
from torch import Tensor, nn

import peft_pst.layer
from peft_pst import PSTConfig, PSTLayer, create_pst_optimizer, parameter_groups, report_model
from peft_pst.grebsmo import grebsmo
from peft_pst.residual import check_positions, residual_positions

UP = "base_model.model.layers.0.up"


def dense_residual(layer: PSTLayer, name: str = "default") -> Tensor:
    """The residual written out entry by entry, (out, in)."""
    dense = torch.zeros(layer.out_features, layer.in_features)
    for position, value in zip(layer.pst_positions[name].tolist(), layer.pst_S[name].tolist(), strict=True):
        dense[position // layer.in_features, position % layer.in_features] = value
    return dense


# Where it stands


@pytest.mark.parametrize("method", ["grebsmo", "magnitude", "random"])
@pytest.mark.parametrize("count", [1, 7, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_positions_are_ascending_distinct_and_as_many_as_asked_for(method: str, count: int, dtype: torch.dtype) -> None:
    positions = residual_positions(torch.randn(12, 8).to(dtype), count, method, rank=3)
    assert positions.dtype == torch.int64
    assert positions.shape == (count,)
    check_positions(positions, 96)


def test_by_magnitude() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    expected = sorted(range(600), key=lambda i: weight.flatten()[i].abs())[-50:]
    assert residual_positions(weight, 50, "magnitude", rank=0).tolist() == sorted(expected)


def test_by_grebsmo_where_a_low_rank_update_cannot_reach() -> None:
    """Spikes in a smooth matrix, all of them smaller than its largest weights."""
    smooth = 10 * torch.outer(torch.linspace(1, 2, 40), torch.linspace(1, 2, 30))
    spikes = torch.randperm(1200, generator=torch.Generator().manual_seed(0))[:20].sort().values
    weight = smooth.flatten().index_add(0, spikes, torch.full((20,), 5.0)).reshape(40, 30)
    assert torch.equal(residual_positions(weight, 20, "grebsmo", rank=2), spikes)
    by_magnitude = residual_positions(weight, 20, "magnitude", rank=2)
    assert len(set(by_magnitude.tolist()) & set(spikes.tolist())) < 5


def test_by_grebsmo_is_the_support_of_the_sparse_part() -> None:
    weight = torch.randn(24, 16)
    sparse = grebsmo(weight, 4, 1 - 10 / 384, generator=torch.Generator().manual_seed(0)).sparse
    assert torch.equal(residual_positions(weight, 10, "grebsmo", rank=4), sparse.flatten().nonzero().squeeze(1))
    # No rank for a low-rank part: what remains is the weight itself.
    assert torch.equal(*(residual_positions(weight, 10, method, rank=0) for method in ("grebsmo", "magnitude")))


def test_at_random_follows_the_seed_and_covers_the_matrix() -> None:
    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return residual_positions(torch.zeros(10, 10), 20, "random", rank=0).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert set().union(*(draw(seed) for seed in range(60))) == set(range(100))


def test_neither_grebsmo_nor_magnitude_touch_the_global_generator() -> None:
    weight = torch.randn(12, 8)
    state = torch.get_rng_state()
    for method in ("grebsmo", "magnitude"):
        residual_positions(weight, 5, method, rank=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_ties_in_half_precision_are_settled_by_position() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    assert residual_positions(weight, 3, "magnitude", rank=0).tolist() == [13, 14, 15]


def test_positions_of_a_conv1d_are_out_by_in() -> None:
    base = tiny_gpt2()
    weight = base.transformer.h[0].mlp.c_fc.weight.detach()  # (in, out)
    model = get_peft_model(base, PSTConfig(residual=6, residual_positions="magnitude"))
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    expected = weight.T.abs().flatten().topk(6).indices.sort().values
    assert torch.equal(layer.pst_positions["default"], expected)


def test_more_entries_than_weights_are_refused() -> None:
    message = r"Layer layers\.0\.up: residual=97 is above 96, the most for a matrix of 12 x 8"
    with pytest.raises(ValueError, match=message):
        get_peft_model(net(), PSTConfig(residual=97))


def test_a_nan_in_the_base_is_refused_with_the_layers_name() -> None:
    base = net()
    with torch.no_grad():
        base.layers[1].up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Layer layers\.1\.up, adapter 'default': The scores hold a NaN"):
        get_peft_model(base, PSTConfig(residual=4))


def test_pattern() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PSTConfig(residual=3, residual_pattern={"down": 0, "layers.1.up": 9})
        model = get_peft_model(net(), config)
    sizes = {
        name.removeprefix("base_model.model.layers."): [len(part) for part in (*layer.pst_S.values(),)]
        for name, layer in layers_of(model).items()
    }
    assert sizes == {"0.up": [3], "0.down": [], "1.up": [9], "1.down": []}
    assert not layers_of(model)["base_model.model.layers.0.down"].pst_positions


# In the adapter


def test_it_changes_nothing_but_its_own_tensors_at_the_start() -> None:
    torch.manual_seed(3)
    plain = get_peft_model(net(), PSTConfig())
    torch.manual_seed(3)
    model = get_peft_model(net(), PSTConfig(residual=5))
    expected, state = get_peft_model_state_dict(plain), get_peft_model_state_dict(model)
    assert_same_tensors({name: state[name] for name in expected}, expected)
    added = {name: tensor for name, tensor in state.items() if name not in expected}
    assert {name.rsplit(".", 1)[1] for name in added} == {"pst_S", "pst_positions"}
    assert {tuple(tensor.shape) for tensor in added.values()} == {(5,)}
    assert not any(tensor.any() for name, tensor in added.items() if name.endswith("pst_S"))
    x = inputs()
    assert torch.equal(model.train()(x), plain.train()(x))


def test_without_init_weights_it_is_not_zero() -> None:
    options = {"r": 0, "score_rank": 0, "structured": False, "init_weights": False}
    model = get_peft_model(net(), PSTConfig(residual=5, **options))
    assert all(layer.pst_S["default"].all() for layer in layers_of(model).values())
    assert model.get_sparsity() == 0.0


@pytest.mark.parametrize("options", [{}, {"r": 0}, {"r": 0, "score_rank": 0, "structured": False}], ids=str)
def test_the_weight_in_force_holds_it(options: dict[str, object]) -> None:
    model = pruned_net(residual=9, **options)
    for layer in layers_of(model).values():
        factors = layer.get_factors("default")
        low_rank = 0 if factors.U is None else factors.U @ factors.V
        dense = layer.get_base_layer().weight + low_rank + dense_residual(layer)
        assert (dense_residual(layer) != 0).sum() == 9
        torch.testing.assert_close(layer.get_masked_weight(), dense * layer.get_mask("default"), rtol=1e-6, atol=1e-6)


def test_it_learns_what_a_sparse_change_of_the_weight_asks_for() -> None:
    """By itself, dense: gradient descent finds the planted values exactly, and moves nothing else."""
    torch.manual_seed(0)
    config = PSTConfig(target_modules=["0"], target_sparsity=0, r=0, score_rank=0, structured=False, residual=6)
    base = nn.Sequential(nn.Linear(8, 12, bias=False))
    weight = base[0].weight.detach().clone()
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    planted = torch.zeros(96).index_add(0, layer.pst_positions["default"], torch.arange(1.0, 7.0) / 5).reshape(12, 8)
    optimizer = torch.optim.SGD([layer.pst_S["default"]], lr=2.0)
    x = torch.eye(8)
    for _ in range(50):
        # The straight-through term G |W| scales the step of every entry, and leaves the minimum where it is.
        (0.1 * (model(x) - x @ (weight + planted).T).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dense_residual(layer), planted, rtol=1e-3, atol=1e-3)


def test_nothing_of_the_layers_size_in_state_gradient_or_optimizer() -> None:
    model = get_peft_model(net(), PSTConfig(residual=5, r=1, score_rank=1))
    optimizer = create_pst_optimizer(model, torch.optim.AdamW, lr=1e-2)
    model(inputs()).sum().backward()
    optimizer.step()
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += get_peft_model_state_dict(model).values()
    assert max(tensor.numel() for tensor in tensors) == 12
    assert not any(tensor.is_sparse for tensor in tensors)


def test_it_is_a_weight_and_not_a_score_to_the_optimizer() -> None:
    model = get_peft_model(net(), PSTConfig(residual=5))
    groups = {group["name"]: group["params"] for group in parameter_groups(model, lr=1e-3, score_lr=1e-2)}
    residuals = {id(layer.pst_S["default"]) for layer in layers_of(model).values()}
    assert residuals <= {id(parameter) for parameter in groups["weight_update"]}
    assert len(groups["weight_update"]) == 3 * 4


def test_the_report_counts_its_values_and_not_its_positions() -> None:
    with_it, without = (report_model(pruned_net(residual=n)).trainable_parameters for n in (5, 0))
    assert with_it - without == 4 * 5


@pytest.mark.parametrize("make", [net, tiny_gpt2])
def test_merging_is_exact(make: type) -> None:
    model = train_a_little(get_peft_model(make(), PSTConfig(target_sparsity=0.6, residual=9))).eval()
    answer = outputs if make is net else logits
    expected = answer(model)
    dense = {name: layer.get_base_layer().weight.clone() for name, layer in layers_of(model).items()}
    model.merge_adapter(safe_merge=True)
    assert torch.equal(answer(model), expected)
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, dense[name]) for name, layer in layers_of(model).items())
    assert torch.equal(answer(model.merge_and_unload()), expected)


def test_several_adapters_add_up() -> None:
    model = get_peft_model(net(), PSTConfig(target_sparsity=0, residual=9), adapter_name="a")
    model.add_adapter("b", PSTConfig(target_sparsity=0, residual=12, residual_positions="random", r=0))
    model.add_adapter("c", PSTConfig(target_sparsity=0))
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        train_a_little(model, seed=seed)
    activate(model, ["a", "b", "c"])
    for layer in layers_of(model).values():
        expected = layer.get_base_layer().weight + dense_residual(layer, "a") + dense_residual(layer, "b")
        expected = expected + sum(layer.pst_U[name] @ layer.pst_V[name] for name in "ac")
        torch.testing.assert_close(layer.get_masked_weight(), expected, rtol=1e-6, atol=1e-6)
    answer = outputs(model)
    model.delete_adapter("c")
    model.delete_adapter("a")
    model.set_adapter("b")
    assert not torch.equal(outputs(model), answer)
    assert all([*layer.pst_positions.keys()] == ["b"] for layer in layers_of(model).values())


def test_moving_a_position_moves_the_weight() -> None:
    """What was selected and kept is made anew."""
    model = pruned_net(residual=3)
    before = outputs(model)
    layer = model.base_model.model.layers[0].up
    layer.pst_positions["default"].copy_(torch.tensor([90, 91, 92]))
    assert not torch.equal(outputs(model), before)
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))


# Saving and loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("method", ["grebsmo", "random"])
def test_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, low_cpu_mem_usage: bool) -> None:
    model = pruned_net(residual=5, residual_positions=method)
    model.save_pretrained(tmp_path)
    # Nothing is looked for that the file brings along.
    monkeypatch.setattr(peft_pst.layer, "residual_positions", lambda *args, **kwargs: pytest.fail("chosen again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or unexpected keys would warn
        loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(outputs(loaded), outputs(model))
    loaded.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(outputs(loaded), outputs(model))


def test_load_to_train_on(tmp_path: Path) -> None:
    model = pruned_net(residual=5, residual_positions="random")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert_same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    loaded(inputs()).sum().backward()
    assert all(layer.pst_S["default"].grad.all() for layer in layers_of(loaded).values())


def test_positions_survive_a_change_of_dtype() -> None:
    model = get_peft_model(net(), PSTConfig(residual=5))
    before = {name: layer.pst_positions["default"].clone() for name, layer in layers_of(model).items()}
    model.to(torch.bfloat16)
    after = {name: layer.pst_positions["default"] for name, layer in layers_of(model).items()}
    assert_same_tensors(after, before)


@pytest.mark.parametrize(
    ("positions", "problem"),
    [
        ([1, 2, 3, 4, 96], r"pst_positions=96 is outside \[0, 96\), the number of weights\."),
        ([-1, 2, 3, 4, 5], r"pst_positions=-1 is outside \[0, 96\), the number of weights\."),
        ([1, 2, 3, 3, 5], r"pst_positions is not strictly ascending; entry 3 is 3, after 3\."),
        ([1, 2, 9, 3, 5], r"pst_positions is not strictly ascending; entry 3 is 3, after 9\."),
    ],
    ids=str,
)
def test_damaged_positions_are_refused(positions: list[int], problem: str) -> None:
    model = pruned_net(residual=5)
    state = get_peft_model_state_dict(model)
    state[f"{UP}.pst_positions"] = torch.tensor(positions)
    message = rf"Layer layers\.0\.up, adapter 'default': {problem} The adapter file is damaged or belongs to"
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, state)
    model.load_state_dict({f"{name}.default": tensor for name, tensor in state.items()}, strict=False)
    for use in (outputs, lambda model: model.merge_adapter(), report_model):
        with pytest.raises(ValueError, match=message):
            use(model)


def test_another_number_of_positions_is_refused(tmp_path: Path) -> None:
    model = pruned_net(residual=5)
    state = get_peft_model_state_dict(model)
    state[f"{UP}.pst_positions"] = torch.arange(4)
    with pytest.raises(ValueError, match=r"Layer layers\.0\.up.*pst_positions has shape \(4,\)"):
        set_peft_model_state_dict(model, state)


def test_a_residual_without_its_positions_is_refused() -> None:
    model = pruned_net(residual=5)
    state = get_peft_model_state_dict(model)
    del state[f"{UP}.pst_positions"]
    message = (
        r"lack pst_positions, the places of the residual pst_S, for 1 layers, such as .*layers\.0\.up; which weights"
    )
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, state)
