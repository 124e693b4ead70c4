"""FSDP2 on two processes: sharded against unsharded, and what is gathered outside a forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from ranks import RANKS, on_two_ranks
from safetensors.torch import save_file
from test_distributed_ddp import count_calls
from tiny_models import Net, assert_same_tensors, layers_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from peft_pst import PSTConfig, report_model

STEPS, MICRO_BATCHES = 5, 2


class CheckpointedNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class HalfZeroNet(Net):
    """A base that was pruned before."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.layers:
            for linear in (block.up, block.down):
                linear.weight.data *= linear.weight.abs() > linear.weight.abs().median()


class Case:
    """One way to shard a model: what it is made of, and what is sharded on its own besides the whole."""

    def __init__(
        self,
        parts: str = "blocks",
        dtype: torch.dtype = torch.float64,
        base: type[Net] = Net,
        shard: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.parts, self.dtype, self.base, self.shard, self.options = parts, dtype, base, shard or {}, options

    def model(self) -> PeftModel:
        torch.manual_seed(0)
        config = PSTConfig(**{"target_sparsity": 0.6, "r": 2, "score_rank": 2, **self.options})
        return get_peft_model(self.base().to(self.dtype), config)

    def sharded(self, model: PeftModel) -> PeftModel:
        mesh = init_device_mesh("cpu", (RANKS,))
        layers = model.base_model.model.layers
        parts = {"whole": [], "blocks": layers, "layers": layers_of(model).values()}[self.parts]
        for part in parts:
            fully_shard(part, mesh=mesh, **self.shard)
        return fully_shard(model, mesh=mesh, **self.shard)


CASES = {
    "blocks": Case(),
    "PST layers": Case("layers"),
    "the whole": Case("whole"),
    "kept gathered": Case(shard={"reshard_after_forward": False}),
    "offloaded to the host": Case(shard={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "checkpointed": Case(base=CheckpointedNet),
    "held masks": Case(mask_interval=2, initial_sparsity=0.2),
    "residual": Case(residual=5),
    "kept zeros": Case(base=HalfZeroNet, keep_zeros=True),
    "kept zeros, held": Case(base=HalfZeroNet, keep_zeros=True, mask_interval=None, target_sparsity=0.5),
    "bf16 base": Case(dtype=torch.bfloat16),
    "bf16 base, checkpointed, offloaded": Case(
        dtype=torch.bfloat16,
        base=CheckpointedNet,
        shard={"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ),
    "n of m": Case(pattern="2:4", target_sparsity=0.5),
    "columns": Case(pattern="columns"),
    "one budget": Case(scope="global"),
    "neurons": Case(pattern="neurons", projections={"neurons": [{"inputs": ["up"], "output": "down"}]}),
}


def batches(dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(8, 8, generator=generator).to(dtype) for _ in range(MICRO_BATCHES)] for _ in range(STEPS)]


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_mask("default") for name, layer in layers_of(model).items()}


def train(case: Case, model: PeftModel, share: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, after_steps = [], []
    for step, micro_batches in enumerate(batches(case.dtype), start=1):
        for batch in micro_batches:
            loss = (model(share(batch)).double() - 1).square().mean()
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.update_sparsity(step, STEPS)
        after_steps.append(masks(model))
    return {"losses": losses, "masks": after_steps}


def whole_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in state.items()}


def reshard(model: nn.Module) -> None:
    """What FSDP keeps gathered after a forward is a copy: writes to it are lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def outside_a_forward(model: PeftModel, counter: Counter[str]) -> dict[str, Any]:
    """All that reads or writes whole matrices, while every process holds half of each."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    x = x.to(next(iter(layers_of(model).values())).base_layer.weight.dtype)
    model.eval()
    with torch.no_grad():
        results: dict[str, Any] = {"evaluated": model(x)}
        results["kept for evaluation"] = [layer._masked_weight is not None for layer in layers_of(model).values()]
        results["report"] = [(row.name, row.zeros) for row in report_model(model).layers]
        results["scores"] = {name: layer.get_scores("default") for name, layer in layers_of(model).items()}
        reshard(model)
        model.merge_adapter(safe_merge=True)
        results["merged"] = model(x)
        results["merged report"] = [(row.name, row.zeros) for row in report_model(model).layers]
        reshard(model)
        model.unmerge_adapter()
        results["unmerged"] = model(x)
        reshard(model)
        for layer in layers_of(model).values():
            layer.pst_V["default"].mul_(3)
        results["after a write"] = model(x)
        model.load_state_dict({k: -t if ".pst_V" in k else t for k, t in model.state_dict().items()})
        results["after loading"] = model(x)
    results["state"] = whole_tensors(model.state_dict())
    return results


def run(case: Case, sharded: bool) -> dict[str, Any]:
    rank = dist.get_rank() if sharded else 0
    counter = count_calls("select_adapter_mask") if sharded else Counter()
    model = case.sharded(case.model()) if sharded else case.model()
    results = train(case, model, (lambda batch: batch.chunk(RANKS)[rank]) if sharded else (lambda batch: batch))
    results["adapter"] = whole_tensors(get_peft_model_state_dict(model))
    counter.clear()
    model.train()
    for batch in batches(case.dtype)[0]:
        model(batch).sum().backward()
    results["selections of two micro-batches"] = counter["select_adapter_mask"]
    results["config"] = model.peft_config["default"]
    return {**results, **outside_a_forward(model, counter)}


def merge_while_gathered() -> str:
    case = CASES["kept gathered"]
    model = case.sharded(case.model())
    model(batches(case.dtype)[0][0])
    with pytest.raises(RuntimeError) as caught:
        model.merge_adapter()
    reshard(model)
    model.merge_adapter()
    return str(caught.value)


def run_all(names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: run(CASES[name], sharded=True) for name in names}


QUICK = ("blocks", "held masks", "bf16 base", "neurons")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if "ran" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    }
    return on_two_ranks(run_all, sorted(chosen | {"bf16 base"}))


@pytest.mark.parametrize("name", NAMES)
def test_sharded_training_is_unsharded_training(ran: list[dict[str, dict[str, Any]]], name: str) -> None:
    alone = run(CASES[name], sharded=False)
    first, second = (results[name] for results in ran)
    exact = CASES[name].dtype == torch.float64
    for step in range(STEPS):
        assert_same_tensors(second["masks"][step], first["masks"][step])
        if exact:
            assert_same_tensors(first["masks"][step], alone["masks"][step])
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if exact else {"rtol": 0.05, "atol": 0.05}
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(alone["losses"], rel=1e-8 if exact else 0.05)
    for part in ("evaluated", "merged", "unmerged", "after a write", "after loading"):
        assert torch.equal(first[part], second[part]), part
        if exact or not part.startswith("after"):
            torch.testing.assert_close(first[part], alone[part], **tolerance, msg=part)
    for part in ("adapter", "scores", "state"):
        assert_same_tensors(second[part], first[part])
        if exact:
            for key, tensor in alone[part].items():
                torch.testing.assert_close(first[part][key], tensor, **tolerance, msg=key)
    assert first["report"] == first["merged report"] == alone["report"] == alone["merged report"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_stale_and_nothing_of_a_matrix_is_kept(ran: list[dict[str, dict[str, Any]]], name: str) -> None:
    for results in (rank[name] for rank in ran):
        assert torch.equal(results["evaluated"], results["unmerged"])
        torch.testing.assert_close(results["merged"], results["evaluated"], rtol=0, atol=0)
        assert not torch.equal(results["after a write"], results["unmerged"])
        assert not torch.equal(results["after loading"], results["after a write"])
        assert not any(results["kept for evaluation"])
        held = results["config"].holds_mask
        assert results["selections of two micro-batches"] == (0 if held else 4)


def test_trained_on_two_processes_loads_on_one(ran: list[dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    results = ran[0]["bf16 base"]
    results["config"].save_pretrained(tmp_path)
    save_file(results["adapter"], tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in results["adapter"].values()} == {torch.float32, torch.int64}
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net().to(torch.bfloat16), str(tmp_path))
    assert_same_tensors(masks(loaded), results["masks"][-1])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        assert torch.equal(loaded(x), results["evaluated"])


def test_merging_into_gathered_copies_is_refused() -> None:
    for message in on_two_ranks(merge_while_gathered):
        assert message.startswith("Layer layers.0.up: the base weight is")
        assert "reshard()" in message
