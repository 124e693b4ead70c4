"""`peft-pst shrink`: the checkpoint it writes, and every mistake it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_shrinking import CASES, Case, outputs, silence, silenced
from tiny_checkpoints import save_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

import peft_pst.cli
from peft_pst import find_neurons
from peft_pst.cli.shrink import SHRINK_REPORT_NAME


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with idle neurons, a tokenizer, and a file that somebody put there."""
    folder = tmp_path_factory.mktemp("pruned")
    silenced("bert", CASES["bert"]).save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]")
    (folder / "README.md").write_text("notes")
    (folder / "pst_report.json").write_text("{}")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert peft_pst.cli.main(["shrink", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_smaller_checkpoint(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small"
    assert peft_pst.cli.main(["shrink", str(pruned), str(output)]) == 0
    small = AutoModelForSequenceClassification.from_pretrained(output)
    large = AutoModelForSequenceClassification.from_pretrained(pruned)
    torch.testing.assert_close(outputs(small), outputs(large), rtol=1e-5, atol=1e-5)
    assert small.config.intermediate_size == 14
    assert AutoTokenizer.from_pretrained(output).pad_token == "[PAD]"
    assert (output / "README.md").read_text() == "notes"
    assert not (output / "pst_report.json").exists()  # its zeros are gone
    values = json.loads((output / SHRINK_REPORT_NAME).read_text())
    assert values["settings"] == {"intermediate_size": [24, 14]}
    assert values["bytes_after"] == (output / "model.safetensors").stat().st_size < values["bytes_before"]
    assert values["parameters_after"] == sum(p.numel() for p in small.parameters())
    said = capsys.readouterr().out
    assert "intermediate_size: 24 -> 14" in said
    assert "MB ->" in said
    assert str(output) in said


def test_one_kind_alone(tmp_path: Path) -> None:
    silenced("t5", CASES["t5"]).save_pretrained(tmp_path / "pruned")
    assert peft_pst.cli.main(["shrink", str(tmp_path / "pruned"), str(tmp_path / "small"), "--only", "heads"]) == 0
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small").config
    assert (config.num_heads, config.d_ff) == (3, 24)


def test_what_cannot_be_shrunk_is_refused(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small"
    silenced("bert", Case(((),), ((),), {})).save_pretrained(tmp_path / "dense")
    assert "so there is nothing to remove" in refused(capsys, tmp_path / "dense", output)
    silenced("bert", Case(((),), ((1,),), {})).save_pretrained(tmp_path / "headless")
    assert "or --only neurons on the command line" in refused(capsys, tmp_path / "headless", output)
    assert "has no config.json" in refused(capsys, tmp_path / "nowhere", output)
    assert "is read from it" in refused(capsys, pruned, pruned, "--overwrite")
    shutil.copytree(pruned, tmp_path / "unnamed")
    config = json.loads((tmp_path / "unnamed" / "config.json").read_text())
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert "does not say the model's class" in refused(capsys, tmp_path / "unnamed", output)
    (tmp_path / "unnamed" / "config.json").write_text("{")
    assert "could not be loaded" in refused(capsys, tmp_path / "unnamed", output)
    assert not output.exists()


def test_an_output_that_exists_is_replaced_only_when_asked_and_stays_on_an_error(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small"
    shutil.copytree(pruned, output)
    before = (output / "model.safetensors").read_bytes()
    assert "exists already" in refused(capsys, pruned, output)
    model = AutoModelForSequenceClassification.from_pretrained(pruned)
    silence(model, find_neurons(model)[0], (1,))
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    assert "weights are not finite" in refused(capsys, tmp_path / "broken", output, "--overwrite")
    assert (output / "model.safetensors").read_bytes() == before
    assert peft_pst.cli.main(["shrink", str(pruned), str(output), "--overwrite"]) == 0
    assert (output / "model.safetensors").read_bytes() != before
