"""DeepSpeed ZeRO through accelerate and the Trainer on two processes, against data parallel training."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from peft import PeftModel, get_peft_model
from ranks import RANKS, on_two_ranks
from safetensors.torch import load_file
from test_distributed_ddp import Sentences
from test_distributed_deepspeed import compile_operator
from tiny_models import assert_same_tensors, masks, tiny_bert
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, report_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="make test-deepspeed"),
]
STEPS = 6


def without_dropout() -> nn.Module:
    base = tiny_bert()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def zero(stage: int) -> dict[str, Any]:
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage == 3:
        optimization["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,
    }


def make_trainer(folder: str, stage: int, **options: Any) -> Trainer:
    config = PSTConfig(task_type="SEQ_CLS", r=2, score_rank=2, **options)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not stage,  # accelerate knows no DeepSpeed where a CPU is asked for
        deepspeed=zero(stage) if stage else None,
    )
    if stage:
        assert arguments.device.type == "cpu"
        # Or accelerate, which finds no accelerators, takes each process to be alone.
        ranks = {"num_processes": RANKS, "process_index": dist.get_rank(), "local_process_index": dist.get_rank()}
        PartialState._shared_state |= ranks
    model = get_peft_model(without_dropout(), config)
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[PSTCallback()])
    # BERT accepts the number of items in the batch and ignores it, see `PSTTrainer`.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def train(folder: str, stage: int, **options: Any) -> dict[str, Any]:
    os.environ["ACCELERATE_USE_CPU"] = str(not stage).lower()
    trainer = make_trainer(folder, stage, **options)
    trainer.train()
    trainer.save_model(f"{folder}/adapter")
    results = what_was_trained(trainer)
    again = make_trainer(folder, stage, **options)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    results["resumed"] = what_was_trained(again)
    return results


def what_was_trained(trainer: Trainer) -> dict[str, Any]:
    history = [(entry["step"], entry["loss"], entry["sparsity"]) for entry in trainer.state.log_history[:-1]]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "masks": masks(model),
        "history": history,
        "report": [(row.name, row.zeros) for row in report_model(model).layers],
        "partitioned": sum(1 for parameter in model.parameters() if parameter.numel() == 0),
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_with_zero(tmp_path: Path, stage: int) -> None:
    compile_operator()
    expected, _ = on_two_ranks(train, str(tmp_path / "ddp"), 0)
    first, second = on_two_ranks(train, str(tmp_path / "zero"), stage)
    assert bool(first["partitioned"]) == (stage == 3)
    for results in (first, second, first["resumed"], second["resumed"]):
        assert_same_tensors(results["masks"], first["masks"])
        assert results["report"] == expected["report"]
    assert first["history"] == first["resumed"]["history"]
    assert [loss for _, loss, _ in first["history"]] == pytest.approx([x for _, x, _ in expected["history"]], abs=2e-4)
    trained = PeftModel.from_pretrained(without_dropout(), str(tmp_path / "zero" / "adapter"))
    assert_same_tensors(masks(trained), first["masks"])
    ours, theirs = (load_file(tmp_path / way / "adapter" / "adapter_model.safetensors") for way in ("zero", "ddp"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
