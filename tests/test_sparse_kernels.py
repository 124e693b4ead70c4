"""Every kernel computes the same linear map as the dense weight, refuses what it cannot, and gives the weight back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from peft_pst.sparse_kernels import KERNELS, _unusable_form, block_size, two_four_violation

ON_CPU = [name for name in KERNELS if name != "2:4"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def scattered(rows: int = 96, columns: int = 64) -> Tensor:
    """One in ten kept, a row and a column wholly zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.9] = 0
    weight[5], weight[:, 7] = 0, 0
    return weight


def in_blocks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(6, 4, generator=generator) < 0.3
    return torch.randn(96, 64, generator=generator) * kept.repeat_interleave(16, 0).repeat_interleave(16, 1)


def without_lines() -> Tensor:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    weight[::3], weight[:, 10:30] = 0, 0
    return weight


def one_entry() -> Tensor:
    weight = torch.zeros(96, 64)
    weight[40, 3] = -2.5
    return weight


WEIGHTS = {
    "scattered": scattered(),
    "in blocks": in_blocks(),
    "without lines": without_lines(),
    "one entry": one_entry(),
    "all zero": torch.zeros(96, 64),
    "odd sizes": scattered(37, 53),
    "one row": scattered(7, 64)[:1],
    "transposed": scattered(64, 96).T,
}


def naive(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Entry by entry of the weight, in float64."""
    result = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for row, column in (weight != 0).nonzero().tolist():
        result[:, row] += x[:, column].double() * weight[row, column].double()
    return result if bias is None else result + bias.double()


def packed(name: str, weight: Tensor, rows: int):
    reason = KERNELS[name].refusal(weight)
    if reason is not None:
        pytest.skip(reason)
    return KERNELS[name](weight, rows)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("name", ON_CPU)
def test_the_same_product_as_entry_by_entry(name: str, what: str, dtype: torch.dtype):
    weight = WEIGHTS[what].to(dtype)
    kernel = packed(name, weight, rows=3)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(2)).to(dtype)
    for rows in (1, 3, 20):
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        for shift in (bias, None):
            result = kernel(x, shift)
            assert (result.dtype, result.is_contiguous()) == (dtype, True)
            torch.testing.assert_close(
                result.double(), naive(x, weight, shift), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("name", ON_CPU)
def test_the_weight_comes_back_whole(name: str, what: str, dtype: torch.dtype):
    weight = WEIGHTS[what].to(dtype)
    kernel = packed(name, weight, rows=1)
    for copied in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert copied.dense_weight().dtype == dtype
        assert torch.equal(copied.dense_weight(), weight)


def test_what_is_tested_is_taken():
    """No skip hides a kernel: each takes the matrix that it is made for."""
    made_for = {"dense": "scattered", "transposed": "scattered", "onednn": "scattered", "csr": "scattered"}
    made_for |= {"bsr": "in blocks", "submatrix": "without lines"}
    for name, what in made_for.items():
        assert KERNELS[name].refusal(WEIGHTS[what]) is None, name


@pytest.mark.parametrize(
    ("name", "weight", "says"),
    [
        ("csr", torch.ones(8, 8), "its 64 kept entries would take 512 bytes with their indices, the dense matrix 256"),
        ("csr", scattered().to("meta"), "CSR needs a CPU, and MKL as part of torch"),
        ("bsr", scattered(), "its zeros do not come in square blocks of 4 to 64"),
        ("submatrix", scattered(), "less than a tenth of it is in rows and columns wholly zero"),
        ("onednn", scattered().double(), "oneDNN packs no torch.float64 on this processor"),
        ("2:4", scattered(), "2:4 needs a CUDA device"),
    ],
)
def test_refusals_say_why(name: str, weight: Tensor, says: str):
    assert KERNELS[name].refusal(weight) == says


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sparse_dot_mkl", None)
    assert "pip install 'peft-pst[sparse]'" in KERNELS["mkl"].refusal(scattered())


def test_bf16_is_smaller_as_csr_only_above_three_quarters():
    weight = torch.zeros(10, 40, dtype=torch.bfloat16)
    weight.view(-1)[:100] = 1
    assert "800 bytes" in KERNELS["csr"].refusal(weight)
    weight.view(-1)[99] = 0
    assert KERNELS["csr"].refusal(weight) is None


@given(side=st.sampled_from([4, 8, 16]), kept=st.lists(st.booleans(), min_size=12, max_size=12))
def test_blocks_are_found_whatever_is_kept(side: int, kept: list[bool]):
    weight = torch.tensor(kept).view(3, 4).repeat_interleave(side, 0).repeat_interleave(side, 1).float()
    found = block_size(weight)
    if not any(kept):
        assert found is None or found >= side
    elif all(kept):
        assert found is None
    else:
        assert found is not None
        assert found >= side or weight.shape[0] % found


# 2:4


def two_of_four(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2).argsort(2)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight * (order < 2).view(rows, columns)


@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_what_obeys_the_rule_survives_torchs_packing(seed: int, dtype: torch.dtype):
    weight = two_of_four(64, 128, seed, dtype)
    weight[seed % 64] = 0  # fewer than two of four are fine
    assert two_four_violation(weight) is None
    values, where = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, where), weight)


@given(seed=st.integers(0, 2**16), row=st.integers(0, 63), group=st.integers(0, 31))
def test_one_entry_too_many_is_found_and_would_be_lost(seed: int, row: int, group: int):
    weight = two_of_four(64, 128, seed, torch.float16)
    weight[row, 4 * group : 4 * group + 4] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    says = f"row {row}, columns {4 * group} to {4 * group + 3} hold 3 entries that are not zero; 2:4 allows 2"
    assert two_four_violation(weight) == says
    packed_and_back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert not torch.equal(packed_and_back, weight)


def test_float32_is_packed_by_another_rule():
    weight = torch.zeros(64, 128)
    weight[0, :2] = 1  # two of four, but also two of two
    assert two_four_violation(weight) is None
    packed_and_back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert not torch.equal(packed_and_back, weight)
    assert "one entry of every two" in _unusable_form(weight)
    assert _unusable_form(weight.bfloat16()) is None
    assert _unusable_form(weight[:40].bfloat16()) == (
        "its shape (40, 128) is not a multiple of 32 x 64, which 2:4 asks for"
    )


def test_a_width_that_four_does_not_divide():
    assert two_four_violation(torch.zeros(2, 6)) == "its 6 columns are not a multiple of 4"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_four_on_a_gpu(dtype: torch.dtype):
    weight = two_of_four(256, 128, 0, dtype).cuda()
    assert KERNELS["2:4"].refusal(weight) is None
    kernel, x, bias = KERNELS["2:4"](weight, 8), torch.randn(8, 128).to(weight), torch.randn(256).to(weight)
    torch.testing.assert_close(kernel(x, bias), torch.nn.functional.linear(x, weight, bias), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        kernel(x[:1], bias), torch.nn.functional.linear(x[:1], weight, bias), rtol=2e-2, atol=2e-2
    )
    assert torch.equal(kernel.dense_weight(), weight)
    weight[0, :3] = 1
    assert "2:4 allows 2" in KERNELS["2:4"].refusal(weight)
    assert "not a multiple of" in KERNELS["2:4"].refusal(two_of_four(30, 128, 0, dtype).cuda())
