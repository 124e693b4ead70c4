"""Packing one tensor: the same bits back, whatever they are, and nothing that does not fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_pst import packing
from peft_pst.packing import (
    Packed,
    compact_ratio,
    kept_values,
    num_negative_zeros,
    pack_tensor,
    packed_bytes,
    unpack_tensor,
    without_negative_zeros,
)

DTYPES = {
    1: [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
    2: [torch.bfloat16, torch.float16, torch.int16],
    4: [torch.float32, torch.int32],
    8: [torch.float64, torch.int64, torch.complex64],
}
ALL = [dtype for dtypes in DTYPES.values() for dtype in dtypes]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK", 16)


def bits(tensor: Tensor) -> list[bytes]:
    """Each entry as its bytes, which tell -0.0 from 0.0 and one NaN from another."""
    size = tensor.element_size()
    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def from_bytes(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).view(shape)


@given(data=st.data(), dtype=st.sampled_from(ALL), shape=st.lists(st.integers(1, 7), max_size=3))
@settings(max_examples=60)
def test_every_bit_comes_back(data, dtype, shape):
    size = torch.empty(0, dtype=dtype).element_size()
    entry = st.just(b"\x00" * size) | st.binary(min_size=size, max_size=size)
    if dtype == torch.bool:
        entry = st.sampled_from([b"\x00", b"\x01"])
    entries = data.draw(st.lists(entry, min_size=math.prod(shape), max_size=math.prod(shape)))
    tensor = from_bytes(b"".join(entries), dtype, tuple(shape))
    packed = pack_tensor(tensor)
    assert packed.values.dtype == dtype
    kept = [entry for entry in entries if any(entry)]
    assert bits(packed.values) == kept
    assert kept_values(tensor) == len(kept)
    flags = [any(entry) for entry in entries]
    expected = [sum(flag << bit for bit, flag in enumerate(flags[i : i + 8])) for i in range(0, len(flags), 8)]
    assert packed.mask.tolist() == expected
    back = unpack_tensor(packed, tuple(shape))
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert bits(back) == entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_special_values_keep_their_bits(dtype):
    tensor = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-7, 0.0, 0.0, 0.0, -3.0]).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    words = tensor.view(integers)
    words[4] += 3  # a NaN with a payload
    packed = pack_tensor(tensor)
    assert len(packed.values) == 6, "-0.0 is a value"
    back = unpack_tensor(packed, (10,))
    assert torch.equal(back.view(integers), words)
    assert torch.signbit(back[1])


@pytest.mark.parametrize("dtype", ALL)
def test_giving_up_negative_zeros_leaves_every_other_bit(dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (64, size), generator=generator, dtype=torch.uint8)
    raw = raw % 2 if dtype == torch.bool else raw
    raw[::4] = 0
    if dtype.is_floating_point:
        raw[::8, -1] = 128  # the sign
    tensor = raw.reshape(-1).view(dtype)
    expected = [
        b"\x00" * size if value == 0 else entry for value, entry in zip(tensor.tolist(), bits(tensor), strict=True)
    ]
    assert bits(without_negative_zeros(tensor)) == expected
    assert num_negative_zeros(tensor) == sum(entry != b"\x00" * size for entry in bits(tensor)) - sum(
        map(any, expected)
    )
    assert (num_negative_zeros(tensor) > 0) == dtype.is_floating_point


def test_a_tensor_that_is_stored_the_other_way_round_is_read_row_by_row():
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(unpack_tensor(pack_tensor(tensor), (4, 3)), tensor)


def test_an_empty_tensor():
    packed = pack_tensor(torch.empty(0, 3))
    assert unpack_tensor(packed, (0, 3)).shape == (0, 3)


@given(numel=st.integers(1, 10_000), share=st.floats(0, 1), size=st.sampled_from([1, 2, 4, 8]))
def test_sizes_are_those_of_the_theory(numel, share, size):
    kept = round(numel * share)
    stored = packed_bytes(numel, kept, 8 * size)
    assert stored == -(-numel // 8) + kept * size
    assert abs(stored / (numel * size) - compact_ratio(8 * size, 1 - kept / numel)) <= 1 / (numel * size)


def packed(numel: int = 20) -> Packed:
    return pack_tensor(torch.arange(float(numel)) % 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p._replace(values=p.values[:-1]), "its mask keeps 13 values, but 12 are stored"),
        (lambda p: p._replace(values=torch.cat([p.values, p.values])), "its mask keeps 13 values, but 26 are stored"),
        (lambda p: p._replace(mask=p.mask ^ 1), "its mask keeps 1[0-9] values, but 13 are stored"),
        (lambda p: p._replace(mask=p.mask[:-1]), r"its mask is torch.uint8 of shape \(2,\) instead of .*\(3,\)"),
        (lambda p: p._replace(mask=p.mask.int()), r"its mask is torch.int32 of shape \(3,\)"),
        (lambda p: p._replace(mask=p.mask[None]), r"its mask is torch.uint8 of shape \(1, 3\)"),
        (lambda p: p._replace(mask=p.mask | 128), "its mask has bits beyond its 20 entries"),
        (lambda p: p._replace(values=p.values[None]), r"its values are torch.float32 of shape \(1, 13\)"),
        (lambda p: p._replace(values=p.values.to(torch.complex128)), "its values are torch.complex128"),
    ],
)
def test_what_does_not_fit_is_refused(damage, message):
    with pytest.raises(ValueError, match=message):
        unpack_tensor(damage(packed()), (4, 5))
