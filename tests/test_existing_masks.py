"""Bases that were pruned before: what is zero stays zero through training, extension, saving and merging."""

from __future__ import annotations

import copy
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from tiny_models import Net, inputs, layers_of, masks, net, outputs, shake, tiny_bert, tiny_gpt2, train_a_little
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, blocks, prune_heads, prune_once, report_model, selection, update_sparsity
from peft_pst.masking import num_pruned, pack_mask, unpack_mask
from peft_pst.scoring import Factors, rank_zeros_lowest
from peft_pst.selection import select_unstructured


def wanda(weight: Tensor, sparsity: float = 0.5, seed: int = 0) -> Tensor:
    """What Wanda leaves: in every row, the largest |weight| times the norm of the input's feature."""
    norms = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.5
    importance = weight.abs().float() * norms
    lowest = importance.argsort(dim=1)[:, : int(weight.shape[1] * sparsity)]
    return weight.scatter(1, lowest, 0.0)


def prune_base(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    """Prune every matrix inside the numbered blocks, as Wanda does."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and any(part.isdigit() for part in name.split(".")):
            parameter.data = wanda(parameter.data, sparsity)
    return model


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter == 0
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and any(part.isdigit() for part in name.split("."))
    }


def adapted(base: nn.Module, **options: object) -> PeftModel:
    return get_peft_model(base, PSTConfig(**{"r": 2, "score_rank": 2, "keep_zeros": True, **options}))


# The selection


def expected_mask(weight: Tensor, factors: Factors, count: int) -> Tensor:
    """Zeros of the base first, then by the oracle's scores, earlier positions first."""
    adapter = oracle.Adapter(**factors._asdict())
    order = sorted(
        range(weight.numel()),
        key=lambda i: (weight.flatten()[i].item() != 0, oracle.scores(weight, adapter).flatten()[i].item(), i),
    )
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[order[:count]] = False
    return keep.reshape(weight.shape)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9)),
    zeros=st.floats(0, 0.9),
    share=st.floats(0, 1),
    large=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_zeros_of_the_base_are_pruned_before_everything_else(shape, zeros, share, large, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-4, 5, shape, generator=generator).float()
    weight[torch.rand(shape, generator=generator) < zeros] = 0.0
    # Whole numbers, whose sums have nothing to round. The zeros of the base would score high.
    draw = lambda *size: torch.randint(-3, 4, size, generator=generator).float()  # noqa: E731
    factors = Factors(U=draw(shape[0], 1), V=9 * draw(1, shape[1]), R=draw(shape[0]), C=draw(shape[1]))
    zero_count = int((weight == 0).sum())
    count = zero_count + round(share * (weight.numel() - zero_count))
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(blocks, "LARGE_NUMEL", 0)
            patch.setattr(selection, "CACHE_NUMEL", 20)
            patch.setattr(selection, "_SAMPLE", 4)
            patch.setattr(selection, "_MOST_INSIDE", 1)
        packed = select_unstructured(weight, factors, count, keep_zeros=True)
    assert torch.equal(unpack_mask(packed, weight.shape), expected_mask(weight, factors, count))


def test_even_what_scores_minus_infinity_is_kept_before_a_zero():
    scores = torch.tensor([-torch.inf, 3.0, -1e30, torch.inf])
    ranked = rank_zeros_lowest(scores, torch.tensor([1.0, 0.0, -0.0, 2.0]))
    assert ranked.argsort(stable=True).tolist() == [1, 2, 0, 3]
    assert ranked[0] > -torch.inf


def test_a_nan_is_still_refused():
    weight = torch.tensor([[0.0, float("nan"), 1.0, 2.0]])
    with pytest.raises(ValueError, match="NaN"):
        select_unstructured(weight, Factors(), 2, keep_zeros=True)


def test_a_held_mask_needs_no_scores(monkeypatch):
    monkeypatch.setattr(selection, "base_scores", None)  # calling it would fail
    weight = torch.tensor([[0.0, 3.0, -0.0, 1.0]])
    assert torch.equal(select_unstructured(weight, Factors(), 2, keep_zeros=True), pack_mask(weight != 0))


# Training


def fine_tune(model: nn.Module, folder: Path, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (16, 6), generator=generator)
    rows = [{"input_ids": row, "labels": int(row[0] > 20)} for row in ids]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[PSTCallback()]).train()


@pytest.mark.parametrize("target", [0.0, 0.5])
@pytest.mark.parametrize("interval", [1, None])
def test_a_pruned_base_is_fine_tuned_with_its_mask_held(target, interval, tmp_path):
    base = prune_base(tiny_bert())
    before, dense = zeros_of(base), copy.deepcopy(base.state_dict())
    assert {float(zeros.float().mean()) for zeros in before.values()} == {0.5}
    model = adapted(base, target_sparsity=target, mask_interval=interval, task_type="SEQ_CLS")
    fine_tune(model, tmp_path)
    assert {row.sparsity for row in report_model(model).layers} == {0.5}
    merged = model.merge_and_unload(safe_merge=True)
    after = zeros_of(merged)
    assert after.keys() == before.keys()
    for name, zeros in before.items():
        assert torch.equal(after[name], zeros), name
        assert not torch.equal(merged.state_dict()[name], dense[name]), f"{name} was not trained"


def test_without_the_option_zeros_come_back(tmp_path):
    base = prune_base(tiny_bert())
    before = zeros_of(base)
    model = adapted(base, target_sparsity=0.5, keep_zeros=False, task_type="SEQ_CLS")
    fine_tune(model, tmp_path)
    after = zeros_of(model.merge_and_unload())
    assert any((zeros & ~after[name]).any() for name, zeros in before.items())


def test_a_pruned_base_is_pruned_further(tmp_path):
    base = prune_base(tiny_bert())
    before = zeros_of(base)
    model = adapted(base, target_sparsity=0.7, task_type="SEQ_CLS", sparsity_pattern={"query": 0.9})
    fine_tune(model, tmp_path)
    after = zeros_of(model.merge_and_unload(safe_merge=True))
    for name, zeros in before.items():
        assert not (zeros & ~after[name]).any(), name
        assert int(after[name].sum()) == num_pruned(zeros.numel(), 0.9 if "query" in name else 0.7)


@pytest.mark.parametrize("interval", [1, 3, None])
def test_no_step_of_the_schedule_goes_below_the_base(interval):
    model = adapted(prune_base(net()), target_sparsity=0.75, mask_interval=interval)
    assert model.get_sparsity() == 0.5
    sparsities = []
    for step in range(11):
        shake(model, step)
        sparsities.append(update_sparsity(model, step, 10))
        for layer in layers_of(model).values():
            assert not (layer.get_mask("default") & (layer.get_dense_weight() == 0)).any()
            assert int((~layer.get_mask("default")).sum()) == layer.get_num_pruned("default")
    assert sparsities == sorted(sparsities)
    assert (sparsities[0], sparsities[-1]) == (0.5, 0.75)


def test_the_start_is_the_base():
    base = prune_base(net())
    expected = outputs(base)
    assert torch.equal(outputs(adapted(base).eval()), expected)


def test_a_base_above_the_target_stays_where_it_is():
    model = train_a_little(adapted(prune_base(net(), 0.75), target_sparsity=0.5))
    assert model.get_sparsity() == 0.75
    assert not any(row.misses_target for row in report_model(model).layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_are_kept_in_every_precision(dtype):
    base = prune_base(net(dtype))
    before = zeros_of(base)
    after = zeros_of(train_a_little(adapted(base, target_sparsity=0.5)).merge_and_unload())
    assert all(not (zeros & ~after[name]).any() for name, zeros in before.items())


def test_zeros_are_kept_where_weights_are_stored_the_other_way_round():
    base = prune_base(tiny_gpt2())
    before = zeros_of(base)
    after = zeros_of(train_a_little(adapted(base, target_sparsity=0.5)).merge_and_unload())
    assert all(torch.equal(after[name], zeros) for name, zeros in before.items())


def test_adapters_keep_zeros_each_for_itself():
    base = prune_base(net())
    model = adapted(base, target_sparsity=0.5)
    model.add_adapter("free", PSTConfig(target_sparsity=0.25, r=2))
    model.set_adapter("free")
    train_a_little(model)
    assert model.get_sparsity() == 0.25
    assert {layer.get_num_pruned("default") for layer in layers_of(model).values()} == {48}
    model.base_model.set_adapter(["default", "free"])
    merged = zeros_of(model.merge_and_unload())
    assert all(zeros.sum() >= 48 for zeros in merged.values())


# Saving and loading


@pytest.mark.parametrize("interval", [1, None])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_keeps_the_zeros_of_its_base(interval, low_cpu_mem_usage, tmp_path):
    model = train_a_little(adapted(prune_base(net()), target_sparsity=0.75, mask_interval=interval), step=6)
    assert 0.5 < model.get_sparsity() < 0.75
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prune_base(net()), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.get_sparsity() == model.get_sparsity()
    expected = masks(model)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(loaded).items())
    assert torch.equal(outputs(loaded.eval()), outputs(model.eval()))


@pytest.mark.parametrize("interval", [1, None])
def test_a_base_that_is_filled_after_the_adapter_was_made(interval):
    donor = adapted(prune_base(net()), target_sparsity=0.75, mask_interval=interval)
    with torch.device("meta"):
        model = adapted(Net(), target_sparsity=0.75, mask_interval=interval)
    model.load_state_dict(donor.state_dict(), assign=True)
    assert model.get_sparsity() == 0.5
    shake(model, 0)
    model.update_sparsity(10, total_steps=10)
    assert model.get_sparsity() == 0.75
    for layer in layers_of(model).values():
        assert not (layer.get_mask("default") & (layer.get_dense_weight() == 0)).any()


def test_the_zeros_are_those_of_the_base_that_is_there_now():
    model = adapted(net(), target_sparsity=0.0)
    assert model.get_sparsity() == 0
    for layer in layers_of(model).values():
        layer.get_base_layer().weight.data = wanda(layer.get_base_layer().weight.data)
    assert model.get_sparsity() == 0.5
    shake(model, 0)
    merged = model.merge_and_unload()
    assert {float(zeros.float().mean()) for zeros in zeros_of(merged).values()} == {0.5}


def test_merging_and_unmerging_leave_the_zeros_in_force():
    model = train_a_little(adapted(prune_base(net()), target_sparsity=0.75))
    expected = masks(model)
    model.merge_adapter()
    assert model.get_sparsity() == 0.75
    model.unmerge_adapter()
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model).items())


def test_a_copied_model_counts_its_own_zeros():
    model = adapted(prune_base(net()), target_sparsity=0.0)
    other = copy.deepcopy(model)
    for layer in layers_of(other).values():
        layer.get_base_layer().weight.data = wanda(layer.get_base_layer().weight.data, 0.75)
    assert (model.get_sparsity(), other.get_sparsity()) == (0.5, 0.75)


# Pruning at once


@pytest.mark.parametrize("by", ["scores", "weights", "update"])
def test_pruning_at_once_starts_from_the_zeros(by):
    base = prune_base(net())
    before = zeros_of(base)
    model = get_peft_model(base, PSTConfig.dsee(r=2, residual=5, keep_zeros=True))
    shake(model, 0)
    assert prune_once(model, 0.75, by=by) == 0.75
    shake(model, 1)
    after = zeros_of(model.merge_and_unload())
    assert all(not (zeros & ~after[name]).any() for name, zeros in before.items())
    assert {float(zeros.float().mean()) for zeros in after.values()} == {0.75}


def test_a_mask_made_elsewhere_brings_nothing_back():
    model = adapted(prune_base(net()), target_sparsity=0.0, mask_interval=None)
    layer = model.base_model.model.layers[0].up
    layer.set_mask("default", torch.ones(12, 8, dtype=torch.bool))
    assert torch.equal(layer.get_mask("default"), layer.get_dense_weight() != 0)
    assert layer.get_num_pruned("default") == 48


def test_dropping_heads_brings_nothing_back():
    base: PreTrainedModel = prune_base(tiny_bert())
    before = zeros_of(base)
    model = get_peft_model(base, PSTConfig.dsee(r=2, residual=5, keep_zeros=True))
    shake(model, 0)
    prune_heads(model, 1)
    after = zeros_of(model.merge_and_unload())
    assert all(not (zeros & ~after[name]).any() for name, zeros in before.items())
    value = next(name for name in before if "0.attention.self.value" in name)
    assert after[value].sum() > before[value].sum()


# What is refused


def test_a_matrix_of_zeros_is_refused_by_name():
    def base() -> Net:
        model = net()
        model.layers[1].up.weight.data.zero_()
        return model

    message = r"Layer layers\.1\.up: keep_zeros=True .* all 96 weights of the base are; name the layer in exclude_mod"
    with pytest.raises(ValueError, match=message):
        adapted(base())
    excluding = adapted(base(), exclude_modules=["layers.1.up"])
    assert "layers.1.up" not in {layer.module_name for layer in layers_of(excluding).values()}


@pytest.mark.parametrize("value", [1, "yes", None])
def test_what_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match=f"keep_zeros={value!r} is neither True nor False"):
        PSTConfig(keep_zeros=value)


def test_gradients_reach_every_part_of_a_held_base():
    model = adapted(prune_base(net()), target_sparsity=0.0, init_weights=False).train()
    model(inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
