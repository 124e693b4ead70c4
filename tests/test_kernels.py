"""The Triton kernels without a GPU: run by Triton's interpreter against the torch functions, and compiled for GPUs.

The interpreter is chosen when Triton is imported, so its tests run in a process of their own (`test_interpreted`).
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_pst import PSTConfig, update_sparsity
from peft_pst.kernels import available
from peft_pst.masked_linear import Pruner, _add_block, effective_weight
from peft_pst.masking import _select_on_device, pack_mask
from peft_pst.scoring import Factors, base_scores

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted in a process of its own")

# (out, in), rank, score rank, structured, dtype, stored transposed: whole bytes a row and not, all parts and few.
CASES = [
    ((40, 72), 3, 5, True, torch.float32, False),
    ((24, 104), 8, 8, True, torch.bfloat16, False),
    ((33, 65), 1, 0, True, torch.float16, True),
    ((17, 16), 0, 2, False, torch.bfloat16, True),
    ((50, 130), 20, 1, False, torch.float32, True),
    ((9, 7), 0, 0, True, torch.float32, False),
]


def test_kernels_are_for_gpus() -> None:
    assert not available(torch.zeros(2, 3))


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-W", "ignore", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"\b([3-9]\d|\d{3,}) passed", result.stdout), result.stdout[-5000:]


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with tiles so small that small matrices take many programs."""
    from peft_pst.kernels import selection

    monkeypatch.setattr(selection, "CHUNK", 256)
    monkeypatch.setattr(selection, "SAMPLE", 128)
    monkeypatch.setattr(selection, "PROGRAMS_PER_MULTIPROCESSOR", 3)
    monkeypatch.setattr(selection, "_multiprocessors", lambda device: 1)
    return selection


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the weight and of the gradients, likewise."""
    from peft_pst.kernels import gradients, weights

    monkeypatch.setattr(weights, "ROWS", 8)
    monkeypatch.setattr(weights, "COLUMNS", 32)
    for name, size in (("ROWS", 16), ("COLUMNS", {2: 16, 4: 16}), ("STRIP", 64)):
        monkeypatch.setattr(gradients, name, size)
    _teach_bfloat16_products(monkeypatch)
    return weights, gradients


def _teach_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers, and multiplies matrices of them as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    product = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(self, widened(a), widened(b), *rest)
    )


def special(scores: Tensor) -> Tensor:
    scores = scores.clone()
    for start, step, value in ((0, 3, -0.0), (1, 7, torch.nan), (2, 11, -torch.inf), (3, 13, torch.inf), (4, 17, 0.0)):
        scores[start::step] = value
    scores[5::19] = -torch.tensor(torch.nan)
    return scores


SCORES = {
    "normal": lambda scores: scores,
    "ties": lambda scores: scores.round(decimals=1),
    "equal": torch.zeros_like,
    "two values": lambda scores: (scores > 0.3).float(),
    "special": special,
    "ascending": lambda scores: scores.sort().values,
    "descending": lambda scores: scores.sort(descending=True).values,
    "tiny": lambda scores: scores * 1e-42,
    "wide": lambda scores: scores * 10 ** (30 * torch.randn_like(scores)).clamp(1e-38, 1e38),
    "bfloat16": Tensor.bfloat16,
    "float16": Tensor.half,
}


@interpreted
@pytest.mark.parametrize("numel", [1, 9, 257, 3000])
@pytest.mark.parametrize("kind", SCORES)
def test_selection(selection: Any, kind: str, numel: int) -> None:
    scores = SCORES[kind](torch.randn(numel, generator=torch.Generator().manual_seed(0)))
    for count in sorted({1, numel // 2 or 1, max(1, int(0.9 * numel)), numel}):
        expected = pack_mask(_select_on_device(scores, count))
        assert torch.equal(selection.select_packed_mask(scores, count), expected), count


@interpreted
@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_selection_where_the_sample_misleads(
    selection: Any, kind: str, direction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SCORES[kind](torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    # Far from the right ranks, so that the cut lies outside the keys they give.
    honest = selection._sample_ranks
    monkeypatch.setattr(selection, "_sample_ranks", lambda *sizes: tuple(r + 60 * direction for r in honest(*sizes)))
    for count in (900, 1000, 1100):
        expected = pack_mask(_select_on_device(scores, count))
        assert torch.equal(selection.select_packed_mask(scores, count), expected), count


def example(
    shape: tuple[int, int], rank: int, score_rank: int, structured: bool, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Factors, Tensor]:
    """Base weight, factors and mask."""
    out, in_ = shape
    generator = torch.Generator().manual_seed(out)

    def normal(*sizes: int) -> Tensor:
        return 0.3 * torch.randn(sizes, generator=generator)

    weight = (normal(in_, out).T if transposed else normal(out, in_)).to(dtype)
    update = (normal(out, rank), normal(rank, in_)) if rank else (None, None)
    low_rank = (normal(out, score_rank), normal(score_rank, in_)) if score_rank else (None, None)
    sums = (normal(out), normal(in_)) if structured else (None, None)
    factors = Factors(*update, *low_rank, *sums, beta=0.7, alpha1=1.3, alpha2=0.4)
    return weight, factors, torch.rand(shape, generator=generator) < 0.4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_effective_weight(kernels: Any, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    weight, factors, mask = example(*case)
    actual = kernels[0].effective_weight(weight, factors, pack_mask(mask), dtype)
    expected = effective_weight(weight, [Pruner(factors, pack_mask(mask))], dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual == 0, expected == 0)
    assert not torch.signbit(actual[~mask]).any()
    # The interpreter cuts bfloat16 off where the compiled kernel rounds.
    exact = dtype == weight.dtype == torch.float32
    assert relative_error(actual, expected) < (
        1e-6 if exact else 8e-3 if torch.bfloat16 in (dtype, weight.dtype) else 1e-3
    )


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_scores(kernels: Any, case: tuple[Any, ...]) -> None:
    weight, factors, _ = example(*case)
    assert relative_error(kernels[0].importance_scores(weight, factors), base_scores(weight, factors)) < 1e-6


@interpreted
@pytest.mark.parametrize("wanted", ["UVABRC", "UBR", "VAC"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(kernels: Any, case: tuple[Any, ...], wanted: str) -> None:
    weight, factors, mask = example(*case)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    starts = {
        letter: torch.ones_like(tensor)
        for letter in wanted
        if (tensor := getattr(factors, letter)) is not None  # what has been added up before must stay
    }
    actual, expected = (Factors(**{letter: start.clone() for letter, start in starts.items()}) for _ in range(2))
    pruner = Pruner(factors, pack_mask(mask))
    kernels[1].add_gradients(grad, weight, *pruner, actual)
    _add_block(grad.float(), weight, [pruner], slice(0, weight.shape[0]), None, [expected])
    for letter in starts:
        error = relative_error(getattr(actual, letter), getattr(expected, letter))
        assert error < (1e-5 if weight.dtype == torch.float32 else 1e-4), letter


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step(
    kernels: Any, selection: Any, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = PSTConfig(target_modules=["0"], r=2, score_rank=3, target_sparsity=0.7)
    model = get_peft_model(nn.Sequential(nn.Linear(40, 24)).to(dtype), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 40, dtype=dtype)
    calls = []

    def run(with_kernels: bool) -> list[Tensor]:
        def answer(tensor: Tensor) -> bool:
            calls.append(with_kernels)
            return with_kernels

        for module in ("masking", "scoring", "kernels"):
            monkeypatch.setattr(f"peft_pst.{module}.available", answer)
        update_sparsity(model, 1, 1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().mean().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, actual = run(False), run(True)
    assert True in calls
    assert len(expected) == len(actual) == 7
    exact = dtype == torch.float32 and not autocast
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < (1e-5 if exact else 2e-2)


# Compilation


POINTERS = {"scores": "fp32", "effective": "bf16", "weight": "bf16", "grad": "bf16", "packed": "u8"}
POINTERS |= dict.fromkeys(("state", "ties", "group_counts"), "i32")
POINTERS |= {name: "fp32" for letter in "UVABRC" for name in (letter, f"part_{letter}")}
FLOATS = ("beta", "alpha1", "alpha2")
DIVISIBLE = ("width", "row_stride", "numel")  # by 16, as they mostly are
ALL_PARTS = {f"WANTS_{letter}": True for letter in "UVABRC"}


def kernel_cases() -> list[tuple[str, str, dict[str, Any], int, int]]:
    """Module, kernel, constants, warps, and the bytes a thread may keep outside its registers."""
    tile = {"column_stride": 1, "HAS_UPDATE": True, "ROWS": 16, "COLUMNS": 256}
    strip = {**ALL_PARTS, "column_stride": 1, "HAS_UPDATE": True, "WHOLE_BYTES": True}
    strip |= {"ROWS": 64, "STRIP": 512, "RANK": 16, "SCORE_RANK": 16}
    return [
        ("selection", "_bracket", {"SAMPLE": 16384}, 16, 0),
        ("selection", "_count", {"CHUNK": 1024}, 4, 0),
        ("selection", "_find", {}, 4, 0),
        ("selection", "_count_ties", {"CHUNK": 1024}, 4, 0),
        ("selection", "_settle", {"PROGRAMS": 1024, "CHUNK": 1024}, 4, 0),
        ("weights", "_effective_weight", {**tile, "WHOLE_BYTES": True}, 4, 0),
        ("weights", "_effective_weight", {**tile, "WHOLE_BYTES": False}, 4, 0),
        ("weights", "_importance_scores", {**tile, "HAS_LOW_RANK": True, "HAS_STRUCTURED": True}, 4, 0),
        ("gradients", "_reduce", {**strip, "COLUMNS": 64, "IN_HALVES": True}, 4, 600),
        ("gradients", "_reduce", {**strip, "COLUMNS": 32, "IN_HALVES": False}, 4, 600),
    ]


def compiled(module: str, kernel: str, constants: dict[str, Any], warps: int, capability: int) -> Any:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"peft_pst.kernels.{module}"), kernel)
    aligned = [name for name in function.arg_names if name in POINTERS and (kernel, name) != ("_count", "scores")]
    source = ASTSource(
        function,
        signature={name: argument_type(name, constants) for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if name in aligned or name in DIVISIBLE
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def argument_type(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    return f"*{POINTERS[name]}" if name in POINTERS else "fp32" if name in FLOATS else "i32"


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(("case", "capability"), list(itertools.product(kernel_cases(), (80, 90))))
def test_kernels_compile_without_spilling(
    case: tuple[str, str, dict[str, Any], int, int], capability: int, tmp_path: Path
) -> None:
    import triton

    module, kernel, constants, warps, spill = case
    result = compiled(module, kernel, constants, warps, capability)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(value) for value in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert registers <= 255
    assert stack <= spill
    assert result.metadata.shared <= 48 * 1024


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_bfloat16_is_rounded_to_the_nearest() -> None:
    _, kernel, constants, warps, _ = kernel_cases()[5]
    assert re.search(r"cvt\.rn\.bf16", compiled("weights", kernel, constants, warps, 90).asm["ptx"])
