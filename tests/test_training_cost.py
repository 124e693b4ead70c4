"""The cost benchmark: what it compares computes the same thing, and its tables and pictures hold what was measured."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training_cost.py"
TINY = ["--width", "64", "--intermediate", "96", "--layers", "1", "--batch", "2", "--tokens", "8", "--repeats", "1"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(benchmark: ModuleType, *more: str) -> argparse.Namespace:
    return benchmark.parse([*TINY, "--no-memory", *more])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_autograd_side_and_ours_compute_the_same_gradients(benchmark, precision):
    methods = sys.modules["benchmarks.cost.methods"]
    runs = [methods.Run(method, options(benchmark, "--precision", precision)) for method in ("autograd", "ours")]
    start = torch.Generator().manual_seed(0)
    for (name, parameter), (_, other) in zip(trained(runs[0].model), trained(runs[1].model), strict=True):
        assert parameter.shape == other.shape, name
        parameter.data.copy_(other.data.normal_(std=0.1, generator=start))
    runs[1].ids, runs[1].direction = runs[0].ids, runs[0].direction
    gradients = []
    for run in runs:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            run.loss().backward()
        gradients.append([parameter.grad for _, parameter in trained(run.model)])
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs.norm() > 1e-5
        assert (ours - theirs).norm() / theirs.norm() < (1e-4 if precision == "fp32" else 0.1)


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_every_method_is_measured_and_no_product_leaves_a_gradient(benchmark):
    result = benchmark.measure(options(benchmark, "--mask_interval", "2"))
    assert sum(result["our_step"].values()) == pytest.approx(1)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows.keys() == set(result["settings"]["methods"])
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["full"]["step_over_full"] == rows["autograd"]["step_over_autograd"] == 1
    assert rows["autograd"]["trained"] == rows["ours"]["trained"] == 17 * (4 * (64 + 64) + 2 * (64 + 96))
    text = benchmark.table(result)
    assert all(f"| {name} |" in text for name in benchmark.METHODS.values())
    products = sys.modules["benchmarks.cost.methods"].Run("products", options(benchmark))
    products.step()
    assert all(parameter.grad is None for parameter in products.model.parameters())


@pytest.mark.slow
def test_scaling_is_written_and_drawn(benchmark, tmp_path, monkeypatch):
    some = {"methods": ["full", "ours"]}
    monkeypatch.setattr(benchmark, "SCALING", {"width": ((64, 128), some), "mask_interval": ((1, 2), some)})
    monkeypatch.setattr(sys, "argv", ["", *TINY, "--no-memory", "--scaling", "--output", str(tmp_path)])
    benchmark.main()
    axes = benchmark.json.loads((tmp_path / "scaling-bert-cpu-fp32.json").read_text())
    assert [point["settings"]["intermediate"] for point in axes["width"]] == [96, 192]
    assert [point["settings"]["mask_interval"] for point in axes["mask_interval"]] == [1, 2]
    assert (tmp_path / "scaling-bert-cpu-fp32.png").stat().st_size > 10_000


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    wide = ["--width", "1024", "--intermediate", "4096", "--layers", "2", "--batch", "1", "--tokens", "8"]
    measured = {method: benchmark.memory_in_fresh_process(method, benchmark.parse(wide)) for method in ("full", "ours")}
    weights = 4 * 2 * (4 * 1024 * 1024 + 2 * 1024 * 4096)  # bytes
    assert measured["full"] > 2.5 * weights, "gradients and Adam's two moments, at the least"
    assert measured["ours"] < measured["full"]
