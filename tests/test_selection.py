"""Selecting and masking large matrices block by block: the same bits as at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_pst import blocks, masked_linear, masking, selection
from peft_pst.masked_linear import Pruner, effective_weight
from peft_pst.masking import pack_mask, select_mask, unpack_mask
from peft_pst.scoring import Factors, importance_scores, updated_weight
from peft_pst.selection import select_unstructured


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the way of large ones: many blocks, short last ones, samples that miss."""
    monkeypatch.setattr(blocks, "LARGE_NUMEL", 0)
    for module in (selection, masked_linear):
        monkeypatch.setattr(module, "CACHE_NUMEL", 100)
    monkeypatch.setattr(selection, "_SAMPLE", 8)
    monkeypatch.setattr(selection, "_MOST_INSIDE", 1)


def make_factors(out: int, in_: int, *, spread: float = 1.0, ties: bool = False, residual: int = 3) -> Factors:
    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) * spread
        return values.round() if ties else values

    generator = torch.Generator().manual_seed(out * 100 + in_)
    positions = torch.randperm(out * in_, generator=generator)[:residual].sort().values
    parts = (draw(out, 2), draw(2, in_), draw(out, 3), draw(3, in_), draw(out), draw(in_), draw(len(positions)))
    return Factors(*parts, positions, beta=0.5, alpha1=2.0)


def make_weight(out: int, in_: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(in_)).to(dtype)


def at_once(weight: Tensor, factors: Factors, count: int) -> Tensor:
    return pack_mask(select_mask(importance_scores(updated_weight(weight, factors), factors), count))


@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 40)),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=150, deadline=None)
def test_blocks_select_what_the_whole_selects(shape, share, spread, ties, dtype):
    weight, factors = make_weight(*shape, dtype), make_factors(*shape, spread=spread, ties=ties)
    weight = weight.round() if ties else weight
    count = round(share * weight.numel())
    packed = select_unstructured(weight, factors, count)
    assert torch.count_nonzero(unpack_mask(packed, shape)) == weight.numel() - count
    # Rounding may depend on the block, so near-ties may fall either way; whole numbers leave nothing to round.
    if ties:
        assert torch.equal(packed, at_once(weight, factors, count))
    else:
        scores = importance_scores(updated_weight(weight, factors), factors)
        kept = unpack_mask(packed, shape)
        if 0 < count < weight.numel():
            assert scores[kept].min() >= scores[~kept].max() - 1e-5 * scores.abs().max()


@pytest.mark.parametrize("dominant", ["R", "C", "A"])
def test_the_cut_is_bracketed_where_rows_or_columns_decide(dominant, monkeypatch):
    monkeypatch.setattr(selection, "_SAMPLE", 64)
    weight, factors = make_weight(300, 200) * 0.01, make_factors(300, 200)
    silent = {letter: torch.zeros_like(getattr(factors, letter)) for letter in "UABRC" if letter not in (dominant, "B")}
    factors = factors._replace(**silent)
    for share in (0.1, 0.5, 0.9, 0.99):
        count = int(share * weight.numel())
        low, high = selection._bracket(weight, factors, count)
        cut = importance_scores(updated_weight(weight, factors), factors).flatten().kthvalue(count).values
        assert low <= cut <= high
        assert torch.equal(select_unstructured(weight, factors, count), at_once(weight, factors, count))


def test_where_much_would_lie_between_all_is_selected_from_at_once(monkeypatch):
    monkeypatch.setattr(selection, "_MOST_INSIDE", 0.15)
    monkeypatch.setattr(selection, "_select_between", None)  # calling it would fail
    weight, factors = torch.zeros(300, 200), Factors()
    assert selection._bracket(weight, factors, 30_000) is None
    assert torch.equal(select_unstructured(weight, factors, 30_000), at_once(weight, factors, 30_000))


def test_the_default_device_plays_no_part():
    weight, factors = make_weight(53, 31), make_factors(53, 31)
    expected = at_once(weight, factors, 700), effective_weight(weight, [Pruner(factors, at_once(weight, factors, 700))])
    masking._words.cache_clear()
    with torch.device("meta"):
        packed = select_unstructured(weight, factors, 700)
        actual = packed, effective_weight(weight, [Pruner(factors, packed)])
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(("low", "high"), [(float("inf"), float("inf")), (-float("inf"), -1e9), (-1e9, -1e9)])
def test_a_missed_bracket_costs_time_alone(low, high, monkeypatch):
    weight, factors = make_weight(40, 30), make_factors(40, 30)
    monkeypatch.setattr(selection, "_bracket", lambda *args: (low, high))
    assert selection._select_between(weight, factors, 600, low, high) is None
    assert torch.equal(select_unstructured(weight, factors, 600), at_once(weight, factors, 600))


@pytest.mark.parametrize("position", [(0, 0), (17, 5), (39, 29)])
def test_a_nan_anywhere_is_refused(position):
    weight, factors = make_weight(40, 30), make_factors(40, 30)
    weight[position] = float("nan")
    with pytest.raises(ValueError, match="The scores hold a NaN"):
        select_unstructured(weight, factors, 600)


def test_infinite_scores_have_a_rank():
    weight, factors = make_weight(40, 30), make_factors(40, 30)
    weight[3, 4], factors.R[7] = float("inf"), -float("inf")
    for count in (10, 30, 600, 1199):
        assert torch.equal(select_unstructured(weight, factors, count), at_once(weight, factors, count))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", [None, torch.bfloat16, torch.float16])
def test_blocks_make_the_same_effective_weight(transposed, dtype, target, monkeypatch):
    weight = make_weight(53, 31, dtype)
    weight = weight.T.contiguous().T if transposed else weight
    pruners = [
        Pruner(factors := make_factors(53, 31, spread=spread), at_once(weight, factors, count))
        for spread, count in ((0.3, 700), (1.0, 1200))
    ]
    blocked = effective_weight(weight, pruners, target)
    monkeypatch.setattr(blocks, "LARGE_NUMEL", 1 << 40)
    whole = effective_weight(weight, pruners, target)
    assert blocked.dtype == whole.dtype == (target or dtype)
    torch.testing.assert_close(blocked, whole)
    assert torch.equal(blocked == 0, whole == 0)


def test_scores_that_are_never_held_take_no_memory_of_their_size(monkeypatch):
    made = []
    original = selection.base_scores

    def spy(weight: Tensor, factors: Factors) -> Tensor:
        made.append(weight.numel())
        return original(weight, factors)

    monkeypatch.setattr(selection, "base_scores", spy)
    weight, factors = make_weight(160, 50), make_factors(160, 50)
    select_unstructured(weight, factors, 7000)
    assert max(made) <= 400, "eight rows at a time"
