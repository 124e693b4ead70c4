"""Zeros of a reference that are lost: live models, checkpoints and masks of every form, against counts made by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import net, pruned_net, tiny_bert, tiny_gpt2
from torch import Tensor, nn
from transformers import BertModel

from peft_pst import PSTConfig, compact_checkpoint, compare_sparsity, merge_keeping_zeros, report_model
from peft_pst.cli import main
from peft_pst.masking import pack_mask
from peft_pst.report import REPORT_NAME, checkpoint_weight, report_checkpoint


def in_blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and any(part.isdigit() for part in name.split("."))
    }


def prune(model: nn.Module, every: int = 2) -> nn.Module:
    for parameter in in_blocks(model).values():
        parameter.data.view(-1)[::every] = 0
    return model


def spoil(model: nn.Module, name: str, count: int) -> nn.Module:
    """Fill the first `count` zeros of one layer."""
    weight = in_blocks(model)[name].data.view(-1)
    weight[(weight == 0).nonzero()[:count, 0]] = 0.5
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    prune(tiny_bert()).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


LAYER = "bert.encoder.layer.1.attention.self.key"


def references(saved: Path, tmp_path: Path) -> dict[str, object]:
    """The same masks in every form."""
    weights = in_blocks(prune(tiny_bert()))
    keep = {name: parameter.detach() != 0 for name, parameter in weights.items()}
    compact_checkpoint(saved, tmp_path / "small")
    save_file({f"{name}.weight": mask for name, mask in keep.items()}, tmp_path / "masks.safetensors")
    save_file({f"{name}.mask": pack_mask(mask) for name, mask in keep.items()}, tmp_path / "packed.safetensors")
    return {
        "a checkpoint": saved,
        "its file": str(saved / "model.safetensors"),
        "a compact one": tmp_path / "small",
        "a file of masks": tmp_path / "masks.safetensors",
        "a file of packed masks": tmp_path / "packed.safetensors",
        "masks": keep,
        "packed masks": {name: pack_mask(mask) for name, mask in keep.items()},
        "a model": prune(tiny_bert()),
    }


FORMS = [
    "a checkpoint",
    "its file",
    "a compact one",
    "a file of masks",
    "a file of packed masks",
    "masks",
    "packed masks",
]


@pytest.mark.parametrize("form", [*FORMS, "a model"])
@pytest.mark.parametrize("as_files", [False, True])
def test_lost_zeros_are_counted_layer_by_layer(form, as_files, saved, tmp_path):
    reference = references(saved, tmp_path)[form]
    now = spoil(prune(tiny_bert()), LAYER, 7)
    now.save_pretrained(tmp_path / "now")
    comparison = compare_sparsity(tmp_path / "now" if as_files else now, reference)
    assert {row.name: row.lost for row in comparison.layers} == {
        name: 7 if name == LAYER else 0 for name in in_blocks(now)
    }
    for row in comparison.layers:
        assert row.shape == tuple(in_blocks(now)[row.name].shape)
        assert row.reference_zeros == in_blocks(now)[row.name].numel() // 2
    assert comparison.lost == 7
    assert [row.name for row in comparison.lost_layers] == [LAYER]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_lost_where_nothing_was_changed(form, saved, tmp_path):
    now = prune(prune(tiny_bert()), every=3)  # further zeros are no loss
    comparison = compare_sparsity(now, references(saved, tmp_path)[form])
    assert comparison.lost == 0
    assert comparison.lost_layers == ()
    assert comparison.reference_zeros == sum(parameter.numel() // 2 for parameter in in_blocks(now).values())


def test_a_merged_lora_is_found_out(saved):
    model = get_peft_model(prune(tiny_bert()), LoraConfig(target_modules=["query", "key"], init_lora_weights=False))
    with pytest.raises(
        ValueError, match=r"Layer bert\.encoder\.layer\.0\.attention\.self\.query carries an adapter of"
    ):
        compare_sparsity(model, saved)
    model.merge_adapter()
    merged = compare_sparsity(model, saved)
    model.unmerge_adapter()
    kept, _ = merge_keeping_zeros(copy.deepcopy(model))
    lost = compare_sparsity(model.merge_and_unload(), saved)
    assert lost == merged.__class__(lost.source, lost.reference, merged.layers)
    assert {row.name.rpartition(".")[2] for row in lost.lost_layers} == {"query", "key"}
    assert all(row.lost == row.reference_zeros for row in lost.lost_layers)
    assert compare_sparsity(kept, saved).lost == 0


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_adapters_of_this_package_count_as_if_they_were_merged(make):
    base = prune(make())
    reference = {name: parameter.detach() != 0 for name, parameter in in_blocks(base).items()}
    model = get_peft_model(base, PSTConfig(keep_zeros=True, target_sparsity=0.75, r=2, init_weights=False))
    model.update_sparsity(10, total_steps=10)
    assert compare_sparsity(model, reference).lost == 0
    free = get_peft_model(prune(make()), PSTConfig(target_sparsity=0.25, r=2, init_weights=False))
    free.update_sparsity(10, total_steps=10)
    before = compare_sparsity(free, reference)
    assert before.lost > 0
    assert compare_sparsity(free, model).lost > 0, "an adapted model is a reference too"
    free.merge_adapter()
    assert compare_sparsity(free, reference) == before
    free.unmerge_adapter()
    with free.disable_adapter():
        assert compare_sparsity(free, reference).lost == 0
    assert compare_sparsity(free.merge_and_unload(), reference).layers == before.layers


def test_a_head_that_is_saved_in_full_counts_as_trained():
    model = pruned_net(modules_to_save=["head"])
    masks = {"head": torch.zeros(3, 8, dtype=torch.bool)}
    assert compare_sparsity(model, masks).lost == 24
    model.base_model.model.head.modules_to_save["default"].weight.data.zero_()
    assert compare_sparsity(model, masks).lost == 0


def test_what_was_promised_is_compared_and_nothing_else(tmp_path):
    model = get_peft_model(net(), PSTConfig(target_modules=["up"], target_sparsity=0.5, r=2))
    model.update_sparsity(10, total_steps=10)
    promise = report_model(model)
    merged = model.merge_and_unload()
    merged.layers[0].down.weight.data[0, 0] = 0  # by chance
    (tmp_path / "pruned").mkdir()
    save_file(merged.state_dict(), tmp_path / "pruned" / "model.safetensors")
    without = compare_sparsity(merged, tmp_path / "pruned")
    assert {row.name for row in without.layers} == {"layers.0.up", "layers.1.up", "layers.0.down"}
    promise.save(tmp_path / "pruned" / REPORT_NAME)
    assert {row.name for row in compare_sparsity(merged, tmp_path / "pruned").layers} == {"layers.0.up", "layers.1.up"}


def test_the_first_parts_of_names_may_be_missing_on_either_side(saved, tmp_path):
    BertModel.from_pretrained(saved).save_pretrained(tmp_path / "bare")
    bare, headed = compare_sparsity(saved, tmp_path / "bare"), compare_sparsity(tmp_path / "bare", saved)
    assert bare.lost == headed.lost == 0
    assert [row.reference_zeros for row in bare.layers] == [row.reference_zeros for row in headed.layers]
    assert bare.layers[0].name == f"bert.{headed.layers[0].name}"


def test_expert_weights_in_three_dimensions_and_convolutions(tmp_path):
    weights = {"layers.0.experts.up": torch.randn(3, 4, 5), "layers.0.conv.weight": torch.randn(4, 3, 2, 2)}
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()}
    save_file({name: weight * masks[name] for name, weight in weights.items()}, tmp_path / "a.safetensors")
    assert compare_sparsity(tmp_path / "a.safetensors", masks).lost == 0
    save_file(weights, tmp_path / "b.safetensors")
    assert compare_sparsity(tmp_path / "b.safetensors", tmp_path / "a.safetensors").lost == sum(
        int((~mask).sum()) for mask in masks.values()
    )


class Stack(nn.Module):
    """Experts as one tensor, as transformers keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up[0].T


class Kinds(nn.Module):
    """A layer of each kind that is no plain linear map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = [nn.Conv2d(3, 8, 3), nn.Embedding(10, 6), nn.MultiheadAttention(8, 2), Stack()]
        self.layers = nn.ModuleList(kinds)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "out_proj" not in name:
                parameter.data.view(-1)[::2] = 0


def test_layers_of_every_kind_are_compared_and_reported_as_they_are_stored(tmp_path):
    base = Kinds()
    reference = {name: parameter.detach() != 0 for name, parameter in base.named_parameters() if parameter.dim() > 1}
    targets = {"target_modules": ["layers.0", "layers.1", "layers.2"], "target_parameters": ["layers.3.up"]}
    config = PSTConfig(**targets, keep_zeros=True, target_sparsity=0.75, r=2, init_weights=False)
    model = get_peft_model(base, config)
    model.update_sparsity(10, total_steps=10)
    live = compare_sparsity(model, reference)
    assert [(row.name, row.shape, row.lost) for row in live.layers] == [
        ("layers.0", (8, 3, 3, 3), 0),
        ("layers.1", (10, 6), 0),
        ("layers.2.in_proj_weight", (24, 8), 0),
        ("layers.3.up", (3, 6, 8), 0),
    ]
    promise = report_model(model)
    merged = model.merge_and_unload()
    assert compare_sparsity(merged, reference).layers == live.layers
    (tmp_path / "pruned").mkdir()
    save_file(merged.state_dict(), tmp_path / "pruned" / "model.safetensors")
    promise.save(tmp_path / "pruned" / REPORT_NAME)
    report = report_checkpoint(tmp_path / "pruned")
    assert report.layers == promise.layers
    assert report.sizes.layers_dense == sum(row.weights for row in report.layers) * 4
    for row in report.layers:
        assert int((checkpoint_weight(tmp_path / "pruned", row) == 0).sum()) == row.zeros
    lost = compare_sparsity(Kinds(), tmp_path / "pruned")
    assert {row.name for row in lost.layers} == {*(row.name for row in live.layers), "layers.2.out_proj"}
    assert lost.lost == report.zeros - sum(int((~mask).sum()) for mask in reference.values())


def mask(shape: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape) % 2 == 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"layer.9.key": mask()}, r"Layer layer\.9\.key of the masks is not in BertForSequenceClassification"),
        ({"key": mask()}, r"Layer key of the masks could be bert\.encoder\.layer\.0\S+ or \S+ in Bert"),
        ({LAYER: mask((8, 16))}, r"key has shape \(8, 16\) in the masks and \(16, 16\) in Bert"),
        ({LAYER: pack_mask(mask((8, 16)))}, r"A packed mask has shape \(16,\), but .* \(16, 16\) needs 32 bytes"),
        ({LAYER: mask().float()}, r"A mask is torch.float32; pass boolean ones, True = keep"),
        ({LAYER: torch.ones(16, 16, dtype=torch.bool)}, "the masks has no zeros in its matrices"),
        ({}, "the masks has no zeros in its matrices"),
    ],
)
def test_what_does_not_belong_together_is_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        compare_sparsity(tiny_bert(), masks)


def test_an_adapter_is_no_reference(saved, tmp_path):
    pruned_net().save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="is an adapter, without weights of its own; merge it with `peft-pst merge` first"
    ):
        compare_sparsity(saved, tmp_path / "adapter")


# Tables, JSON and the command line


def test_the_table_names_what_was_lost(saved):
    comparison = compare_sparsity(spoil(prune(tiny_bert()), LAYER, 7), saved)
    table = comparison.to_table()
    assert f"Zeros of {saved} in BertForSequenceClassification" in table
    assert [line for line in table.splitlines() if line.startswith("bert")] == [
        f"{LAYER}    128         121     7  ✗ 5.47 %"
    ]
    assert "✗ 1 of 12 matrices lost 7 of 1,792 zeros: they were changed without the mask" in table
    assert comparison.to_table(show_all=True).count("✓") == 11
    good = compare_sparsity(prune(tiny_bert()), saved)
    assert "✓ all 1,792 zeros in 12 matrices are still zero" in good.to_table()
    assert json.loads(json.dumps(good.to_dict()))["layers"][0]["shape"] == [16, 16]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("lost", [0, 7])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_ends_with_status_one_where_zeros_were_lost(lost, as_json, saved, tmp_path, capsys):
    spoil(prune(tiny_bert()), LAYER, lost).save_pretrained(tmp_path / "now")
    arguments = ["report", str(tmp_path / "now"), "--against", str(saved), "--output", str(tmp_path / "out")]
    assert main([*arguments, *(["--json"] if as_json else [])]) == (1 if lost else 0)
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (written["lost"], written["source"], written["reference"]) == (lost, str(tmp_path / "now"), str(saved))
    if as_json:
        assert json.loads(printed)["against"] == written
    else:
        assert f"Zeros of {saved} in {tmp_path / 'now'}" in printed
        assert (LAYER in printed.split("Zeros of")[1]) == bool(lost)


@pytest.mark.usefixtures("no_pictures")
def test_the_command_compares_adapters_as_they_will_be_merged(saved, tmp_path, capsys):
    for keep_zeros in (True, False):
        base = type(tiny_bert()).from_pretrained(saved)
        config = PSTConfig(target_sparsity=0.25, keep_zeros=keep_zeros, init_weights=False, task_type="SEQ_CLS")
        model = get_peft_model(base, config)
        model.update_sparsity(10, total_steps=10)
        model.save_pretrained(tmp_path / "adapter")
        arguments = ["report", str(tmp_path / "adapter"), "--base_model", str(saved), "--against", str(saved)]
        assert main(arguments) == (0 if keep_zeros else 1)
        assert f"in {tmp_path / 'adapter'}" in capsys.readouterr().out


def test_mistakes_end_in_one_line(saved, tmp_path, capsys):
    assert main(["report", str(saved), "--against", str(tmp_path / "nothing")]) == 2
    assert "nothing: there is no such file or folder" in capsys.readouterr().err
    tensors = load_file(saved / "model.safetensors")
    save_file({"elsewhere.0.weight": torch.zeros(3, 3), **tensors}, tmp_path / "other.safetensors")
    assert main(["report", str(saved), "--against", str(tmp_path / "other.safetensors")]) == 2
    assert "Layer elsewhere.0 of" in capsys.readouterr().err
