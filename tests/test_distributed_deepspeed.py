"""DeepSpeed ZeRO on two processes, where its CPU backend is installed; it compiles an operator when first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from ranks import RANKS, on_two_ranks
from test_distributed_fsdp import HalfZeroNet
from tiny_kinds import TARGETS, kinds, token_batch
from tiny_models import Net, assert_same_tensors, layers_of, masks, net
from torch import Tensor, nn

from peft_pst import PSTConfig, report_model
from peft_pst.sharding import whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="make test-deepspeed"),
]
STEPS, MICRO_BATCHES = 4, 2
BASES: dict[str, Callable[[], nn.Module]] = {
    "every kind": kinds,
    "kept zeros": lambda: (torch.manual_seed(0), HalfZeroNet())[1],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mask of every step": {},
    "held masks": {"mask_interval": 2, "initial_sparsity": 0.2},
    "residual": {"residual": 5},
    "kept zeros": {"keep_zeros": True, "target_sparsity": 0.7},
    "rows": {"pattern": "rows", "target_sparsity": 0.5},
    "one budget": {"scope": "global"},
    "neurons": {"pattern": "neurons", "projections": {"neurons": [{"inputs": ["up"], "output": "down"}]}},
    "every kind": TARGETS,
}


def compile_operator() -> None:
    """Once, before there are two processes of which one would wait for the other."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()


PARTITIONED = {
    "target_sparsity": 0.6,
    "initial_sparsity": 0.3,
    "mask_interval": 2,
    "score_rank": 0,
    "structured": False,
}
ZERO_INIT = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


def make(name: str) -> tuple[PeftModel, torch.optim.Optimizer]:
    base = BASES.get(name, net)()
    torch.manual_seed(0)
    model = get_peft_model(base, PSTConfig(**{"r": 2, "score_rank": 2, "target_sparsity": 0.6, **OPTIONS[name]}))
    # Its steps are in proportion to the gradients, so an error in their scale shows.
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def wrap(name: str, stage: int) -> tuple[PeftModel, Any]:
    import deepspeed

    model, optimizer = make(name)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,  # 1 by default
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return model, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch(name: str, seed: int) -> Tensor:
    return (
        token_batch(seed) if name == "every kind" else torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    )


def train_with_zero(name: str, stage: int) -> dict[str, Any]:
    model, engine = wrap(name, stage)
    losses, after_steps = [], []
    for step in range(1, STEPS + 1):
        for number in range(MICRO_BATCHES):
            share = batch(name, 10 * step + number).chunk(RANKS)[dist.get_rank()]
            loss = (engine(share) - 1).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        model.update_sparsity(step, STEPS)
        after_steps.append(masks(model))
    empty = sum(1 for parameter in model.parameters() if parameter.numel() == 0)
    results = {"losses": losses, "masks": after_steps, "partitioned": empty}
    return {**results, **outside_a_forward(model, name)}


def train_alone(name: str) -> dict[str, Any]:
    model, optimizer = make(name)
    losses, after_steps = [], []
    for step in range(1, STEPS + 1):
        for number in range(MICRO_BATCHES):
            loss = (model(batch(name, 10 * step + number)) - 1).square().mean()
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.update_sparsity(step, STEPS)
        after_steps.append(masks(model))
    return {"losses": losses, "masks": after_steps, **outside_a_forward(model, name)}


@torch.no_grad()
def outside_a_forward(model: PeftModel, name: str) -> dict[str, Any]:
    """All that reads or writes whole matrices, while every process may hold half of each."""
    x = batch(name, 3)
    results: dict[str, Any] = {"evaluated": model.eval()(x)}
    results["report"] = [(row.name, row.zeros) for row in report_model(model).layers]
    results["scores"] = {name: layer.get_scores("default") for name, layer in layers_of(model).items()}
    results["trained"] = {name: whole(p).detach() for name, p in model.named_parameters() if p.requires_grad}
    if name != "every kind":  # stacks are not merged while sharded
        model.merge_adapter(safe_merge=True)
        results["merged"] = model(x)
        model.unmerge_adapter()
        results["unmerged"] = model(x)
    return results


def train_all(stage: int, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: train_with_zero(name, stage) for name in names}


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_one_process_trains(stage: int) -> None:
    compile_operator()
    ran = on_two_ranks(train_all, stage, list(OPTIONS))
    for name in OPTIONS:
        (first, second), alone = (rank[name] for rank in ran), train_alone(name)
        assert bool(first["partitioned"]) == (stage == 3)
        for step in range(STEPS):
            assert_same_tensors(second["masks"][step], first["masks"][step])
            assert_same_tensors(first["masks"][step], alone["masks"][step])
        mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
        assert mean == pytest.approx(alone["losses"], rel=1e-5), name
        for part in ("scores", "trained"):
            assert_same_tensors(second[part], first[part])
            for key, tensor in alone[part].items():
                torch.testing.assert_close(first[part][key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
        for part in {"evaluated", "merged", "unmerged"} & alone.keys():
            assert torch.equal(first[part], second[part]), (name, part)
            torch.testing.assert_close(first[part], alone[part], rtol=1e-4, atol=1e-5, msg=f"{name}: {part}")
        assert first["report"] == alone["report"]


def adapt_a_partitioned_base() -> dict[str, Tensor]:
    """As transformers' `from_pretrained` gives it once ZeRO-3 is configured."""
    import deepspeed

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=ZERO_INIT):
        base = Net()
    assert not any(parameter.numel() for parameter in base.parameters())
    return masks(get_peft_model(base, PSTConfig(**PARTITIONED)))


def save_partitioned(folder: str) -> str:
    model, _ = wrap("mask of every step", stage=3)
    with pytest.raises(ValueError, match="ZeRO-3") as caught:
        model.save_pretrained(folder)
    return str(caught.value)


def test_an_adapter_on_a_base_that_was_never_whole() -> None:
    compile_operator()
    torch.manual_seed(0)
    expected = masks(get_peft_model(Net(), PSTConfig(**PARTITIONED)))
    for found in on_two_ranks(adapt_a_partitioned_base):
        assert_same_tensors(found, expected)


def test_saving_what_is_partitioned_is_refused(tmp_path: Path) -> None:
    compile_operator()
    for message in on_two_ranks(save_partitioned, str(tmp_path)):
        assert "tensors of adapter 'default' are empty" in message
    assert not list(tmp_path.glob("*.safetensors"))
