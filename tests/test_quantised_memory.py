"""The benchmark of memory on quantised bases measures what it says, and docs/quantisation.md quotes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quantised_memory import COMPARED, PLAIN, dequantised, in_own_process, memory_of, parse, table
from benchmarks.scale import SCRATCH, Layer

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results" / "quantised_memory").glob("*.json"))
TINY = ["--width", "128", "--intermediate", "192", "--layers", "1", "--tokens", "8"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_quotes_what_was_measured(path: Path) -> None:
    assert table(json.loads(path.read_text())) in (ROOT / "docs" / "quantisation.md").read_text()


def test_something_was_measured() -> None:
    assert RESULTS


@pytest.mark.parametrize("method", COMPARED)
def test_the_formula_counts_layers_and_activations(method: str) -> None:
    options = parse(TINY)
    options.base, options.method = PLAIN, method
    found = memory_of(options)
    if method == "lora":
        assert found["predicted"] is None
        return
    # Four projections of attention, of which keys and values have half the heads, and three of the feed-forward.
    shapes = [(128, 128)] * 2 + [(64, 128)] * 2 + [(192, 128)] * 2 + [(128, 192)]
    layers = [Layer(*shape, tokens=8) for shape in shapes]
    activations = 4 * 8 * 128 + 4 * 8 * (8 * 128 + 4 * 192)
    beyond = sum(layer.state() for layer in layers) + 4 * 128 * 192 + SCRATCH + activations
    assert found["predicted"] - found["base"] == beyond
    assert dequantised(layers[-1], 4, "torchao-int8") == 4 * 128 * 192


def test_quantising_saves_what_it_should() -> None:
    pytest.importorskip("torchao")
    options = parse(["--width", "1024", "--intermediate", "4096", "--layers", "2", "--tokens", "8"])
    plain, quantised = (in_own_process(base, "ours", options) for base in (PLAIN, "torchao-int8"))
    saved = 3 * 2 * (3 * 1024 * 1024 + 3 * 1024 * 4096)  # bytes: three of four, in every adapted weight
    assert plain["base"] - quantised["base"] == pytest.approx(saved, rel=0.1)
    assert plain["peak"] - quantised["peak"] > 0.5 * saved
