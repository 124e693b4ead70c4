"""Base layers of every kind on two processes, under DDP and FSDP2, against one process with the same global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from ranks import RANKS, on_two_ranks
from tiny_kinds import TARGETS, kinds, token_batch
from tiny_models import assert_same_tensors, layers_of, masks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_pst import PSTConfig, report_model
from peft_pst.sharding import whole

STEPS, MICRO_BATCHES = 4, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "mask of every step": {},
    "held masks and residual": {"mask_interval": 2, "residual": 3},
}


def adapted(options: dict[str, Any]) -> PeftModel:
    base = kinds(torch.float64)
    torch.manual_seed(0)
    config = PSTConfig(target_sparsity=0.6, r=2, score_rank=2, **TARGETS, **options)
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(torch.float64)


def wrapped(model: PeftModel, way: str) -> nn.Module:
    if way == "DDP":
        return DistributedDataParallel(model)
    if way == "FSDP2":
        mesh = init_device_mesh("cpu", (RANKS,))
        for part in model.base_model.model.children():
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(way: str, options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks = (dist.get_rank(), RANKS) if way != "alone" else (0, 1)
    model = adapted(options)
    forward = wrapped(model, way)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses, after_steps = [], []
    for step in range(1, STEPS + 1):
        for number in range(MICRO_BATCHES):
            batch = token_batch(10 * step + number).chunk(ranks)[rank]
            loss = (forward(batch) - 1).square().mean()
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.update_sparsity(step, STEPS)
        after_steps.append(masks(model))
    model.eval()
    with torch.no_grad():
        evaluated = forward(token_batch(1))
    adapter = {name: whole(tensor).clone() for name, tensor in get_peft_model_state_dict(model).items()}
    report = [(row.name, row.zeros) for row in report_model(model).layers]
    return {"losses": losses, "masks": after_steps, "evaluated": evaluated, "adapter": adapter, "report": report}


def train_all(way: str) -> dict[str, dict[str, Any]]:
    return {name: train(way, options) for name, options in OPTIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_every_kind_of_layer_trains_as_on_one_process(way: str) -> None:
    ran = on_two_ranks(train_all, way)
    for name, options in OPTIONS.items():
        (first, second), alone = (results[name] for results in ran), train("alone", options)
        assert len(alone["report"]) == 8, "an embedding, a convolution, two of attention, a Conv1D and three experts"
        for ours, theirs, expected in zip(first["masks"], second["masks"], alone["masks"], strict=True):
            assert_same_tensors(ours, expected)
            assert_same_tensors(theirs, expected)
        mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
        assert mean == pytest.approx(alone["losses"], rel=1e-9)
        assert torch.equal(first["evaluated"], second["evaluated"])
        torch.testing.assert_close(first["evaluated"], alone["evaluated"], rtol=1e-8, atol=1e-10)
        assert_same_tensors(second["adapter"], first["adapter"])
        for key, tensor in alone["adapter"].items():
            torch.testing.assert_close(first["adapter"][key], tensor, rtol=1e-7, atol=1e-9, msg=key)
        assert first["report"] == second["report"] == alone["report"]

        loaded = adapted(options)
        set_peft_model_state_dict(loaded, first["adapter"])
        assert_same_tensors(masks(loaded), first["masks"][-1])
        with torch.no_grad():
            assert torch.equal(loaded.eval()(token_batch(1)), first["evaluated"])


def merge_a_sharded_stack() -> str:
    model = adapted({})
    wrapped(model, "FSDP2")
    before = {name: whole(tensor).clone() for name, tensor in model.state_dict().items() if "experts" in name}
    stack = [layer for name, layer in layers_of(model).items() if "experts" in name]
    with pytest.raises(RuntimeError) as caught:
        stack[0].merge()
    after: dict[str, Tensor] = {name: whole(tensor) for name, tensor in model.state_dict().items() if "experts" in name}
    assert_same_tensors(after, before)
    return str(caught.value)


@pytest.mark.slow
def test_merging_a_sharded_stack_is_refused() -> None:
    for message in on_two_ranks(merge_a_sharded_stack):
        assert message.startswith(
            "Layer experts.up.0: a stack of matrices that FSDP or DeepSpeed shards cannot be merged"
        )
