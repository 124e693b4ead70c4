"""The sizes that docs/compact-files.md quotes: made by the committed script, and counted as the format says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_models import BERT
from transformers import BertConfig

from benchmarks.compact_sizes import SPARSITIES, measure, table

ROOT = Path(__file__).parents[1]


def test_the_figures_of_the_page_are_those_of_the_file() -> None:
    stored = json.loads((ROOT / "benchmarks/results/compact_sizes/compact_sizes.json").read_text(encoding="utf-8"))
    assert [row["sparsity"] for row in stored["rows"]] == list(SPARSITIES)
    assert table(stored["rows"]) in (ROOT / "docs/compact-files.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sizes_are_those_of_the_format(sparsity: float, tmp_path: Path) -> None:
    row = measure(BertConfig(**BERT), sparsity, tmp_path)
    shapes = 2 * [*[(16, 16)] * 4, (24, 16), (16, 24)]
    weights = [math.prod(shape) for shape in shapes]
    zeros = [int(sparsity * number) for number in weights]
    assert (row["matrices"], row["zeros"], row["matrices_dense"]) == (12, sum(zeros), 2 * sum(weights))
    kept = sum(weights) - sum(zeros)
    assert row["matrices_compact"] == sum(-(-number // 8) for number in weights) + 2 * kept
    saved = row["file_dense"] - row["file_compact"]
    assert saved == pytest.approx(row["matrices_dense"] - row["matrices_compact"], abs=4000)  # names and shapes
