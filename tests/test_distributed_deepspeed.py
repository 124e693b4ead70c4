"""DeepSpeed ZeRO on two processes, where its CPU backend is installed; it compiles an operator when first used."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from ranks import RANKS, on_two_ranks
from tiny_models import layers_of, net
from torch import Tensor, nn

from peft_pst import PSTConfig, report_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed"),
]
STEPS = 3


def make() -> tuple[PeftModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = get_peft_model(net(), PSTConfig(r=2, score_rank=2, target_sparsity=0.6))
    # Its steps are in proportion to the gradients, so an error in their scale shows.
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def wrap(stage: int) -> tuple[PeftModel, Any]:
    import deepspeed

    model, optimizer = make()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,  # 1 by default
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return model, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(3))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_mask("default") for name, layer in layers_of(model).items()}


def train_with_zero_2() -> tuple[list[float], dict[str, Tensor], float]:
    model, engine = wrap(stage=2)
    losses = []
    for step in range(1, STEPS + 1):
        loss = (engine(batch().chunk(RANKS)[dist.get_rank()]) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        model.update_sparsity(step, STEPS)
        losses.append(loss.item())
    return losses, masks(model), report_model(model).sparsity


def train_alone() -> tuple[list[float], dict[str, Tensor]]:
    model, optimizer = make()
    losses = []
    for step in range(1, STEPS + 1):
        loss = (model(batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_sparsity(step, STEPS)
        losses.append(loss.item())
    return losses, masks(model)


def test_zero_2_trains_what_one_process_trains() -> None:
    first, second = on_two_ranks(train_with_zero_2)
    losses, expected = train_alone()
    assert [(a + b) / 2 for a, b in zip(first[0], second[0], strict=True)] == pytest.approx(losses, rel=1e-5)
    for name, mask in expected.items():
        assert torch.equal(first[1][name], second[1][name])
        assert torch.equal(first[1][name], mask)
    assert first[2] == second[2] == pytest.approx(0.6, abs=0.01)


def train_with_zero_3() -> str:
    _, engine = wrap(stage=3)
    with pytest.raises(RuntimeError, match="DeepSpeed") as caught:
        engine(batch().chunk(RANKS)[dist.get_rank()])
    return str(caught.value)


def test_zero_3_is_refused_with_a_remedy() -> None:
    for message in on_two_ranks(train_with_zero_3):
        assert message.startswith("Layer layers.0.up: DeepSpeed ZeRO-3 and FSDP1 shard")
        assert "use FSDP2 or ZeRO-2" in message
