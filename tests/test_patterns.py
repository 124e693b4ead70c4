"""Patterns on single matrices: masks against a slow second implementation, counts, ties, gradients, bounds."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked_linear import adapt, dense_weight, oracle_adapter, perturb, relative_error
from torch import Tensor, nn

from peft_pst import num_pruned, topk_mask
from peft_pst.patterns import (
    Blocks,
    Coupled,
    NofM,
    block_means,
    expand_groups,
    parse_pattern,
    reduce_to_blocks,
    select_pattern_mask,
)
from peft_pst.scoring import Factors, base_scores
from peft_pst.selection import select_adapter_mask

PATTERNS = ["unstructured", "2:4", "1:3", "4:8", "1:20", "2x3", "4x1", "1x6", "rows", "columns"]


def block_size(pattern: str, shape: tuple[int, int]) -> tuple[int, int]:
    if "x" in pattern:
        height, width = pattern.split("x")
        return int(height), int(width)
    return {"rows": (1, shape[1]), "columns": (shape[0], 1)}.get(pattern, (1, 1))


def slow_mask(scores: Tensor, count: int, pattern: str) -> Tensor:
    """Groups one by one, in plain loops."""
    height, width = scores.shape
    keep = torch.ones(height, width, dtype=torch.bool)
    if ":" in pattern:
        n, m = (int(number) for number in pattern.split(":"))
        may_go = []
        for row in range(height):
            for start in range(0, width, m):
                ranked = sorted(
                    range(start, start + m), key=lambda column, row=row: (scores[row, column].item(), column)
                )
                may_go += [(scores[row, column].item(), row, column) for column in ranked[: m - n]]
        for _, row, column in sorted(may_go)[:count]:
            keep[row, column] = False
        return keep
    b, c = block_size(pattern, (height, width))
    blocks = [
        (scores[row : row + b, column : column + c].mean().item(), row, column)
        for row in range(0, height, b)
        for column in range(0, width, c)
    ]
    for _, row, column in sorted(blocks)[: count // (b * c)]:
        keep[row : row + b, column : column + c] = False
    return keep


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, float, str]:
    pattern = draw(st.sampled_from(PATTERNS))
    height = 4 * draw(st.integers(1, 4))
    width = math.lcm(120, 1) if pattern == "1:20" else 24 * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.randn(height, width, generator=generator)
    if draw(st.booleans()):
        scores = scores.mul(2).round()  # ties
    most = parse_pattern(pattern).most if ":" in pattern else 0.99
    return scores, draw(st.floats(0, most)), pattern


@settings(max_examples=200, deadline=None)
@given(matrices())
def test_masks_are_those_of_a_slow_selection(case: tuple[Tensor, float, str]) -> None:
    scores, sparsity, pattern = case
    parsed = parse_pattern(pattern)
    count = parsed.num_pruned((scores.shape[0], scores.shape[1]), sparsity)
    keep = topk_mask(scores, sparsity, pattern)
    assert torch.equal(keep, slow_mask(scores, count, pattern))
    assert int((~keep).sum()) == count
    b, c = block_size(pattern, (scores.shape[0], scores.shape[1]))
    assert count == num_pruned(scores.numel() // (b * c), sparsity) * b * c


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:20"])
def test_n_of_m_is_exact_in_every_group_at_its_sparsity(pattern: str) -> None:
    n, m = (int(number) for number in pattern.split(":"))
    scores = torch.randn(12, 40).round(decimals=1)
    kept = topk_mask(scores, 1 - n / m, pattern).view(-1, m).sum(1)
    assert torch.equal(kept, torch.full_like(kept, n))
    on_the_way = topk_mask(scores, 0.3, pattern)
    assert int((~on_the_way).sum()) == num_pruned(scores.numel(), 0.3)
    assert int(on_the_way.view(-1, m).sum(1).amin()) >= n


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_device_without_numpy_selects_the_same(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_pst.masking as masking

    scores = torch.randn(8, 120).round(decimals=1)
    sparsity = 0.4 if ":" in pattern else 0.7
    expected = topk_mask(scores, sparsity, pattern)
    monkeypatch.setattr(masking, "_select_on_cpu", masking._select_on_device)
    assert torch.equal(topk_mask(scores, sparsity, pattern), expected)


def test_block_means_and_their_expansion() -> None:
    matrix = torch.arange(24.0).view(4, 6)
    means = block_means(matrix, (2, 3))
    assert torch.equal(means, torch.tensor([[matrix[i : i + 2, j : j + 3].mean() for j in (0, 3)] for i in (0, 2)]))
    assert torch.equal(expand_groups(means, (2, 3)), means.repeat_interleave(2, 0).repeat_interleave(3, 1))
    assert torch.equal(reduce_to_blocks(matrix, (2, 3)), expand_groups(means, (2, 3)))
    assert reduce_to_blocks(matrix, (1, 1)) is matrix


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2/4", "is none of"),
        ("", "is none of"),
        (None, "is none of"),
        ("4:4", "keeps 4 of 4"),
        ("0:4", "keeps 0 of 4"),
        ("0x4", "without entries"),
        ("-1x4", "is none of"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)


def test_parsing() -> None:
    assert parse_pattern("1x1") == parse_pattern("unstructured") == Blocks()
    assert parse_pattern("16x4") == Blocks(16, 4, "16x4")
    assert parse_pattern("2:4") == NofM(2, 4)
    assert parse_pattern("heads+neurons") == Coupled(("heads", "neurons"))
    for name in ("unstructured", "2:4", "16x4", "rows", "columns", "heads", "neurons", "heads+neurons"):
        assert parse_pattern(name).name == name


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns that 4 divides, but the matrix is 3 x 6"):
        topk_mask(torch.zeros(3, 6), 0.5, "2:4")
    with pytest.raises(ValueError, match=r"rows that 2 divides, but the matrix is 3 x 6"):
        topk_mask(torch.zeros(3, 6), 0.5, "2x2")
    with pytest.raises(ValueError, match=r"allows 12 zeros in a matrix of 3 x 8, a sparsity of 0.5, but 16"):
        topk_mask(torch.zeros(3, 8), 0.7, "2:4")
    with pytest.raises(ValueError, match="couples several matrices"):
        topk_mask(torch.zeros(3, 8), 0.5, "heads")
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]), 0.5, "2:4")
    with pytest.raises(ValueError, match="NaN"):
        select_pattern_mask(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]), 2, parse_pattern("2:4"))


def factors_of(out: int, in_: int) -> Factors:
    shapes = {"U": (out, 2), "V": (2, in_), "A": (out, 2), "B": (2, in_), "R": (out,), "C": (in_,)}
    return Factors(**{name: torch.randn(shape) / 4 for name, shape in shapes.items()})


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("large", [False, True])
def test_parts_are_ranked_apart(pattern: str, parts: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        for module in ("blocks", "selection"):
            monkeypatch.setattr(f"peft_pst.{module}.CACHE_NUMEL", 500)
        monkeypatch.setattr("peft_pst.blocks.LARGE_NUMEL", 100)
    torch.manual_seed(0)
    weight, factors = torch.randn(36, 120), factors_of(36, 120)
    height = 36 // parts
    scores = base_scores(weight, factors).split(height)
    parsed = parse_pattern(pattern)
    counts = [parsed.num_pruned((height, 120), share) for share in (0.45, 0.2, 0.3)[:parts]]
    packed = select_adapter_mask(weight, factors, counts, parsed)
    expected = torch.cat([slow_mask(part, count, pattern) for part, count in zip(scores, counts, strict=True)])
    from peft_pst.masking import unpack_mask

    assert torch.equal(unpack_mask(packed, (36, 120)), expected)


class _Reduced(torch.autograd.Function):
    """Scores to a mask: reduce to blocks, select, expand, with a derivative of 1 for the selection."""

    @staticmethod
    def forward(ctx, scores, keep, size):  # type: ignore[no-untyped-def]
        return keep.to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return grad, None, None


@pytest.mark.parametrize("pattern", ["2:4", "2x4", "rows", "columns", "8x1"])
@pytest.mark.parametrize("blocks", ["whole", "small"])
def test_gradients_are_those_of_reduced_scores(pattern: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":
        for module in ("blocks", "masked_linear"):
            monkeypatch.setattr(f"peft_pst.{module}.CACHE_NUMEL", 200)
        monkeypatch.setattr("peft_pst.masked_linear._PRODUCT_NUMEL", 500)
    torch.manual_seed(0)
    layer = adapt(nn.Linear(24, 40).double(), pattern=pattern, target_sparsity=0.5, residual=5).double()
    layer.set_sparsity("default", 0.5)
    perturb(layer)
    x, gy = torch.randn(6, 24, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    adapter = oracle_adapter(layer)
    scores = oracle.scores(dense_weight(layer), adapter)
    size = block_size(pattern, (40, 24))
    b, c = size
    reduced = scores.view(40 // b, b, 24 // c, c).mean((1, 3)).repeat_interleave(b, 0).repeat_interleave(c, 1)
    keep = slow_mask(scores.detach(), layer.get_num_pruned("default"), pattern)
    weight = (dense_weight(layer) + oracle.update(adapter, dense_weight(layer))) * _Reduced.apply(reduced, keep, size)
    (x @ weight.T + layer.get_base_layer().bias.detach()).backward(gy)
    assert torch.equal(layer.get_mask("default"), keep)
    layer(x).backward(gy)
    for name, tensor in zip("UVABRCS", layer.get_factors("default").tensors, strict=True):
        assert relative_error(tensor.grad, getattr(adapter, name).grad) < 1e-12, name
