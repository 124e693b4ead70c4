"""Bases that accelerate keeps in host memory or on a disk: whatever an adapter does, as with a base in memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import OffloadedWeightsLoader
from offloaded_merge import LAYER_BYTES, LAYERS
from peft import PeftModel, get_peft_model
from tiny_checkpoints import save_gpt2
from tiny_models import assert_same_tensors, inputs, layers_of, masks, net, outputs, shake, snapshot, tiny_bert
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, report_model

OPTIONS: dict[str, dict[str, Any]] = {
    "mask of every step": {},
    "held masks": {"mask_interval": 2, "initial_sparsity": 0.3},
    "residual": {"residual": 4},
}
IDS = torch.tensor([[3, 7, 1, 0], [5, 2, 9, 1]])
PLACES = {"layers.0": "cpu", "layers.1": "disk", "head": "disk"}


def adapted(base: nn.Module, name: str = "mask of every step") -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, PSTConfig(target_sparsity=0.6, r=2, score_rank=2, **OPTIONS[name]))


def below(prefix: str) -> dict[str, str]:
    return {prefix + name: place for name, place in PLACES.items()}


WAYS: dict[str, Callable[[Path, str], PeftModel]] = {
    "dispatched, then adapted": lambda folder, name: adapted(dispatch_model(net(), PLACES, offload_dir=folder), name),
    "adapted, then dispatched": lambda folder, name: dispatch_model(
        adapted(net(), name), below("base_model.model."), offload_dir=folder
    ),
    "in host memory": lambda folder, name: adapted(cpu_offload(net(), torch.device("cpu")), name),
    "on a disk": lambda folder, name: adapted(disk_offload(net(), str(folder), torch.device("cpu")), name),
    "adapted, then on a disk": lambda folder, name: disk_offload(adapted(net(), name), folder, torch.device("cpu")),
}


def train(model: PeftModel) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    losses = []
    for step in range(1, 5):
        loss = (model(inputs()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_sparsity(step, 4)
        losses.append(loss.item())
    return losses


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in snapshot(model).items() if ".pst_" in name}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_trains_evaluates_and_merges_as_in_memory(tmp_path: Path, way: str, name: str) -> None:
    expected, model = adapted(net(), name), WAYS[way](tmp_path, name)
    assert layers_of(model)["base_model.model.layers.1.up"].base_layer.weight.is_meta
    assert train(model) == train(expected)
    assert_same_tensors(adapter_tensors(model), adapter_tensors(expected))
    assert_same_tensors(masks(model), masks(expected))
    model.eval()
    expected.eval()
    assert torch.equal(outputs(model), outputs(expected))
    assert report_model(model).layers == report_model(expected).layers
    with model.disable_adapter(), expected.disable_adapter():
        assert torch.equal(outputs(model), outputs(expected))

    stored = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        expected.merge_adapter()
        assert torch.equal(outputs(model), outputs(expected))
        assert report_model(model).layers == report_model(expected).layers
        model.unmerge_adapter()
        expected.unmerge_adapter()
        assert torch.equal(outputs(model), outputs(expected))
        with model.disable_adapter():
            assert torch.equal(outputs(model), outputs(net()))

    merged, dense = model.merge_and_unload(), expected.merge_and_unload()
    assert torch.equal(outputs(merged, inputs()), outputs(dense, inputs()))
    assert merged.layers[1].up.weight.is_meta, "still offloaded"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == stored, "other models may load from there"


def test_a_layer_that_is_merged_by_itself(tmp_path: Path) -> None:
    expected, model = adapted(net()), WAYS["on a disk"](tmp_path, "mask of every step")
    for either in (model, expected):
        shake(either, 0)
        either.update_sparsity(10, 10)
        either.eval()
        for layer in layers_of(either).values():
            layer.merge()
    assert torch.equal(outputs(model, inputs()), outputs(expected))
    for layer in layers_of(model).values():
        layer.unmerge()
    assert torch.equal(outputs(model, inputs()), outputs(expected))
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs()), outputs(net()))


def test_an_optimizer_made_before_the_adapters_are_fetched_back_trains_them(tmp_path: Path) -> None:
    model = WAYS["adapted, then dispatched"](tmp_path, "mask of every step")
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert any(p.is_meta for p in parameters)
    model(inputs()).sum().backward()
    assert all(p.grad is not None and not p.is_meta for p in parameters)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_weight_stays_in_memory_from_forward_to_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    loaded: list[weakref.ref[Tensor]] = []
    load = OffloadedWeightsLoader.__getitem__

    def watched(loader: OffloadedWeightsLoader, key: str) -> Tensor:
        tensor = load(loader, key)
        if "layers" in key and key.endswith("weight"):
            loaded.append(weakref.ref(tensor))
        return tensor

    model = WAYS["dispatched, then adapted"](tmp_path, "mask of every step")
    model.train(not frozen)
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", watched)
    with torch.set_grad_enabled(not frozen):
        output = model(inputs())
    gc.collect()
    assert len(loaded) == 2, "read once a layer, for the selection and the product"
    assert not any(reference() is not None for reference in loaded)
    if not frozen:
        output.sum().backward()
        assert len(loaded) == 4, "and once for the backward"


@pytest.mark.parametrize("place", [cpu_offload, disk_offload])
@pytest.mark.parametrize("training", [True, False])
def test_layers_of_other_kinds(tmp_path: Path, place: Callable[..., nn.Module], training: bool) -> None:
    def pruned(base: nn.Module) -> PeftModel:
        torch.manual_seed(1)
        config = PSTConfig(target_modules=["0", "1"], initial_sparsity=0.5, init_weights=False)
        return get_peft_model(base, config).train(training)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(12, 6), nn.Conv1d(4, 3, 3), nn.Linear(4, 2))

    folder = {"offload_dir": str(tmp_path)} if place is disk_offload else {}
    expected, model = pruned(base()), pruned(place(base(), execution_device=torch.device("cpu"), **folder))
    for either in (expected, model):
        either(IDS).sum().backward()
    assert torch.equal(model(IDS), expected(IDS))
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(model.get_parameter(name).grad, parameter.grad), name
    assert torch.equal(model.merge_and_unload()(IDS), expected.merge_and_unload()(IDS))


# Through transformers


def places(folder: str) -> dict[str, str]:
    blocks = {"transformer.h.0": "cpu", "transformer.h.1": "disk"}
    return {"transformer.wte": "cpu", "transformer.wpe": "cpu", **blocks, "transformer.ln_f": "cpu", "lm_head": "cpu"}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # PEFT writes relative to it
    folder = tmp_path / "models--tiny"  # and beside folders that are named as those of the hub's cache
    folder.mkdir()
    return save_gpt2(folder)


def dispatched(folder: str, offload: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places(folder), offload_folder=str(offload))


def trained_adapter(folder: str, to: Path) -> PeftModel:
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    shake(model, 0)
    model.update_sparsity(10, 10)
    model.save_pretrained(to)
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def test_an_adapter_is_loaded_onto_a_dispatched_model(checkpoint: str, tmp_path: Path) -> None:
    expected = trained_adapter(checkpoint, tmp_path / "adapter")
    base = dispatched(checkpoint, tmp_path / "offload")
    map_of_adapted = {f"base_model.model.{name}": place for name, place in places(checkpoint).items()}
    for trainable in (False, True):
        model = PeftModel.from_pretrained(
            base,
            str(tmp_path / "adapter"),
            is_trainable=trainable,
            device_map=map_of_adapted,
            offload_folder=str(tmp_path / "offload"),
        )
        assert not any(p.is_meta for name, p in model.named_parameters() if ".pst_" in name)
        assert torch.equal(logits_of(model), logits_of(expected))
        base = dispatched(checkpoint, tmp_path / "offload")
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_merged_model_is_saved_from_its_store(checkpoint: str, tmp_path: Path) -> None:
    before = (Path(checkpoint) / "model.safetensors").read_bytes()
    expected = trained_adapter(checkpoint, tmp_path / "adapter").merge_and_unload()
    model = adapted(dispatched(checkpoint, tmp_path / "offload"))
    shake(model, 0)
    model.update_sparsity(10, 10)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), logits_of(expected))
    merged.save_pretrained(tmp_path / "merged", max_shard_size="5KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_tensors(snapshot(loaded), snapshot(expected))
    assert (Path(checkpoint) / "model.safetensors").read_bytes() == before


class Sentences(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(6).roll(index), "labels": torch.tensor(index % 3)}


def trained_by_a_trainer(base: nn.Module, folder: Path) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, PSTConfig(task_type="SEQ_CLS", target_sparsity=0.6, r=2, score_rank=2))
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=Sentences(), callbacks=[PSTCallback()]).train()
    return model.eval()


# Only a model with a device map is one that the Trainer leaves where it is.
DEVICE_MAPS = {
    "blocks on the disk": {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"},
    "all but the head": {"bert": "disk", "classifier": "cpu"},
}


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_a_trainer_trains_on_a_dispatched_base(tmp_path: Path, name: str) -> None:
    expected = trained_by_a_trainer(tiny_bert(), tmp_path)
    base = dispatch_model(tiny_bert(), DEVICE_MAPS[name], offload_dir=tmp_path / "store")
    found = trained_by_a_trainer(base, tmp_path)
    assert_same_tensors(adapter_tensors(found), adapter_tensors(expected))
    assert torch.equal(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    found.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    merged = found.merge_and_unload()
    assert torch.equal(merged(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "memory", "host"])
def test_merging_holds_no_second_copy_of_the_model(tmp_path: Path, place: str) -> None:
    script = Path(__file__).parent / "offloaded_merge.py"
    # Every tensor in pages of its own, which go back to the system when it does.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", str(script), place, str(tmp_path)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    most, left = (int(number) / LAYER_BYTES for number in output.split())
    assert most < 1.5, f"{most:.1f} layers more than before, of {LAYERS}"
    assert left < 0.5
    assert sum(1 for file in tmp_path.iterdir() if file.name.startswith("merged-")) == 0
