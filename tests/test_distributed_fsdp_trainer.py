"""FSDP2 through accelerate and the Trainer on two processes, against data parallel training.

Accelerate shards on accelerators only, so these processes tell it that they have some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from ranks import on_two_ranks
from tiny_models import assert_same_tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, report_model
from peft_pst.model import pst_layers

STEPS = 6
FULL = {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}


class Sentences(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 40, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def frozen_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape)).bfloat16()


def make_trainer(folder: str, fsdp_config: dict[str, Any] | None, options: dict[str, Any], **more: Any) -> Trainer:
    config = PSTConfig(task_type="CAUSAL_LM", r=2, score_rank=2, **options)
    model = get_peft_model(frozen_llama(), config)
    wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    fsdp = {} if fsdp_config is None else {"fsdp": True, "fsdp_config": {"fsdp_version": 2, **wrap, **fsdp_config}}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(folder, **settings, **fsdp, **more)
    AcceleratorState._reset_state()
    assert arguments.device.type == "cpu"
    if fsdp_config is not None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=[PSTCallback()])


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {layer.module_name: layer.get_mask("default") for layer in pst_layers(model)}


def train(folder: str, fsdp_config: dict[str, Any] | None, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    trainer = make_trainer(folder, fsdp_config, options, **more)
    trainer.train()
    results = what_was_trained(trainer)
    if more.get("save_strategy") != "no":
        again = make_trainer(folder, fsdp_config, options, **more)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
        results["resumed"] = what_was_trained(again)
    trainer.save_model(f"{folder}/adapter")
    return results


def what_was_trained(trainer: Trainer) -> dict[str, Any]:
    history = [(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in trainer.state.log_history[:-1]]
    parameters = list(trainer.model.parameters())
    return {
        "masks": masks(trainer.model),
        "history": history,
        "sparsity": report_model(trainer.model).sparsity,
        "is sharded": isinstance(parameters[0], DTensor),
        "dtypes": {(p.requires_grad, p.dtype) for p in parameters},
    }


def train_all(folder: str, cases: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    return {name: train(f"{folder}/{name}", *case[:2], **case[2]) for name, case in cases.items()}


def check(folder: Path, cases: dict[str, tuple[Any, ...]]) -> None:
    first, second = on_two_ranks(train_all, str(folder), cases)
    expected = first["ddp"]
    for name in cases:
        assert first[name]["is sharded"] == (name != "ddp")
        assert first[name]["dtypes"] == {(False, torch.bfloat16), (True, torch.float32)}
        for a, b in ((first[name], second[name]), (first[name], first[name].get("resumed", first[name]))):
            assert_same_tensors(b["masks"], a["masks"])
            assert b["history"] == a["history"]
        assert first[name]["sparsity"] == expected["sparsity"] == pytest.approx(0.9, abs=0.01)
        # The order in which gradients are summed may differ from DDP's, and masks of bf16 weights follow.
        assert [loss for _, loss in first[name]["history"]] == pytest.approx(
            [x for _, x in expected["history"]], abs=0.02
        )


@pytest.mark.slow
def test_sharded_training_with_the_trainer(tmp_path: Path) -> None:
    check(tmp_path, {"ddp": (None, {}, {"save_strategy": "no"}), "fsdp": (FULL, {}, {})})
    trained = PeftModel.from_pretrained(frozen_llama(), str(tmp_path / "fsdp" / "adapter"))
    at_end = PeftModel.from_pretrained(frozen_llama(), str(tmp_path / "fsdp" / "checkpoint-6"))
    assert_same_tensors(masks(trained), masks(at_end))
    assert report_model(trained).sparsity == pytest.approx(0.9, abs=0.01)


@pytest.mark.slow
def test_sharded_training_in_every_way(tmp_path: Path) -> None:
    check(
        tmp_path,
        {
            "ddp": (None, {}, {"save_strategy": "no"}),
            "sharded": (SHARDED, {}, {}),
            "checkpointed": ({**FULL, "activation_checkpointing": True}, {}, {}),
            "held": (FULL, {"mask_interval": 2}, {}),
            "residual": (FULL, {"residual": 4}, {}),
            "autocast": (FULL, {}, {"bf16": True}),
        },
    )


def refused(folder: str) -> str:
    with pytest.raises(ValueError, match="fsdp_config") as caught:
        make_trainer(folder, {"cpu_ram_efficient_loading": True}, {})
    return str(caught.value)


def test_loading_on_one_process_alone_is_refused_before_training(tmp_path: Path) -> None:
    """Accelerate hands out parameters only, and stumbles over any buffer that a model saves."""
    for message in on_two_ranks(refused, str(tmp_path)):
        assert message.startswith("fsdp_config['cpu_ram_efficient_loading']=True")
