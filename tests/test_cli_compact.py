"""`peft-pst compact` and `peft-pst expand`, called as on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_bert
from transformers import AutoTokenizer, BertModel

from peft_pst import load_compact
from peft_pst.cli import main


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    folder = Path(save_bert(tmp_path / "pruned", intermediate_size=256))
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if "encoder" in key and tensor.dim() == 2:
            tensor[tensor.abs() < tensor.abs().quantile(0.9)] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_there_and_back(pruned, tmp_path, capsys):
    small, dense = str(tmp_path / "small"), str(tmp_path / "dense")
    assert main(["compact", str(pruned), small]) == 0
    said = capsys.readouterr().out
    assert "tensors are packed: " in said
    assert f"load_compact({small!r})" in said
    assert main(["expand", small, dense, "--max-shard-size", "20KB"]) == 0
    assert "from_pretrained()" in capsys.readouterr().out
    expected = BertModel.from_pretrained(pruned)
    for model in (load_compact(small), BertModel.from_pretrained(dense)):
        for key, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key
    assert len([*Path(dense).glob("model-*.safetensors")]) > 1
    for folder in (small, dense):
        assert AutoTokenizer.from_pretrained(folder)("the film was good")["input_ids"]


def test_a_compact_folder_is_reported_with_what_it_saves(pruned, tmp_path, capsys):
    assert main(["compact", str(pruned), str(tmp_path / "small")]) == 0
    arguments = ["report", str(tmp_path / "small"), "--against", str(pruned), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "in theory 1/32 + (1 - 0." in printed
    assert "are still zero" in printed
    assert (tmp_path / "out" / "kept_weights.png").is_file()


def test_negative_zeros_can_be_given_up(pruned, tmp_path):
    file = pruned / "model.safetensors"
    save_file({key: -tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"weights are -0\.0"):
        assert main(["compact", str(pruned), str(tmp_path / "exact")]) == 0
    assert main(["compact", str(pruned), str(tmp_path / "small"), "--drop_negative_zeros"]) == 0
    sizes = [(tmp_path / name / "compact.safetensors").stat().st_size for name in ("exact", "small")]
    assert sizes[1] < sizes[0] / 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compact", "{pruned}", "{small}", "--max_shard_size", "tiny"], "max_shard_size='tiny' is no size"),
        (["compact", "{pruned}", "{pruned}", "--overwrite"], "is read from it"),
        (["compact", "{small}", "{other}"], "holds no safetensors files"),
        (["expand", "{pruned}", "{other}"], "is a dense checkpoint"),
        (["expand", "{pruned}"], "the following arguments are required: OUTPUT"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, message, pruned, tmp_path, capsys):
    names = {"pruned": pruned, "small": tmp_path / "small", "other": tmp_path / "other"}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "other").exists()


def test_what_is_there_is_kept_unless_it_is_to_be_replaced(pruned, tmp_path, capsys):
    small = str(tmp_path / "small")
    assert main(["compact", str(pruned), small]) == 0
    assert main(["compact", str(pruned), small]) == 2
    assert "exists already; pass another folder, or --overwrite" in capsys.readouterr().err
    assert main(["compact", str(pruned), small, "--overwrite"]) == 0
