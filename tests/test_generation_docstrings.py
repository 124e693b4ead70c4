"""The examples in the docstrings of the generation half of the results harness."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["cider", "linearise", "perplexity", "text_metrics"])
def test_examples_run(name: str) -> None:
    if name == "text_metrics":
        pytest.importorskip("sacrebleu")
    results = doctest.testmod(importlib.import_module(f"benchmarks.results.generation.{name}"))
    assert results.attempted
    assert not results.failed
