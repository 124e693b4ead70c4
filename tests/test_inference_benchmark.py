"""The inference benchmark: its sides compute the same thing, and its tables and files hold what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from peft_pst.sparse_kernels import KERNELS

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "inference.py"
PAGE = (SCRIPT.parent.parent / "docs" / "inference.md").read_text()
TINY = ["--width", "48", "--layers", "1", "--tokens", "5", "--repeats", "1"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inference_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layers(benchmark, monkeypatch, tmp_path, capsys):
    cases = [(0.9, "unstructured", (1, 4), ("float32",)), (0.5, "rows", (1,), ("bfloat16",))]
    monkeypatch.setattr(benchmark, "LAYER_CASES", cases)
    benchmark.main(["layers", *TINY, "--warm", "--output", str(tmp_path)])
    stored = json.loads((tmp_path / "layers-1threads-warm.json").read_text())
    assert stored["settings"]["width"] == 48
    rows = stored["rows"]
    assert [(row["out"], row["in"], row["rows"]) for row in rows[:2]] == [(192, 48, 1), (192, 48, 4)]
    assert len(rows) == 9
    assert all("csr" in row["seconds"] for row in rows if row["pattern"] == "unstructured")
    assert all("submatrix" in row["seconds"] for row in rows if row["pattern"] == "rows")
    table = capsys.readouterr().out
    assert table == benchmark.layers_table(rows) + "\n"
    assert table.count("| 192 x 48 | 90% | unstructured |") == 2


def test_a_block_is_two_wide_matrices_and_four_square_ones(benchmark):
    seconds = {"dense": 4e-6, "onednn": 2e-6, "csr": 1e-6}
    shapes = [(12, 3), (3, 12), (3, 3)]
    same = {"sparsity": 0.9, "pattern": "unstructured", "rows": 1, "precision": "float32", "seconds": seconds}
    table = benchmark.layers_table([{"out": out, "in": in_, **same} for out, in_ in shapes])
    assert table.endswith("| 3 | 90% | unstructured | 1 | float32 | 24 | 12 | 6 | 2.00 |")
    assert benchmark.gain({"dense": 1.0}) == 0
    assert benchmark.best(seconds, is_sparse=False) == seconds["onednn"]


@pytest.mark.slow
def test_models(benchmark, tmp_path, capsys):
    benchmark.main(["models", *TINY, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "models-1threads.json").read_text())["rows"]
    assert [(row["model"], row["phase"]) for row in rows] == [
        ("BertForSequenceClassification", "forward"),
        ("GPT2LMHeadModel", "prompt"),
        ("GPT2LMHeadModel", "token"),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["verdict"] in printed
        assert all(variant["difference"] < 0.1 for variant in row["rows"])
        assert {round(layer["sparsity"], 1) for layer in row["choice"]["layers"]} == {0.9}


def test_the_figures_of_the_page_are_those_of_the_files(benchmark):
    results = SCRIPT.parent / "results" / "inference"
    stored = {file.stem: json.loads(file.read_text())["rows"] for file in results.glob("*.json")}
    known = [*benchmark.runtimes_table(stored["runtimes-1threads"]).splitlines()]
    for name in ("layers-1threads", "layers-2threads"):
        assert {kernel for row in stored[name] for kernel in row["seconds"]} <= KERNELS.keys()
        known += benchmark.layers_table(stored[name]).splitlines()
    shown = [line for line in PAGE.splitlines() if line.startswith(("| 768 |", "| ONNX", "| OpenVINO", "| torch"))]
    assert len(shown) > 30
    assert set(shown) <= set(known)
    models = {(row["model"], row["phase"]): row["rows"] for row in stored["models-1threads"]}
    for text, key in (("BERT", ("BertForSequenceClassification", "forward")), ("GPT-2", ("GPT2LMHeadModel", "token"))):
        lines = [line for line in PAGE.splitlines() if line.startswith(f"| {text}") and " token" in line]
        assert len(lines) == len(models[key])
        for line, row in zip(lines, models[key], strict=True):
            assert f"| {row['variant']}" in line
            assert line.endswith(f"| {1e3 * row['seconds']:.1f} | {row['over_best_dense']:.2f} |")
