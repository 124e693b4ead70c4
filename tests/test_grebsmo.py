"""The low-rank plus sparse split: what it recovers of a planted one, and what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_pst.grebsmo import LowRankPlusSparse, grebsmo
from peft_pst.masking import num_pruned

OUT, IN, RANK, ENTRIES = 60, 50, 4, 150


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A matrix of rank 4 with spread 2, and a sparse one of 150 entries of size 3 to 4 and either sign."""
    generator = seeded(seed)
    smooth = torch.randn(OUT, RANK, generator=generator) @ torch.randn(RANK, IN, generator=generator)
    where = torch.randperm(OUT * IN, generator=generator)[:ENTRIES]
    values = torch.randn(ENTRIES, generator=generator).sign() * (3 + torch.rand(ENTRIES, generator=generator))
    sparse = torch.zeros(OUT * IN).scatter(0, where, values).reshape(OUT, IN)
    return smooth.to(dtype), sparse.to(dtype)


def misfit(weight: Tensor, parts: LowRankPlusSparse) -> float:
    return (weight - parts.left @ parts.right - parts.sparse).norm().item()


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_split_is_recovered(seed: int) -> None:
    smooth, sparse = planted(seed)
    parts = grebsmo(smooth + sparse, RANK, 1 - ENTRIES / (OUT * IN), iterations=10, generator=seeded())
    assert torch.equal(parts.sparse != 0, sparse != 0)
    assert (parts.sparse - sparse).norm() < 0.02 * sparse.norm()
    assert (parts.left @ parts.right - smooth).norm() < 0.02 * smooth.norm()


def test_magnitude_alone_does_not_find_the_planted_entries() -> None:
    """So that the test above cannot pass for a wrong reason."""
    smooth, sparse = planted(0)
    largest = (smooth + sparse).abs().flatten().topk(ENTRIES).indices
    assert int((sparse.flatten()[largest] != 0).sum()) < ENTRIES // 2


def test_the_misfit_falls_with_rank_and_with_entries() -> None:
    weight = torch.randn(40, 30, generator=seeded())
    by_rank = [misfit(weight, grebsmo(weight, rank, 0.9, generator=seeded())) for rank in (0, 2, 5, 10, 20, 30)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[-1] < 1e-4 < by_rank[-2]
    by_entries = [misfit(weight, grebsmo(weight, 3, sparsity, generator=seeded())) for sparsity in (0.99, 0.9, 0.5, 0)]
    assert by_entries == sorted(by_entries, reverse=True)


def test_alternating_further_fits_better() -> None:
    smooth, sparse = planted(0)
    fits = [
        misfit(smooth + sparse, grebsmo(smooth + sparse, RANK, 0.95, iterations=n, generator=seeded()))
        for n in (1, 3, 10, 30)
    ]
    assert fits == sorted(fits, reverse=True)


def test_the_generator_decides_alone() -> None:
    weight = torch.randn(20, 30, generator=seeded())
    first = grebsmo(weight, 3, 0.9, generator=seeded(1))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = grebsmo(weight, 3, 0.9, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.left, grebsmo(weight, 3, 0.9, generator=seeded(2)).left)


@given(
    out=st.integers(1, 12),
    in_=st.integers(1, 12),
    rank=st.integers(0, 12),
    step=st.integers(1, 5),
    sparsity=st.integers(0, 99).map(lambda n: n / 100),
)
def test_shapes_and_counts(out: int, in_: int, rank: int, step: int, sparsity: float) -> None:
    rank = min(rank, out, in_)
    weight = torch.randn(out, in_, generator=seeded())
    parts = grebsmo(weight, rank, sparsity, rank_step=step, generator=seeded())
    assert [part.shape for part in parts] == [(out, rank), (rank, in_), (out, in_)]
    assert int((parts.sparse != 0).sum()) <= out * in_ - num_pruned(out * in_, sparsity)
    torch.testing.assert_close(parts.left.T @ parts.left, torch.eye(rank), rtol=1e-4, atol=1e-4)


def test_without_a_low_rank_part_the_sparse_one_is_the_largest_weights() -> None:
    weight = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    assert grebsmo(weight, 0, 0.5).sparse.tolist() == [[0.0, -4.0], [3.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 6, generator=seeded()).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in grebsmo(weight, 2, 0.9)} == {expected}


def test_a_weight_that_is_low_rank_already_and_a_zero_weight() -> None:
    weight = torch.outer(torch.arange(1.0, 7.0), torch.ones(5))
    parts = grebsmo(weight, 4, 0.9, generator=seeded())
    assert misfit(weight, parts) < 1e-4
    assert misfit(torch.zeros(6, 5), grebsmo(torch.zeros(6, 5), 4, 0.9, generator=seeded())) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, r"rank=7 is outside \[0, 5\], the smaller side of \(6, 5\)"),
        ({"rank": -1}, r"rank=-1 is outside \[0, 5\]"),
        ({"rank_step": 0}, r"rank_step=0 is below 1"),
        ({"iterations": 0}, r"iterations=0 is below 1"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 is outside \[0, 1\)"),
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\); pass one matrix"),
        ({"weight": torch.full((6, 5), torch.nan)}, "NaN"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grebsmo(**{"weight": torch.ones(6, 5), "rank": 2, "sparsity": 0.9, **options})
