"""Text generation and language modelling in the results harness, on a tiny GPT-2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import disable_progress_bars

from benchmarks.results.generation.linearise import Example
from benchmarks.results.generation.text_metrics import score
from benchmarks.results.runs import Machine, Run, make_run
from benchmarks.results.settings import read_settings
from benchmarks.results.tasks import data_digest, load_task, task_files
from benchmarks.results.tasks.generation import score_groups
from benchmarks.results.train import execute

SETTINGS = """
model: {model}
local_data: true
tasks: {{e2e: , webnlg: , wikitext2: {{max_length: 8}}}}
training:
  {{steps: 4, batch_size: 2, precision: float32, max_length: 24, eval_examples: 3, beams: 2, max_new_tokens: 4}}
sparsities: [0.5]
seeds: [0]
methods:
  magnitude: {{rates: {{lr: 1.0e-3}}}}
"""
WORDS = ("film", "plot", "cast")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [f'"name[the {a}], area[a {b}]",the {a} was {b}' for a in WORDS for b in ("good", "bad", "red")]
    (tmp_path / "e2e").mkdir()
    for name in ("trainset", "testset_w_refs"):
        (tmp_path / "e2e" / f"{name}.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    entries = [
        {"category": category, "triples": [["the", word, "good"]], "lex": [f"a {word}"], "lex_comment": ["good"]}
        for category in ("Airport", "Artist")
        for word in WORDS
    ]
    (tmp_path / "webnlg").mkdir()
    for name in ("train", "test"):
        (tmp_path / "webnlg" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "wikitext-2").mkdir()
    for name in ("valid", "test"):
        (tmp_path / "wikitext-2" / f"{name}.txt").write_text("the film was good \n the plot is bad \n" * 20)
    return tmp_path


@pytest.fixture
def runs(tmp_path: Path, data: Path, gpt2: str) -> dict[str, Run]:
    disable_progress_bars()
    file = tmp_path / "tiny.yaml"
    file.write_text(SETTINGS.format(model=gpt2))
    settings = read_settings(file)
    machine = Machine({task: data_digest(task, data, with_validation=True) for task in settings.tasks})
    return {task: make_run(settings, machine, task, "magnitude", 0.5, 0, {"lr": 1e-3}) for task in settings.tasks}


@pytest.mark.parametrize("task", ["e2e", "webnlg", "wikitext2"])
@pytest.mark.parametrize("searching", [False, True])
def test_a_causal_model_is_trained_pruned_and_scored(
    runs: dict[str, Run], data: Path, task: str, searching: bool
) -> None:
    run = replace(runs[task], split="held_out", held_out=3) if searching else runs[task]
    if searching:  # what the table is scored on is not opened
        task_files(task, data, with_validation=True)[1].unlink()
    result = execute(run, data)
    assert 2 * result["zeros"] == result["weights"]
    if task == "wikitext2":
        assert result["main_score"] == "perplexity"
        assert not result["highest_is_best"]
        assert 1 < result["scores"]["perplexity"] < 100
    else:
        assert {"BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "TER"} <= result["scores"].keys()
        assert result["main_score"] == "BLEU"


def test_no_source_is_both_trained_on_and_held_out(runs: dict[str, Run], data: Path) -> None:
    run = replace(runs["e2e"], split="held_out", held_out=4)
    assert len(load_task(run, data).pool) == 5
    assert len(load_task(replace(run, training=replace(run.training, train_examples=2)), data).pool) == 2


def test_groups_are_scored_apart() -> None:
    texts = ["a red film", "the plot", "one two three"]
    references = ["a red film", "the cast was bad", "one two"]
    groups = ["seen", "unseen", "seen"]
    examples = [Example("x", (text,), group) for text, group in zip(references, groups, strict=True)]
    scores = score_groups(texts, examples)
    for name, value in score(texts, [[text] for text in references]).items():
        assert scores[name] == value
    for name, value in score([texts[0], texts[2]], [[references[0]], [references[2]]]).items():
        assert scores[f"{name} seen"] == value
    assert "BLEU unseen" in scores
    alone = [Example("x", ("a film",), "all")]
    assert score_groups(["a film"], alone) == score(["a film"], [["a film"]])


def test_text_from_data_needs_files(runs: dict[str, Run]) -> None:
    with pytest.raises(ValueError, match="e2e is read from its own files; pass --data FOLDER"):
        load_task(runs["e2e"], None)
