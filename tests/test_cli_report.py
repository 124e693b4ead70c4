"""`peft-pst report`, called as on the command line."""

import json
import shutil
import sys
import tempfile

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from peft_pst import PSTConfig
from peft_pst.cli import main
from peft_pst.cli.report import print_text, report_adapter
from peft_pst.report import REPORT_NAME, SparsityReport, report_checkpoint, report_model

PNG = b"\x89PNG"
QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders `base`, `adapter` and `merged` of a tiny model, pruned to the half."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, PSTConfig(task_type="SEQ_CLS", target_sparsity=0.5, r=2, score_rank=2))
    model.update_sparsity(10, total_steps=10)
    model.save_pretrained(folder / "adapter")
    promise = report_model(model)
    model.merge_and_unload().save_pretrained(folder / "merged")
    promise.save(folder / "merged" / REPORT_NAME)
    return folder


def test_an_adapter_folder(made, tmp_path, capsys):
    assert main(["report", str(made / "adapter"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert f"Sparsity of {made / 'adapter'}" in printed.out
    assert printed.out.count("✓") == 13
    assert "50.00 %" in printed.out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "kept_weights.png",
        "layer_sparsity.png",
        "report.json",
    ]
    for file in (tmp_path / "out").glob("*.png"):
        with Image.open(file) as picture:
            assert (picture.format, picture.mode) == ("PNG", "P")  # a palette, for files of a third of the size
    report = SparsityReport.load(tmp_path / "out" / "report.json")
    assert report == report_adapter(made / "adapter")[0]
    assert report.zeros == report.weights // 2
    assert report.files == {
        name: (made / "adapter" / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    tensors = load_file(made / "adapter" / "adapter_model.safetensors")
    assert report.trainable_parameters == sum(
        tensor.numel() for name, tensor in tensors.items() if "pst_num_pruned" not in name
    )


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_folder_gives_the_same_zeros(made, tmp_path, capsys):
    assert main(["report", str(made / "merged"), "--output", str(tmp_path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    adapter, _ = report_adapter(made / "adapter")
    assert values["zeros"] == adapter.zeros
    assert SparsityReport.from_dict(values).layers == adapter.layers
    assert values == json.loads((tmp_path / "report.json").read_text())


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_that_lost_zeros_is_flagged(made, tmp_path, capsys):
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    state = load_file(merged / "model.safetensors")
    state[f"{QUERY}.weight"] += 1e-3
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    assert main(["report", str(merged)]) == 0
    assert f"✗ {QUERY} holds 0 zeros, 128 fewer than were put there" in capsys.readouterr().out
    assert SparsityReport.load(merged / "report" / "report.json").lost_zeros[0].name == QUERY


def test_one_file_and_the_default_folder_beside_it(made, tmp_path, capsys):
    shutil.copy(made / "base" / "model.safetensors", tmp_path)
    assert main(["report", str(tmp_path / "model.safetensors"), "--all"]) == 0
    assert "not known" in capsys.readouterr().out
    assert (tmp_path / "report" / "layer_sparsity.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_layer_drawn_can_be_chosen_by_the_end_of_its_name(made, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "peft_pst.cli.report.plot_kept_weights",
        lambda mask, path, title: drawn.append((title, mask)) or path,
    )
    for folder in ("adapter", "merged"):
        assert main(["report", str(made / folder), "--output", str(tmp_path), "--layer", "1.attention.self.query"]) == 0
    assert [title for title, _ in drawn] == [QUERY, QUERY]
    weight = load_file(made / "merged" / "model.safetensors")[f"{QUERY}.weight"]
    assert all(torch.equal(mask, weight != 0) for _, mask in drawn)


def test_the_longest_training_log_is_drawn(made, tmp_path, monkeypatch):
    adapter = shutil.copytree(made / "adapter", tmp_path / "adapter")
    for step in (9, 10, 8):
        (adapter / f"checkpoint-{step}").mkdir()
        history = [{"loss": 1 / i, "sparsity": i / 20, "step": i} for i in range(1, step + 1)]
        (adapter / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    seen = []
    monkeypatch.setattr("peft_pst.cli.report.plot_training", lambda history, path: seen.append(history) or path)
    assert main(["report", str(adapter)]) == 0
    assert len(seen[0]) == 10
    monkeypatch.undo()
    assert main(["report", str(adapter)]) == 0
    assert (adapter / "report" / "training.png").read_bytes().startswith(PNG)


def refused(capsys, *arguments):
    """The one line of an error."""
    assert main(["report", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-pst report: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_errors_are_one_line_and_write_nothing(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", "--output", out)
    assert "holds no safetensors files" in refused(capsys, tmp_path, "--output", out)
    assert "is for adapters" in refused(capsys, made / "base", "--base_model", "x", "--output", out)
    assert "is not a folder; pass --base_model" in refused(
        capsys, made / "adapter", "--base-model", "./x", "--output", out
    )
    assert "--layer 'atention.query' is not a layer of the model; try bert.encoder" in refused(
        capsys, made / "merged", "--layer", "atention.query", "--output", out
    )
    assert "--layer 'dense' means" in refused(capsys, made / "merged", "--layer", "dense", "--output", out)
    assert "required: PATH" in refused(capsys)
    assert "--wrong is not an option; see peft-pst report --help." in refused(capsys, made / "base", "--wrong")
    (tmp_path / "file").write_text("")
    assert "file' is not a folder; name another folder with --output" in refused(
        capsys, made / "merged", "--output", tmp_path / "file" / "sub"
    )
    assert not out.exists()


def test_damaged_files_are_named(made, tmp_path, capsys):
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    (merged / "trainer_state.json").write_text("{")
    assert "trainer_state.json' is damaged" in refused(capsys, merged)
    (merged / "trainer_state.json").unlink()
    (merged / REPORT_NAME).write_text("{}")
    assert f"{REPORT_NAME}' cannot be read: this is not a sparsity report" in refused(capsys, merged)
    (merged / "model.safetensors").write_bytes(b"")
    (merged / REPORT_NAME).unlink()
    assert "model.safetensors' is damaged" in refused(capsys, merged)
    save_file({"bias": torch.ones(3)}, merged / "model.safetensors")
    assert "holds no floating-point matrices" in refused(capsys, merged)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(made, monkeypatch, capsys):
    def deny(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", deny)
    monkeypatch.setattr("peft_pst.cli.report.report_checkpoint", report_checkpoint_is_not_called)
    assert "Permission denied; name another folder with --output" in refused(capsys, made / "merged")


def report_checkpoint_is_not_called(*args, **kwargs):
    raise AssertionError("counted although nothing can be written")


def test_a_disk_that_fails_while_writing(made, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    assert "No space left on device" in refused(capsys, made / "merged", "--output", tmp_path)


def test_without_matplotlib_the_extra_is_named(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'peft-pst[cli]'" in refused(capsys, made / "merged")


def test_terminals_without_unicode_get_plain_signs(monkeypatch, tmp_path, made):
    report = report_checkpoint(made / "merged")
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        print_text(report.to_table())
    text = (tmp_path / "terminal").read_text(encoding="ascii")
    assert "##########----------" in text
    assert text.count(" ok\n") == 13
    assert "?" not in text
