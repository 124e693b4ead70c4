"""The formulas for the updated weight and the scores, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_pst.scoring import Factors, add_update, importance_scores, score_dtype, updated_weight

sizes = st.integers(1, 7)
scales = st.sampled_from([1.0, -1.0, 0.5, 3.0])


def random_adapter(
    out: int, in_: int, r: int, score_rank: int, structured: bool, scale: float, residual: int = 0
) -> oracle.Adapter:
    generator = torch.Generator().manual_seed(out * 100 + in_)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    update = {"U": draw(out, r), "V": draw(r, in_)} if r else {}
    low_rank = {"A": draw(out, score_rank), "B": draw(score_rank, in_)} if score_rank else {}
    rows_and_columns = {"R": draw(out), "C": draw(in_)} if structured else {}
    sparse = {"S": draw(residual), "positions": torch.randperm(out * in_, generator=generator)[:residual]}
    parts = {**update, **low_rank, **rows_and_columns, **(sparse if residual else {})}
    return oracle.Adapter(**parts, beta=scale, alpha1=2 * scale, alpha2=-scale)


def as_factors(adapter: oracle.Adapter) -> Factors:
    return Factors(
        **adapter.tensors, positions=adapter.positions, beta=adapter.beta, alpha1=adapter.alpha1, alpha2=adapter.alpha2
    )


@given(
    out=sizes,
    in_=sizes,
    r=st.integers(0, 3),
    score_rank=st.integers(0, 3),
    structured=st.booleans(),
    scale=scales,
    residual=st.integers(0, 49),
)
def test_against_the_oracle(
    out: int, in_: int, r: int, score_rank: int, structured: bool, scale: float, residual: int
) -> None:
    adapter = random_adapter(out, in_, r, score_rank, structured, scale, min(residual, out * in_))
    weight = torch.randn(out, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = weight.clone()
    updated = updated_weight(weight, as_factors(adapter))
    torch.testing.assert_close(updated, weight + oracle.update(adapter, weight), rtol=1e-12, atol=1e-12)
    scores = importance_scores(updated, as_factors(adapter))
    torch.testing.assert_close(scores, oracle.scores(weight, adapter), rtol=1e-12, atol=1e-12)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_residual_is_added_to_the_rows_that_are_there(r: int, transposed: bool) -> None:
    """Block by block the same as at once, whatever the memory layout, and no block sees another's entries."""
    adapter = random_adapter(7, 5, r, 0, False, 1.0, residual=9)
    weight = torch.randn(5, 7, dtype=torch.float64).T if transposed else torch.randn(7, 5, dtype=torch.float64)
    whole, factors = weight + oracle.update(adapter, weight), as_factors(adapter)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        U = None if factors.U is None else factors.U[start:stop]
        rows = factors._replace(U=U, positions=adapter.positions - start * 5)
        torch.testing.assert_close(add_update(weight[start:stop], rows), whole[start:stop], rtol=1e-12, atol=1e-12)


def test_the_scores_leave_their_inputs_alone() -> None:
    adapter = random_adapter(4, 5, 0, 2, True, 1.0)
    weight = torch.rand(4, 5, dtype=torch.float64)  # positive, so that |W| could share its memory
    copies = {name: tensor.clone() for name, tensor in adapter.tensors.items()} | {"W": weight.clone()}
    importance_scores(weight, as_factors(adapter))
    for name, tensor in (adapter.tensors | {"W": weight}).items():
        assert torch.equal(tensor, copies[name])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    weight = torch.randn(3, 4).to(dtype)
    factors = Factors(*(torch.randn(shape) for shape in ((3, 2), (2, 4), (3, 1), (1, 4), (3,), (4,))))
    assert score_dtype(dtype) == expected
    updated = updated_weight(weight, factors)
    assert updated.dtype == importance_scores(updated, factors).dtype == expected


def test_rows_and_columns_are_those_of_out_and_in() -> None:
    factors = Factors(R=torch.tensor([10.0, 20.0]), C=torch.tensor([1.0, 2.0, 3.0]))
    scores = importance_scores(torch.zeros(2, 3), factors)
    assert scores.tolist() == [[11.0, 12.0, 13.0], [21.0, 22.0, 23.0]]


def test_score_factors_of_half_precision_count_in_full() -> None:
    factors = Factors(A=torch.ones(1, 1, dtype=torch.bfloat16), B=torch.full((1, 1), 2**-8, dtype=torch.bfloat16))
    assert importance_scores(torch.ones(1, 1), factors).item() == 1 + 2**-8
