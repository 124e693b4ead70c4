"""`peft-pst merge`: the checkpoint it writes, read by stock transformers, and every mistake it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_bert, save_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    PreTrainedModel,
)

import peft_pst.cli
from peft_pst import PSTConfig, update_sparsity
from peft_pst.cli.labels import Labels
from peft_pst.folders import replaced_folder
from peft_pst.masking import num_pruned

TEXTS = ["the film was good", "a plot"]
LABELS = Labels("single_label_classification", ("bad", "fair", "good"))


def add_adapter(base: PreTrainedModel, folder: Path, pruned: bool = True, seed: int = 0, **config: object) -> PeftModel:
    """Save an adapter with random factors, as training leaves them, at its target sparsity."""
    torch.manual_seed(seed)
    model = get_peft_model(base, PSTConfig(target_sparsity=0.7, r=2, score_rank=2, **config)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    if pruned:
        update_sparsity(model, step=1, total_steps=1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def classifier(bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A saved adapter of three labels, and the logits of its model."""
    folder = tmp_path_factory.mktemp("classifier")
    model = add_adapter(
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), folder, task_type="SEQ_CLS"
    )
    LABELS.save(folder)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def merge(*arguments: str | Path) -> int:
    return peft_pst.cli.main(["merge", *map(str, arguments)])


def adapted(name: str) -> bool:
    return ".layer." in name and name.endswith("weight") and "LayerNorm" not in name


# What is written


@pytest.mark.slow
def test_stock_transformers_load_the_checkpoint(classifier: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    adapter, expected = classifier
    output = tmp_path / "merged"
    assert merge(adapter, output) == 0
    program = (
        "import sys, torch; from safetensors.torch import save_file\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "torch.set_num_threads(1)\n"
        "folder, texts, target = sys.argv[1], sys.argv[2:-1], sys.argv[-1]\n"
        "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "with torch.no_grad(): logits = model(**tokenizer(texts, padding=True, return_tensors='pt')).logits\n"
        "assert 'peft_pst' not in sys.modules\n"
        "assert model.config.id2label == {0: 'bad', 1: 'fair', 2: 'good'}, model.config.id2label\n"
        "save_file({'logits': logits}, target)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(output), *TEXTS, str(tmp_path / "logits.safetensors")],
        check=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_zeros_are_exact_and_reported(
    classifier: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert merge(classifier[0], output) == 0
    tensors = {name: tensor for name, tensor in load_file(output / "model.safetensors").items() if adapted(name)}
    report = json.loads((output / "pst_report.json").read_text(encoding="utf-8"))
    assert len(tensors) == 12
    assert {f"{layer['name']}.weight": layer["zeros"] for layer in report["layers"]} == {
        name: int((tensor == 0).sum()) for name, tensor in tensors.items()
    }
    assert all(int((tensor == 0).sum()) == num_pruned(tensor.numel(), 0.7) for tensor in tensors.values())
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json",
        "model.safetensors",
        "pst_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "pst" not in (output / "config.json").read_text(encoding="utf-8")
    printed = capsys.readouterr()
    assert f"Sparsity of {output}" in printed.out
    assert "Unloading and merging model" in printed.err  # the progress bar


def test_language_model(gpt2: str, tmp_path: Path) -> None:
    model = add_adapter(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "adapter", task_type="CAUSAL_LM")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert merge(tmp_path / "adapter", tmp_path / "merged") == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, expected)
    # The adapter has no tokenizer, so the base's goes with it, and what it pads with.
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "[EOS]"


def test_class_is_found_without_a_task(bert: str, tmp_path: Path) -> None:
    masked = save_bert(tmp_path / "base", BertForMaskedLM)
    add_adapter(BertForMaskedLM.from_pretrained(masked), tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "merged") == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForMaskedLM"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision(classifier: tuple[Path, torch.Tensor], tmp_path: Path, dtype: str) -> None:
    assert merge(classifier[0], tmp_path / "exact") == 0
    assert merge(classifier[0], tmp_path / "merged", "--dtype", dtype) == 0
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "merged"))
    assert [name for name in exact if not torch.equal(exact[name].to(getattr(torch, dtype)), rounded[name])] == []
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_base_that_has_moved(classifier: tuple[Path, torch.Tensor], bert: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(classifier[0], adapter)
    rewrite_config(adapter, base_model_name_or_path="/somewhere/else")
    assert merge(adapter, tmp_path / "merged", "--base_model", bert) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_two_adapters_together(gpt2: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        base = AutoModelForCausalLM.from_pretrained(gpt2)
        add_adapter(base, tmp_path / "both" / name, seed=seed, task_type="CAUSAL_LM")
    assert merge(tmp_path / "both", tmp_path / "merged", "--adapter_name", "first", "--adapter_name", "second") == 0
    zero = {}
    for name in ("first", "second"):
        assert merge(tmp_path / "both", tmp_path / name, "--adapter_name", name) == 0
        tensors = load_file(tmp_path / name / "model.safetensors")
        zero[name] = {key: tensor == 0 for key, tensor in tensors.items() if ".h." in key and tensor.ndim == 2}
    assert len(zero["first"]) == 8
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[key] == 0, zero["first"][key] | zero["second"][key]) for key in zero["first"])


def test_two_heads(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        base = AutoModelForSequenceClassification.from_pretrained(bert)
        add_adapter(base, tmp_path / name, task_type="SEQ_CLS")
    output = tmp_path / "merged"
    names = ["--adapter_name", "first", "--adapter_name", "second"]
    assert "brings modules of its own (classifier, score)" in refused(capsys, output, tmp_path, output, *names)


def test_schedule_that_never_moved_is_said_loudly(
    bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    add_adapter(base, tmp_path / "adapter", pruned=False, task_type="SEQ_CLS")
    with pytest.warns(UserWarning, match="prunes nothing: its sparsity is still 0 although its target is 0.7"):
        assert merge(tmp_path / "adapter", tmp_path / "merged") == 0
    assert "below target" in capsys.readouterr().out


# An output that is there already


def test_existing_output_is_replaced_only_when_said(
    classifier: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert merge(classifier[0], output) == 0
    (output / "stale.txt").write_text("", encoding="utf-8")
    assert merge(classifier[0], output) == 2
    assert "exists already; pass another folder, or --overwrite to replace it" in capsys.readouterr().err
    assert (output / "stale.txt").exists()
    assert merge(classifier[0], output, "--overwrite") == 0
    assert not (output / "stale.txt").exists()
    assert os.listdir(tmp_path) == ["merged"]


def test_failure_leaves_the_old_output_whole(
    classifier: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    assert merge(classifier[0], output) == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full_disk)
    assert merge(classifier[0], output, "--overwrite") == 2
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert os.listdir(tmp_path) == ["merged"]


def test_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "old.txt").write_text("old", encoding="utf-8")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk gone"), replaced_folder(output):
        pass
    assert [file.name for file in output.iterdir()] == ["old.txt"]


# Mistakes: one line, status 2, and nothing written


def rewrite_config(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str | Path) -> str:
    before = sorted(output.parent.iterdir())
    assert merge(*arguments) == 2
    assert sorted(output.parent.iterdir()) == before
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("peft-pst merge: error: ")
    assert "Traceback" not in error
    return last


@pytest.fixture
def copied(classifier: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    shutil.copytree(classifier[0], tmp_path / "adapter")
    return tmp_path / "adapter"


def test_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    assert "is not a folder" in refused(capsys, output, tmp_path / "absent", output)
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refused(capsys, output, tmp_path / "empty", output)


def test_adapter_of_another_type(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    output = tmp_path / "merged"
    assert "holds an adapter of type LORA" in refused(capsys, output, tmp_path / "lora", output)


def test_base_of_other_shapes(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = save_bert(tmp_path / "wide", hidden_size=32)
    output = tmp_path / "merged"
    message = refused(capsys, output, copied, output, "--base_model", wide)
    assert "does not fit base model" in message
    assert "pass the base it was trained on with --base_model" in message


def test_base_that_is_not_there(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    assert "is not a folder; pass --base_model" in refused(capsys, output, copied, output, "--base_model", "./absent")
    rewrite_config(copied, base_model_name_or_path=None)
    assert "does not name its base model; pass --base_model" in refused(capsys, output, copied, output)


def test_damaged_files(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    weights = copied / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in refused(capsys, output, copied, output)
    weights.unlink()
    assert "has no adapter_model.safetensors" in refused(capsys, output, copied, output)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    count = next(name for name in tensors if name.endswith("pst_num_pruned"))
    save_file({**tensors, count: torch.tensor(10**6)}, weights)
    assert "pst_num_pruned=1000000 is outside" in refused(capsys, output, copied, output)
    weights.write_bytes(whole)
    (copied / "labels.json").write_text("{}", encoding="utf-8")
    assert "labels.json is damaged" in refused(capsys, output, copied, output)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"pst_R": float("inf")}, "pst_R holds a NaN or an infinity"),
        # Each is finite, and their sum is not.
        ({"pst_R": 3e38, "pst_C": 3e38}, "The adapter default seems to be broken"),
    ],
    ids=["stored", "overflow"],
)
def test_broken_adapter(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, float], problem: str
) -> None:
    tensors = load_file(copied / "adapter_model.safetensors")
    for part, value in values.items():
        tensors[next(name for name in sorted(tensors) if name.endswith(part))][0] = value
    save_file(tensors, copied / "adapter_model.safetensors")
    output = tmp_path / "merged"
    assert problem in refused(capsys, output, copied, output, "--safe_merge")


def test_output_that_must_not_be_replaced(
    copied: Path, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"")
    assert "holds something else than a checkpoint" in refused(capsys, other, copied, other, "--overwrite")
    assert "is read from it" in refused(capsys, tmp_path, copied, tmp_path, "--overwrite")
    assert "is read from it" in refused(capsys, Path(bert), copied, bert, "--overwrite")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file; pass a folder" in refused(capsys, tmp_path, copied, tmp_path / "file")


def test_unknown_option(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    assert "--dtype: invalid choice: 'int3'" in refused(capsys, output, copied, output, "--dtype", "int3")
    assert "--fast is not an option; see peft-pst merge --help." in refused(capsys, output, copied, output, "--fast")


def test_adapters_inside_are_listed(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    assert "adapters inside it: adapter" in refused(capsys, output, tmp_path, output)


def test_labels_by_number_without_a_labels_file(copied: Path, tmp_path: Path) -> None:
    (copied / "labels.json").unlink()
    assert merge(copied, tmp_path / "merged") == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"]) == ["0", "1", "2"]


def test_base_without_tokenizer(gpt2: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(gpt2).save_pretrained(tmp_path / "base")
    add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="Neither the adapter nor the base has a tokenizer"):
        assert merge(tmp_path / "adapter", tmp_path / "merged") == 0
    save_tokenizer(tmp_path / "adapter", eos_token="[EOS]", pad_token="[PAD]")
    assert merge(tmp_path / "adapter", tmp_path / "merged", "--overwrite") == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["pad_token_id"] == 0
