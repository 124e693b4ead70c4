"""Divergence, and disks that take no more: a clear error, and nothing lost that was there."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from ranks import processes
from safetensors import SafetensorError
from tiny_models import TOKENS, assert_same_tensors, inputs, layers_of, masks, net, pruned_net, tiny_bert
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, last_whole_checkpoint, num_pruned


class Sentences(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index % 2], "labels": torch.tensor(index % 3)}


class Poison(TrainerCallback):
    """Stands for a loss that overflows: one trained tensor is not finite after a step."""

    def __init__(self, step: int, name: str, value: float) -> None:
        self.step, self.name, self.value = step, name, value

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            parameter = next(p for name, p in kwargs["model"].named_parameters() if self.name in name)
            parameter.data.view(-1)[0] = self.value


@pytest.mark.parametrize(
    ("name", "value"), [("query.pst_V.default", float("nan")), ("modules_to_save.default.weight", float("inf"))]
)
def test_what_diverged_is_not_saved(tmp_path: Path, name: str, value: float) -> None:
    model = get_peft_model(tiny_bert(), PSTConfig(task_type="SEQ_CLS", r=2, score_rank=2))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, save_steps=2, save_total_limit=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    callbacks = [PSTCallback(), Poison(4, name, value)]
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=callbacks)
    with pytest.raises(ValueError, match=rf"After step 4, 1 of \d+ trained tensors hold a NaN .*{name}"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("options", [{"mask_interval": 2}, {"scope": "global"}, {"scope": "global", "pattern": "rows"}])
def test_a_nan_in_a_loop_of_ones_own_names_its_layer(options: dict[str, Any]) -> None:
    model = pruned_net(residual=3, residual_positions="random", **options)
    before = masks(model)
    for part in ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C", "pst_S"):
        parameter = getattr(model.base_model.model.layers[1].up, part)["default"]
        kept = parameter.detach().clone()
        parameter.data.view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=r"Layer layers\.1\.up, adapter 'default': The scores hold a NaN"):
            model.update_sparsity(10, 10)
        parameter.data.copy_(kept)
    model.update_sparsity(10, 10)
    assert_same_tensors(masks(model), before)


@pytest.mark.parametrize("part", ["pst_U", "pst_B", "pst_R"])
def test_a_score_that_is_nan_names_its_layer(part: str) -> None:
    model = pruned_net()
    with torch.no_grad():
        getattr(model.base_model.model.layers[1].up, part)["default"].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"Layer layers\.1\.up, adapter 'default': The scores hold a NaN"):
        model(inputs())


def test_a_base_weight_that_is_nan_names_its_layer() -> None:
    base = net()
    base.layers[1].down.weight.data[0, 0] = float("nan")
    model = get_peft_model(base, PSTConfig(initial_sparsity=0.5))
    with pytest.raises(ValueError, match=r"Layer layers\.1\.down, adapter 'default': The scores hold a NaN"):
        model(inputs())


def test_no_mask_removes_a_whole_layer() -> None:
    model = pruned_net(target_sparsity=1 - 1e-9)
    for layer in layers_of(model).values():
        assert int(layer.get_mask("default").sum()) == 1
    assert num_pruned(1, 0.999) == 0


# Disks


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes a file; as on a full disk, writing fails with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_does_not_cost_the_old_adapter(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    model = pruned_net(r=6)
    with files_of_at_most(1500), pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old


def test_an_adapter_that_zero_3_has_partitioned_is_not_saved_empty(tmp_path: Path) -> None:
    model = pruned_net()
    model.save_pretrained(tmp_path)
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    partitioned = {
        name: tensor.new_empty(0) if ".pst_U" in name else tensor for name, tensor in model.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"4 of 28 tensors of adapter 'default' are empty.*ZeRO-3.*save_model"):
        model.save_pretrained(tmp_path, state_dict=partitioned)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old


def save_in_vain(folder: str) -> None:
    model = pruned_net(r=6)
    with TemporaryDirectory() as elsewhere:
        for _ in range(2):
            model.save_pretrained(elsewhere)  # imports what saving needs, also over what is there
    if os.geteuid() == 0:
        os.seteuid(65534)  # to root, nothing is read-only
    assert Path(folder, "adapter_config.json").read_text(encoding="utf-8")
    with pytest.raises((PermissionError, SafetensorError)):
        model.save_pretrained(folder)


def test_a_read_only_folder_does_not_cost_the_old_adapter() -> None:
    with TemporaryDirectory() as name:  # not below pytest's, into which no other user may look
        folder = Path(name)
        pruned_net().save_pretrained(folder)
        old = {file.name: file.read_bytes() for file in folder.iterdir()}
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        process = processes.Process(target=save_in_vain, args=(name,))
        process.start()
        process.join()
        folder.chmod(0o755)
        assert process.exitcode == 0
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == old
