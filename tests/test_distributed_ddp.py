"""Data parallel training on two processes against one process with the same global batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from ranks import RANKS, on_two_ranks
from safetensors.torch import load_file
from tiny_models import assert_same_tensors, layers_of, net, snapshot, tiny_bert
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import peft_pst.layer
from peft_pst import PSTCallback, PSTConfig

STEPS, MICRO_BATCHES = 6, 2
# Before, a Trainer of several processes on CPUs looks for the optimizer's state at "cpu:0", which torch does not know.
RESUMES_ON_CPUS = Version(transformers.__version__) >= Version("5.18")
OPTIONS: dict[str, dict[str, Any]] = {
    "mask of every step": {},
    "held masks": {"mask_interval": 2},
    "masks held at the target": {"mask_interval": None, "initial_sparsity": 0.6},
    "residual": {"residual": 5, "residual_positions": "random"},
}


def make(options: dict[str, Any], seed: int = 0) -> PeftModel:
    """In float64, where the two orders of summation never decide between two weights."""
    base = net(torch.float64)
    torch.manual_seed(seed)
    config = PSTConfig(**{"target_sparsity": 0.6, "r": 2, "score_rank": 2, **options})
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(torch.float64)


def batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(8, 8, generator=generator).double() for _ in range(MICRO_BATCHES)] for _ in range(STEPS)]


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_mask("default") for name, layer in layers_of(model).items()}


def train(model: PeftModel, forward: nn.Module, rank: int, ranks: int) -> dict[str, Any]:
    """A loop of one's own, with gradient accumulation; each rank sees its share of every micro-batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, after_steps = [], []
    for step, micro_batches in enumerate(batches(), start=1):
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last or ranks == 1 else forward.no_sync():
                loss = (forward(batch.chunk(ranks)[rank]) - 1).square().mean()
                (loss / len(micro_batches)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.update_sparsity(step, STEPS)
        after_steps.append(masks(model))
    return {"losses": losses, "masks": after_steps, "state": snapshot(model)}


def count_calls(*names: str) -> Counter[str]:
    counter: Counter[str] = Counter()
    for name in names:
        original = getattr(peft_pst.layer, name)

        def counting(*arguments: object, name: str = name, original: Any = original, **options: object) -> Any:
            counter[name] += 1
            return original(*arguments, **options)

        setattr(peft_pst.layer, name, counting)
    return counter


def train_by_hand(options: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    rank, results = dist.get_rank(), {}
    counter = count_calls("select_adapter_mask", "check_positions")
    for name, option in options.items():
        model = make(option, seeds[rank])
        wrapped = DistributedDataParallel(model)
        counter.clear()
        results[name] = {**train(model, wrapped, rank, RANKS), "calls": dict(counter)}
    return results


@pytest.fixture(scope="module")
def by_hand() -> list[dict[str, Any]]:
    return on_two_ranks(train_by_hand, OPTIONS, (0, 0))


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_train_what_one_trains(by_hand: list[dict[str, Any]], name: str) -> None:
    model = make(OPTIONS[name])
    alone = train(model, model, rank=0, ranks=1)
    first, second = (results[name] for results in by_hand)
    assert_same_tensors(second["state"], first["state"])
    for ours, theirs, expected in zip(first["masks"], second["masks"], alone["masks"], strict=True):
        assert_same_tensors(ours, expected)
        assert_same_tensors(theirs, expected)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(alone["losses"], rel=1e-10)
    assert first["losses"] != second["losses"], "each saw a share of its own"
    for key, tensor in first["state"].items():
        torch.testing.assert_close(tensor, alone["state"][key], rtol=1e-8, atol=1e-10, msg=key)


def test_broadcast_buffers_make_nothing_anew(by_hand: list[dict[str, Any]]) -> None:
    """DDP writes rank 0's counts, masks and positions into all others at every forward."""
    selections = {"mask of every step": STEPS + 1, "held masks": STEPS // 2 + 1, "residual": STEPS + 1}
    for results in by_hand:
        for name, expected in selections.items():
            assert results[name]["calls"]["select_adapter_mask"] <= 4 * expected, name
        assert results["masks held at the target"]["calls"].get("select_adapter_mask", 0) == 0
        assert results["residual"]["calls"].get("check_positions", 0) <= 4


def test_ranks_that_start_apart_train_alike() -> None:
    """DDP gives all ranks the parameters of the first; what was made from others must not outlive them."""
    first, second = on_two_ranks(train_by_hand, {**OPTIONS, "random": {"init_weights": False}}, (0, 1))
    for name in first:
        assert_same_tensors(second[name]["state"], first[name]["state"])
        for ours, theirs in zip(first[name]["masks"], second[name]["masks"], strict=True):
            assert_same_tensors(theirs, ours)


# With the Trainer


class Sentences(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 40, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens[0] % 3}


def bert_without_dropout() -> PeftModel:
    base = tiny_bert().double()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = PSTConfig(task_type="SEQ_CLS", r=2, score_rank=2)
    return get_peft_model(base, config, autocast_adapter_dtype=False).double()


def train_with_trainer(folder: str, resume: bool, ranks: int = RANKS) -> dict[str, Any]:
    model = bert_without_dropout()
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8 // ranks,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[PSTCallback()])
    # BERT accepts the number of items in the batch and ignores it, see `PSTTrainer`.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
    trainer.save_model(f"{folder}/adapter")
    history = [(entry["step"], entry["loss"], entry["sparsity"]) for entry in trainer.state.log_history[:-1]]
    return {"masks": masks(model), "state": snapshot(model), "history": history}


def test_the_trainer_on_two_processes(tmp_path: Path) -> None:
    first, second = on_two_ranks(train_with_trainer, str(tmp_path / "two"), False)
    alone = train_with_trainer(str(tmp_path / "one"), False, ranks=1)
    assert_same_tensors(first["state"], second["state"])
    assert_same_tensors(first["masks"], alone["masks"])
    assert [(step, sparsity) for step, _, sparsity in first["history"]] == [
        (step, sparsity) for step, _, sparsity in alone["history"]
    ]
    assert [loss for _, loss, _ in first["history"]] == pytest.approx([x for _, x, _ in alone["history"]], abs=2e-4)
    for key, tensor in first["state"].items():
        torch.testing.assert_close(tensor, alone["state"][key], rtol=1e-6, atol=1e-8, msg=key)

    if RESUMES_ON_CPUS:
        resumed, _ = on_two_ranks(train_with_trainer, str(tmp_path / "two"), True)
        assert_same_tensors(resumed["state"], first["state"])

    saved = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(bert_without_dropout().unload(), str(tmp_path / "two" / "adapter"))
    assert_same_tensors(masks(loaded), first["masks"])
    assert json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())["total_steps"] == STEPS
