"""Counts, masks and packed masks: exact, for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_pst.masking import masked_weight, num_pruned, pack_mask, select_mask, unpack_mask
from peft_pst.patterns import topk_mask

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Few different values, so that most examples tie; infinities and both zeros among them.
tied_scores = st.lists(st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 3.0, math.inf]), min_size=1, max_size=60)
any_scores = st.lists(st.floats(allow_nan=False, width=16), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("numel", "sparsity", "count"),
    [
        (1000, 0.9, 900),
        (100, 0.29, 29),  # 100 * 0.29 is 28.999999999999996
        (100, 0.57, 57),  # 56.99999999999999
        (1000, 0.001, 1),
        (3, 1 / 3, 1),
        (7, 0.5, 3),
        (10, 0.99, 9),
        (10**6, 1e-6, 1),
        (10**9, 3e-6, 3000),
        (1, 0.999, 0),
        (0, 0.5, 0),
        (5, 0.0, 0),
        (768 * 768, 0.9, 530841),
        (50257 * 12288, 0.7, 432290611),
    ],
)
def test_num_pruned_examples(numel: int, sparsity: float, count: int) -> None:
    assert num_pruned(numel, sparsity) == count


@given(numel=st.integers(1, 10**9), millionths=st.integers(0, 10**6 - 1))
def test_num_pruned_is_the_floor_of_the_decimal_that_was_written(numel: int, millionths: int) -> None:
    sparsity = millionths / 10**6
    assert num_pruned(numel, sparsity) == math.floor(numel * Fraction(str(sparsity)))


@given(denominator=st.integers(2, 10**6), multiple=st.integers(1, 10**4), data=st.data())
def test_num_pruned_of_a_fraction(denominator: int, multiple: int, data: st.DataObject) -> None:
    numerator = data.draw(st.integers(0, denominator - 1))
    assert num_pruned(denominator * multiple, numerator / denominator) == numerator * multiple


@given(numel=st.integers(1, 10**9), sparsity=st.floats(0, 1, exclude_max=True))
def test_num_pruned_keeps_at_least_one(numel: int, sparsity: float) -> None:
    count = num_pruned(numel, sparsity)
    assert 0 <= count < numel
    assert abs(count - numel * sparsity) <= 1


@given(numel=st.integers(1, 10**6), pair=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_num_pruned_grows_with_the_sparsity(numel: int, pair: tuple[float, float]) -> None:
    assert num_pruned(numel, min(pair)) <= num_pruned(numel, max(pair))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_num_pruned_refuses_a_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"^sparsity={sparsity} is outside \[0, 1\)"):
        num_pruned(10, sparsity)


def test_num_pruned_refuses_a_negative_size() -> None:
    with pytest.raises(ValueError, match=r"^numel=-1 is negative; pass the number of weights\.$"):
        num_pruned(-1, 0.5)


@given(values=st.one_of(tied_scores, any_scores), dtype=st.sampled_from(FLOATS), data=st.data())
def test_select_mask_is_a_stable_sort(values: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    count = data.draw(st.integers(0, len(values)))
    before = scores.clone()
    mask = select_mask(scores, count)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, oracle.mask(scores, count))
    assert torch.equal(scores, before)


@given(values=tied_scores, positions=st.sets(st.integers(0, 59), min_size=1), data=st.data())
def test_nan_is_refused_wherever_it_lies(values: list[float], positions: set[int], data: st.DataObject) -> None:
    scores = torch.tensor(values)
    scores[[position % len(values) for position in positions]] = math.nan
    with pytest.raises(ValueError, match="hold a NaN, which has no rank"):
        select_mask(scores, data.draw(st.integers(1, len(values))))
    with pytest.raises(ValueError, match="hold a NaN, which has no rank"):
        topk_mask(scores, 0.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_refused_in_every_dtype(dtype: torch.dtype) -> None:
    scores = torch.ones(2, 3, dtype=dtype)
    scores[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        select_mask(scores, 1)


@pytest.mark.parametrize("count", [-1, 7])
def test_select_mask_refuses_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^count={count} is outside \[0, 6\], the number of scores\.$"):
        select_mask(torch.zeros(2, 3), count)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    scores = torch.empty(shape)
    assert select_mask(scores, 0).shape == topk_mask(scores, 0.5).shape == shape
    assert unpack_mask(pack_mask(scores > 0), shape).shape == shape


@pytest.mark.parametrize(
    "view",
    [lambda s: s.T, lambda s: s[:, ::2], lambda s: s[1:, 3:], lambda s: s[:1].expand(4, -1)],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_select_mask_of_views_goes_by_row_major_position(view: Callable[[Tensor], Tensor]) -> None:
    scores = view(torch.randint(0, 4, (6, 9), generator=torch.Generator().manual_seed(0)).float())
    for count in range(scores.numel() + 1):
        assert torch.equal(select_mask(scores, count), oracle.mask(scores, count))


def test_select_mask_leaves_no_graph() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    assert not select_mask(scores, 5).requires_grad


def test_bfloat16_ties_are_cut_exactly() -> None:
    scores = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).abs().bfloat16()
    assert scores.unique().numel() < 2000
    mask = topk_mask(scores, 0.9)
    assert int((~mask).sum()) == num_pruned(512 * 512, 0.9)
    assert torch.equal(mask, oracle.mask(scores, num_pruned(512 * 512, 0.9)))


@given(values=tied_scores, sparsity=st.floats(0, 1, exclude_max=True))
def test_topk_mask_counts(values: list[float], sparsity: float) -> None:
    scores = torch.tensor(values)
    assert torch.equal(topk_mask(scores, sparsity), oracle.mask(scores, num_pruned(len(values), sparsity)))


@pytest.mark.parametrize("sparsity", [-0.5, 1.0])
def test_topk_mask_refuses_a_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"^sparsity={sparsity} is outside"):
        topk_mask(torch.zeros(4), sparsity)


def random_mask(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(math.prod(shape))) < 0.5


@given(shape=st.lists(st.integers(0, 9), max_size=4).map(tuple))
def test_pack_and_unpack(shape: tuple[int, ...]) -> None:
    mask = random_mask(shape)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(mask.numel() / 8),)
    restored = unpack_mask(packed, shape)
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


@pytest.mark.parametrize("bits", range(256))
def test_every_byte(bits: int) -> None:
    mask = torch.tensor([bool(bits >> position & 1) for position in range(8)])
    assert torch.equal(unpack_mask(pack_mask(mask), (8,)), mask)


@pytest.mark.parametrize("offset", range(9))
def test_pack_mask_of_views(offset: int) -> None:
    mask = random_mask((40,))
    for view in (mask[offset:], mask[offset : offset + 16], mask[offset::2], mask.view(8, 5).T[:, :offset]):
        assert torch.equal(unpack_mask(pack_mask(view), view.shape), view)


def test_masked_weight_is_plus_zero_where_pruned() -> None:
    weight = torch.tensor([-1.0, math.inf, -math.inf, -0.0, 2.0, math.nan], requires_grad=True)
    mask = torch.tensor([False, False, True, False, True, False])
    result = masked_weight(weight.detach(), pack_mask(mask))
    assert torch.equal(result, torch.tensor([0.0, 0.0, -math.inf, 0.0, 2.0, 0.0]))
    assert not torch.signbit(result[~mask]).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3,), (8, 3), (5, 7), (1, 64)])
def test_masked_weight_is_the_choice_of_booleans(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, mask = torch.randn(shape).to(dtype), random_mask(shape)
    before = weight.clone()
    result = masked_weight(weight, pack_mask(mask))
    assert result.dtype == dtype
    assert torch.equal(result, torch.where(mask, weight, torch.zeros_like(weight)))
    assert torch.equal(weight, before)


def test_masked_weight_of_a_transposed_view() -> None:
    weight, mask = torch.randn(6, 4).T, random_mask((4, 6))
    assert torch.equal(masked_weight(weight, pack_mask(mask)), torch.where(mask, weight, torch.zeros(4, 6)))
