"""The inference benchmark: its sides compute the same thing, and its tables and files hold what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from peft_pst.sparse_kernels import KERNELS

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "inference.py"
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


def test_what_is_committed_can_be_read(benchmark):
    folder = SCRIPT.parent / "results" / "inference"
    files = sorted(folder.glob("layers-*.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text())["rows"]
        assert {name for row in rows for name in row["seconds"]} <= KERNELS.keys()
        assert benchmark.layers_table(rows)
