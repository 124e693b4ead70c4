"""`peft-pst bench`, called as on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from tiny_models import tiny_bert, tiny_gpt2
from transformers import T5Config, T5ForConditionalGeneration

from peft_pst import PSTConfig
from peft_pst.cli import main
from peft_pst.cli.latency import Measurement, Row
from peft_pst.plots import plot_latency

QUICK = ["--repeats", "1", "--tokens", "6"]
ON_CPU = ["float32", "packed float32", "bfloat16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier as `base`, `adapter` and `merged`, and a merged tiny GPT-2 as `gpt2`."""
    folder = tmp_path_factory.mktemp("bench")
    config = PSTConfig(task_type="SEQ_CLS", target_sparsity=0.9, initial_sparsity=0.9, r=2, score_rank=2)
    base = tiny_bert()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, config)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    adapted = get_peft_model(tiny_gpt2(), PSTConfig(target_sparsity=0.9, initial_sparsity=0.9, r=2, score_rank=2))
    adapted.merge_and_unload().save_pretrained(folder / "gpt2")
    return folder


def bench(path: Path, output: Path, *more: str) -> list[dict]:
    assert main(["bench", str(path), "--output", str(output), *QUICK, *more]) == 0
    return json.loads((output / "bench.json").read_text())["measurements"]


def test_an_adapter(folders, tmp_path, capsys):
    measurements = bench(folders / "adapter", tmp_path / "out", "--batch_size", "1", "3")
    printed = capsys.readouterr().out
    assert [(m["batch_size"], m["tokens"], m["phase"]) for m in measurements] == [(1, 6, "forward"), (3, 6, "forward")]
    for measurement in measurements:
        rows = {row["variant"]: row for row in measurement["rows"]}
        assert {*ON_CPU, "adapter float32", "sparse float32", "sparse bfloat16"} <= rows.keys()
        dense = {name: row["seconds"] for name, row in rows.items() if row["is_dense"]}
        assert measurement["best_dense"] == min(dense, key=dense.__getitem__)
        assert "adapter float32" not in dense
        for name, row in rows.items():
            assert row["per_second"] == pytest.approx(measurement["batch_size"] / row["seconds"])
            assert row["over_best_dense"] == pytest.approx(min(dense.values()) / row["seconds"])
            assert row["difference"] < (0.1 if "bfloat16" in name else 1e-4)
        assert len(measurement["choice"]["layers"]) == 12
        assert {layer["rows"] for layer in measurement["choice"]["layers"]} == {6 * measurement["batch_size"]}
        assert measurement["verdict"] in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (tmp_path / "out" / "bench.md").read_text().count("| sparse float32 (") == 2
    with Image.open(tmp_path / "out" / "bench.png") as picture:
        assert picture.format == "PNG"


def test_a_merged_and_a_shrunk_folder(folders, tmp_path):
    (measurement,) = bench(folders / "merged", tmp_path, "--shrunk", str(folders / "merged"), "--json")
    rows = {row["variant"]: row for row in measurement["rows"]}
    assert {"shrunk float32", "shrunk bfloat16", "shrunk packed float32"} <= rows.keys()
    assert rows["shrunk float32"]["difference"] == 0
    assert "adapter float32" not in rows


def test_a_model_that_continues_texts(folders, tmp_path):
    prompt, token = bench(folders / "gpt2", tmp_path, "--batch_size", "2")
    assert (prompt["phase"], token["phase"]) == ("prompt", "token")
    assert {layer["rows"] for layer in prompt["choice"]["layers"]} == {12}
    assert {layer["rows"] for layer in token["choice"]["layers"]} == {2}
    for measurement in (prompt, token):
        assert {row["variant"]: row["difference"] < 1e-4 for row in measurement["rows"]}["sparse float32"]


def made(**seconds: float) -> Measurement:
    """Rows with these seconds; sparse with all layers replaced but where the name ends in "idle"."""
    rows = []
    for name, took in seconds.items():
        layers = (0 if name.endswith("idle") else 12, 12) if name.startswith("sparse") else None
        is_dense = not name.startswith(("sparse", "shrunk", "adapter"))
        rows.append(Row(name, is_dense, took, 1 / took, 0.0, layers))
    return Measurement(1, 128, "token", tuple(rows), None)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        ({"float32": 2.0, "bfloat16": 1.0, "sparse": 0.5}, "pays. sparse is 2.00 times as fast as bfloat16, the best"),
        ({"float32": 2.0, "sparse": 3.0, "shrunk": 1.0}, "pays. shrunk is 2.00 times as fast as float32, the best"),
        (
            {"float32": 2.0, "bfloat16": 1.0, "sparse": 1.5},
            "does not pay. The best dense choice, bfloat16, takes",
        ),
        ({"float32": 1.0, "sparse": 0.96}, "does not pay."),
        ({"float32": 1.0, "sparse idle": 0.5}, "does not pay. No sparse kernel beats the best dense one in any layer."),
        ({"float32": 1.0, "adapter": 0.1, "sparse": 2.0}, "does not pay."),
    ],
)
def test_the_verdict(seconds, says):
    measurement = made(**seconds)
    assert f"1 x 128 tokens, token: sparsity {says}" in measurement.verdict()
    assert measurement.to_table().count("(best dense)") == measurement.to_markdown().count("(best dense)") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent"], "'absent' is not a folder; pass that of an adapter or of a checkpoint."),
        (["{merged}", "--shrunk", "absent"], "'absent' is not a folder"),
        (["{merged}", "--base_model", "x"], "--base_model 'x' is for adapters, but"),
        (["{merged}", "--tokens", "20"], "--tokens 20: the model reads fewer than 20; pass less."),
        (["{merged}", "--tokens", "0"], "argument --tokens: invalid number of 1 or more value: '0'"),
        (["{empty}"], "could not be loaded"),
        (["{t5}"], "holds a T5ForConditionalGeneration; this command measures models that read tokens and have no"),
        (["{merged}", "--output", "/proc/x"], "cannot write to '/proc/x'"),
    ],
)
def test_mistakes_are_said_in_one_line(folders, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    if arguments == ["{t5}"]:
        config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        capsys.readouterr()  # a progress bar
    places = {"merged": folders / "merged", "empty": tmp_path / "empty", "t5": tmp_path / "t5"}
    assert main(["bench", "--repeats", "1", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (folders / "merged" / "bench").exists()


def test_the_picture_needs_something_to_compare_with(tmp_path):
    with pytest.raises(ValueError, match="Every panel needs a dense form"):
        plot_latency({"1 token": [("sparse", 1.0, False)]}, tmp_path / "bench.png")
    with pytest.raises(ValueError, match="Every panel needs a dense form"):
        plot_latency({}, tmp_path / "bench.png")


def test_threads(folders, tmp_path):
    before = torch.get_num_threads()
    try:
        bench(folders / "merged", tmp_path, "--threads", "1")
        assert json.loads((tmp_path / "bench.json").read_text())["threads"] == 1
    finally:
        torch.set_num_threads(before)
