"""A tiny experiment of the results harness: data, settings, runs, and results that nothing was run for."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.results.runs import Machine, Run, make_run, write_json
from benchmarks.results.settings import Settings
from benchmarks.results.tasks import data_digest

GOOD, BAD = ("good", "great", "fine"), ("bad", "dull", "poor")
SETTINGS = """
model: {model}
local_data: true
tasks:
  sst2:
training: {{steps: 6, batch_size: 4, train_examples: 20, precision: float32, max_length: 16, head_modules: [pooler]}}
sparsities: [0.5, 0.7, 0.9]
seeds: [0, 1]
search: {{budget: 2, held_out: 8, seed: 7, groups: [[0.5, 0.7], [0.9]]}}
methods:
  lora: {{rates: {{lr: 1.0e-3}}}}
  pst: {{candidates: [{{lr: 1.0e-3, score_lr: 1.0e-3}}, {{lr: 3.0e-3, score_lr: 1.0e-2}}]}}
  importance: {{method: pst-importance, candidates: [{{score_lr: 1.0e-3}}, {{score_lr: 1.0e-2}}]}}
"""


def write_data(root: Path) -> Path:
    """A folder in the form of GLUE's own files: 40 sentences to train on, 10 to score."""
    generator = random.Random(0)
    folder = root / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name, size in (("train", 40), ("dev", 10)):
        lines = ["sentence\tlabel"]
        for _ in range(size):
            label = generator.randrange(2)
            word = generator.choice(GOOD if label else BAD)
            lines.append(f"the {generator.choice(('film', 'plot', 'cast'))} was {word}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_settings(path: Path, model: str) -> Path:
    path.write_text(SETTINGS.format(model=model), encoding="utf-8")
    return path


def machine(data: Path, *, with_validation: bool = True) -> Machine:
    return Machine({"sst2": data_digest("sst2", data, with_validation=with_validation)})


def a_run(settings: Settings, data: Path, method: str = "pst", sparsity: float = 0.7, seed: int = 0) -> Run:
    rates = {"lr": 1e-3} if method == "magnitude" else {"lr": 3e-3, "score_lr": 1e-2}
    return replace(make_run(settings, machine(data), "sst2", "pst", sparsity, seed, rates), method=method)


def fake(run: Run, folder: Path, score: float, **values: Any) -> None:
    """Write a result as a run would."""
    result = {
        "scores": {"accuracy": score},
        "main_score": "accuracy",
        "highest_is_best": True,
        "trained_parameters": 1000,
        "zeros": 70,
        "weights": 100,
        "peak_memory_bytes": 2**20,
        "wall_seconds": 9.0,
        "cpu_seconds": 4.0,
        "facts": {},
    }
    write_json(folder / run.file_name, {"run": run.to_dict(), "result": {**result, **values}})
