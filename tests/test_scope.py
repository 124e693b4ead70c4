"""One budget over several matrices: the cut against a full sort, what each keeps, and what training makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_models import inputs, layers_of, net, shake
from torch import Tensor

from peft_pst import PSTConfig, get_sparsity, num_pruned, prune_once, report_model, update_sparsity
from peft_pst.budget import Ranked, most_pruned, split_budget

finite = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([-1.0, 0.0, -0.0, 0.5, 1.0]))


@st.composite
def budgets(draw: st.DrawFn) -> tuple[list[Tensor], list[int], int]:
    scores = [torch.tensor(values) for values in draw(st.lists(st.lists(finite, min_size=1, max_size=30), min_size=1))]
    most = [draw(st.integers(0, len(values))) for values in scores]
    return scores, most, draw(st.integers(0, sum(most)))


def sorted_budget(scores: list[Tensor], most: list[int], total: int) -> list[int]:
    """All that may go in one list, sorted; of equal scores those of the earlier matrix first."""
    candidates = []
    for index, (values, limit) in enumerate(zip(scores, most, strict=True)):
        candidates += [(value + 0.0, index) for value in sorted(values.tolist())[:limit]]
    pruned = [0] * len(scores)
    for _, index in sorted(candidates)[:total]:
        pruned[index] += 1
    return pruned


@settings(max_examples=150, deadline=None)
@given(budgets())
def test_the_cut_is_that_of_a_full_sort(case: tuple[list[Tensor], list[int], int]) -> None:
    scores, most, total = case
    ranked = [
        Ranked(lambda values=values: values.split(7), 1, limit) for values, limit in zip(scores, most, strict=True)
    ]
    assert split_budget(ranked, total) == sorted_budget(scores, most, total)


def test_groups_of_several_sizes_stay_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 9, (4,), generator=generator).tolist()
        scores = [torch.randn(20, generator=generator) for _ in sizes]
        total = int(torch.randint(0, 20 * sum(sizes), (1,), generator=generator))
        ranked = [Ranked(lambda own=own: [own], size, 20) for own, size in zip(scores, sizes, strict=True)]
        pruned = split_budget(ranked, total)
        left = total - sum(count * size for count, size in zip(pruned, sizes, strict=True))
        assert 0 <= left < max(sizes)
        # Whatever stays scores no lower than what goes.
        highest_gone = max(own.sort().values[count - 1] for own, count in zip(scores, pruned, strict=True) if count)
        kept = [own.sort().values[count] for own, count in zip(scores, pruned, strict=True) if count < 20]
        assert all(lowest >= highest_gone for lowest in kept)


def test_what_a_budget_refuses() -> None:
    one = Ranked(lambda: [torch.ones(4)], 1, 3)
    with pytest.raises(ValueError, match="4 zeros were asked for, but at most 3 fit"):
        split_budget([one], 4)
    with pytest.raises(ValueError, match="NaN"):
        split_budget([Ranked(lambda: [torch.tensor([1.0, float("nan")])], 1, 2)], 1)
    assert (most_pruned(1000, 0.01), most_pruned(5, 0.01)) == (990, 4)


def adapted(**options: object) -> torch.nn.Module:
    model = net()
    with torch.no_grad():
        model.layers[0].up.weight *= 10  # a scale of its own must not spare it
    return get_peft_model(model, PSTConfig(scope="global", r=2, score_rank=2, **options))


def slow_counts(model: torch.nn.Module, total: int, min_kept: float) -> dict[str, int]:
    scores, most, names = [], [], []
    for name, layer in layers_of(model).items():
        own = layer.get_scores("default") / layer.get_base_layer().weight.pow(2).mean().sqrt()
        names.append(name)
        scores.append(own.flatten())
        most.append(own.numel() - max(1, int(min_kept * own.numel())))
    return dict(zip(names, sorted_budget(scores, most, total), strict=True))


@pytest.mark.parametrize("min_kept", [0.01, 0.25])
def test_all_matrices_together_have_the_target(min_kept: float) -> None:
    model = adapted(target_sparsity=0.7, min_kept=min_kept)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.pst_R["default"] += torch.randn(()) * 0.5  # some matrices matter more
    update_sparsity(model, 10, 10)
    layers = layers_of(model)
    weights = sum(layer.num_weights for layer in layers.values())
    found = {name: layer.get_num_pruned("default") for name, layer in layers.items()}
    assert sum(found.values()) == num_pruned(weights, 0.7)
    assert found == slow_counts(model, num_pruned(weights, 0.7), min_kept)
    assert len(set(found.values())) > 1
    assert all(layer.num_weights - found[name] >= int(min_kept * layer.num_weights) for name, layer in layers.items())
    for name, layer in layers.items():
        assert int((layer.get_masked_weight() == 0).sum()) == found[name]
    report = report_model(model)
    assert not report.misses_target
    assert not report.lost_zeros


def test_the_share_of_each_matrix_moves_with_the_scores_and_is_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    model = adapted(target_sparsity=0.5)
    before = None
    for step in (8, 9, 10):
        shake(model, step)
        update_sparsity(model, step, 10)
        counts = [layer.get_num_pruned("default") for layer in layers_of(model).values()]
        assert counts != before
        before = counts
    model.eval()
    model.save_pretrained(tmp_path)
    base = net()
    with torch.no_grad():
        base.layers[0].up.weight *= 10
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert [layer.get_num_pruned("default") for layer in layers_of(loaded).values()] == before
    assert torch.equal(loaded(inputs()), model(inputs()))
    expected = model(inputs())
    merged = model.merge_and_unload()
    assert torch.equal(merged(inputs()), expected)


def test_a_target_of_its_own_leaves_the_budget() -> None:
    model = adapted(target_sparsity=0.5, sparsity_pattern={"layers.1.down": 0.25})
    update_sparsity(model, 10, 10)
    layers = {layer.module_name: layer for layer in layers_of(model).values()}
    own = layers.pop("layers.1.down")
    assert own.get_num_pruned("default") == num_pruned(own.num_weights, 0.25)
    weights = sum(layer.num_weights for layer in layers.values())
    assert sum(layer.get_num_pruned("default") for layer in layers.values()) == num_pruned(weights, 0.5)


@pytest.mark.parametrize("by", ["scores", "weights", "update"])
def test_pruned_at_once_and_held(by: str) -> None:
    model = adapted(target_sparsity=0.5, mask_interval=None)
    shake(model, 1)
    assert prune_once(model, 0.5, by=by) == get_sparsity(model) == 0.5
    masks = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    shake(model, 2)
    update_sparsity(model, 10, 10)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.get_mask("default"), masks[name])


@pytest.mark.parametrize("pattern", ["4x4", "rows", "columns"])
def test_groups_under_one_budget(pattern: str) -> None:
    model = adapted(target_sparsity=0.5, pattern=pattern)
    shake(model, 1)
    update_sparsity(model, 10, 10)
    layers = layers_of(model)
    for layer in layers.values():
        plan, zeros = layer.pst_plans["default"], ~layer.get_mask("default")
        height, width = plan.size
        blocks = zeros.view(zeros.shape[0] // height, height, zeros.shape[1] // width, width)
        assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
    largest = max(size[0] * size[1] for size in (layer.pst_plans["default"].size for layer in layers.values()))
    weights = sum(layer.num_weights for layer in layers.values())
    found = sum(layer.get_num_pruned("default") for layer in layers.values())
    assert num_pruned(weights, 0.5) - largest < found <= num_pruned(weights, 0.5)
    report = report_model(model)
    assert not report.misses_target
    assert report.target_sparsity == report.sparsity == found / weights


@pytest.mark.parametrize("interval", [None, 4])
@pytest.mark.parametrize("options", [{"pattern": "rows"}, {"pattern": "4x4"}, {"keep_zeros": True}])
def test_a_budget_that_is_reached_as_far_as_groups_allow_is_held(interval: int | None, options: dict) -> None:
    """Neither whole groups, which hardly ever make the number exact, nor zeros on top of it may cause a new mask."""
    base = net()
    with torch.no_grad():
        base.layers[1].down.weight[:, : base.layers[1].down.in_features * 3 // 4] = 0
    config = PSTConfig(
        scope="global", target_sparsity=0.7, mask_interval=interval, cooldown_ratio=0.5, r=2, score_rank=2, **options
    )
    model = get_peft_model(base, config)
    if interval is None:
        prune_once(model, 0.7)
    update_sparsity(model, 13, 25)
    masks = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    shake(model, 2)
    update_sparsity(model, 14, 25)
    assert all(torch.equal(layer.get_mask("default"), masks[name]) for name, layer in layers_of(model).items())
    assert not report_model(model).misses_target
    update_sparsity(model, 16, 25)
    moved = any(not torch.equal(layer.get_mask("default"), masks[name]) for name, layer in layers_of(model).items())
    assert moved == (interval is not None)


def test_what_cannot_be_reached_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"min_kept=0.5 of each matrix is more than target_sparsity=0.7 leaves"):
        PSTConfig(scope="global", target_sparsity=0.7, min_kept=0.5)
    with pytest.raises(ValueError, match=r"target_sparsity=0.95 cannot be reached .* with min_kept=0.01 .*, 0.8958 is"):
        adapted(target_sparsity=0.95, pattern="rows")
    with pytest.raises(ValueError, match="nothing to share"):
        PSTConfig(scope="global", pattern="2:4")
    with pytest.raises(ValueError, match=r'neither "matrix" nor "global"'):
        PSTConfig(scope="model")
    with pytest.raises(ValueError, match=r"min_kept=0 is outside \(0, 1\)"):
        PSTConfig(min_kept=0)
