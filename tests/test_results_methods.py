"""Every method of the results harness on tiny models: masks and gradients against slow versions, exact zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2
from torch import Tensor, nn
from transformers import TrainerControl

from benchmarks.results.methods import METHODS
from benchmarks.results.methods.masked import (
    MaskedLayer,
    ScheduleCallback,
    add_masks,
    block_linears,
    merge_masks,
    prune_each,
    prune_together,
)
from benchmarks.results.methods.movement import free_sparsity, mean_gate
from benchmarks.results.methods.one_shot import input_norms, wanda
from benchmarks.results.methods.protocol import Goal, Prepared, Start
from benchmarks.results.train import ZeroCounter
from peft_pst import cubic_sparsity, num_pruned
from peft_pst.report import count_zeros

IDS = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])
PRUNING = [name for name, method in METHODS.items() if method.prunes]


def calibration() -> Iterator[dict[str, Tensor]]:
    for row in (IDS[:1, :3], IDS[1:]):
        yield {"input_ids": row}


def start(model: nn.Module, task_type: str = "SEQ_CLS") -> Start:
    return Start(model, task_type, ["pooler"] if task_type == "SEQ_CLS" else [], calibration)


def goal(name: str, sparsity: float) -> Goal:
    return Goal(sparsity, lr=1e-2, score_lr=3e-2, head_lr=1e-3, options=dict(METHODS[name].defaults))


def train(prepared: Prepared, labels: Tensor, steps: int = 10) -> None:
    """A Trainer in small: the callbacks, the loss with its penalty, the optimizer."""
    optimizer = torch.optim.AdamW(prepared.groups, weight_decay=0.0)
    state: Any = SimpleNamespace(global_step=0, max_steps=steps)
    prepared.model.train()
    for callback in prepared.callbacks:
        callback.on_train_begin(None, state, None, model=prepared.model)
    for step in range(steps):
        loss = prepared.model(input_ids=IDS, labels=labels).loss
        if prepared.penalty is not None:
            loss = loss + prepared.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step + 1
        for callback in prepared.callbacks:
            callback.on_step_end(None, state, TrainerControl(), model=prepared.model)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Tensor]] = {
    "bert": (tiny_bert, "SEQ_CLS", torch.tensor([0, 2])),
    "gpt2": (tiny_gpt2, "CAUSAL_LM", IDS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_in_a_plain_model_with_exact_zeros(name: str, architecture: str) -> None:
    make, task_type, labels = MODELS[architecture]
    sparsity = 0.7 if METHODS[name].prunes else 0.0
    model = make()
    kinds = {key: type(module) for key, module in model.named_modules()}
    counter = ZeroCounter(model)
    torch.manual_seed(1)
    prepared = METHODS[name].prepare(start(model, task_type), goal(name, sparsity))
    grouped = [p for group in prepared.groups for p in group["params"]]
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    assert {id(p) for p in grouped} == {id(p) for p in trained}
    assert len(grouped) == len(trained)
    train(prepared, labels)
    prepared.model.eval()
    with torch.no_grad():
        expected = prepared.model(input_ids=IDS).logits
    plain = prepared.finish().eval()
    assert {key: type(module) for key, module in plain.named_modules()} == kinds
    zeros = counter.count(plain, sparsity, each=prepared.exact_matrices)
    layers = block_linears(plain).values()
    per_matrix = sum(num_pruned(layer.weight.numel(), sparsity) for layer in layers)
    assert zeros == (per_matrix if prepared.exact_matrices else num_pruned(counter.weights, sparsity))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["magnitude-lora", "one-shot-wanda"])
def test_embeddings_train_where_a_method_says_so(name: str) -> None:
    for method, trains in ((name, False), (f"{name}-embeddings", True)):
        model = tiny_bert()
        before = model.get_input_embeddings().weight.detach().clone()
        prepared = METHODS[method].prepare(start(model), goal(method, 0.5))
        train(prepared, torch.tensor([0, 2]))
        after = prepared.finish().get_input_embeddings().weight
        changed = (after != before).any(dim=1)
        looked_up = torch.zeros_like(changed)
        looked_up[IDS.flatten()] = True
        assert torch.equal(changed, looked_up if trains else torch.zeros_like(changed))


def test_heads_are_counted_where_there_are_some_and_nothing_else() -> None:
    model = tiny_bert()
    counter = ZeroCounter(model)
    wanted = goal("dsee", 0.5)
    prepared = METHODS["dsee"].prepare(start(model), replace(wanted, options={"pattern": "heads", "residual": 0}))
    train(prepared, torch.tensor([0, 2]))
    assert prepared.promised is not None
    promised = prepared.promised()
    assert {name: count for name, count in promised.items() if count} == {
        name: size // 2 for name, size in counter.sizes.items() if "attention" in name
    }
    plain = prepared.finish()
    assert counter.count(plain, 0.5, each=True, promised=promised) == sum(promised.values())
    with pytest.raises(RuntimeError, match=r"intermediate\.dense: 0 zeros, but"):
        counter.count(plain, 0.5, each=True)
    untrained = METHODS["dsee"].prepare(
        start(tiny_bert()), replace(wanted, options={"pattern": "heads", "residual": 0})
    )
    assert untrained.promised is not None
    assert untrained.promised() == promised, "of the target, and not of where the schedule stands"


def test_one_budget_over_all_matrices_is_counted_over_all_of_them() -> None:
    model = tiny_bert()
    counter = ZeroCounter(model)
    wanted = goal("pst", 0.7)
    prepared = METHODS["pst"].prepare(start(model), replace(wanted, options={"scope": "global"}))
    train(prepared, torch.tensor([0, 2]))
    plain = prepared.finish()
    assert counter.count(plain, 0.7, each=prepared.exact_matrices) == num_pruned(counter.weights, 0.7)
    with pytest.raises(RuntimeError, match="were promised"):
        counter.count(plain, 0.7, each=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_head_and_the_pooler_train_at_the_heads_rate(name: str) -> None:
    model = tiny_bert()
    head = sum(p.numel() for module in (model.bert.pooler, model.classifier) for p in module.parameters())
    prepared = METHODS[name].prepare(start(model), goal(name, 0.5 if METHODS[name].prunes else 0.0))
    at_rate = sum(p.numel() for group in prepared.groups if group["lr"] == 1e-3 for p in group["params"])
    assert at_rate == head


def test_the_counter_refuses_lost_and_superfluous_zeros() -> None:
    model = tiny_bert()
    counter = ZeroCounter(model)
    with pytest.raises(RuntimeError, match=r"query: 0 zeros, but 128 were promised"):
        counter.count(model, 0.5, each=True)
    with torch.no_grad():
        next(iter(block_linears(model).values())).weight[0, 0] = 0
    with pytest.raises(RuntimeError, match=r"1 zeros, but 0 were promised"):
        counter.count(model, 0.0, each=True)
    with pytest.raises(RuntimeError, match="all matrices: 1 zeros"):
        counter.count(model, 0.0, each=False)
    assert ZeroCounter(model).count(model, 0.0, each=True) == 1  # was there from the start


def slow_mask(scores: Tensor, count: int) -> Tensor:
    """True = keep; of equal scores the earlier is pruned."""
    order = sorted(range(scores.numel()), key=lambda i: (scores.flatten()[i].item(), i))
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[order[:count]] = False
    return keep.view_as(scores)


def masked_linear(*, rank: int = 0, learns_scores: bool = False) -> MaskedLayer:
    torch.manual_seed(3)
    layer = MaskedLayer(nn.Linear(6, 5, dtype=torch.float64), rank=rank, learns_scores=learns_scores)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.masked.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def weight_gradient(layer: MaskedLayer, x: Tensor) -> Tensor:
    """G = dL/d(M * W) of L = sum of squares, as the plain linear has it."""
    weight = layer.layer.weight.detach().requires_grad_()
    (x @ weight.T + layer.layer.bias.detach()).square().sum().backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("rank", [0, 2])
def test_magnitude_masks_and_gradients(rank: int) -> None:
    layer = masked_linear(rank=rank)
    original, A, B = layer.original, layer.masked.A, layer.masked.B
    prune_each([layer], 0.7)
    dense = original.detach().clone()
    if A is not None and B is not None:
        dense += (B @ A).detach()
    keep = slow_mask(dense.abs(), 21)
    assert torch.equal(layer.masked.mask, keep)
    assert torch.equal(layer.layer.weight, dense * keep)
    x = torch.randn(4, 6, dtype=torch.float64)
    G = weight_gradient(layer, x)
    layer.layer(x).square().sum().backward()
    torch.testing.assert_close(original.grad, G * keep)
    if A is not None and B is not None:
        torch.testing.assert_close(A.grad, B.detach().T @ (G * keep))
        torch.testing.assert_close(B.grad, (G * keep) @ A.detach().T)


def test_movement_masks_and_gradients() -> None:
    layer = masked_linear(learns_scores=True)
    scores = layer.masked.scores
    assert scores is not None
    prune_each([layer], 0.6)
    keep = slow_mask(scores.detach(), 18)
    assert torch.equal(layer.masked.mask, keep)
    x = torch.randn(4, 6, dtype=torch.float64)
    G = weight_gradient(layer, x)
    layer.layer(x).square().sum().backward()
    torch.testing.assert_close(layer.original.grad, G * keep)
    torch.testing.assert_close(scores.grad, G * layer.original.detach())


def test_soft_movement_cuts_all_matrices_at_one_threshold() -> None:
    layers = add_masks(tiny_bert(), learns_scores=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            assert layer.masked.scores is not None
            layer.masked.scores.normal_(mean=0.1 * index)
    prune_together(layers, 0.8)
    scores = torch.cat([layer.importance().flatten() for layer in layers])
    kept = torch.cat([layer.masked.mask.flatten() for layer in layers])
    assert torch.equal(kept, slow_mask(scores, num_pruned(scores.numel(), 0.8)))
    gates = [1 / (1 + torch.exp(-layer.importance())) for layer in layers]
    torch.testing.assert_close(mean_gate(layers), torch.stack([gate.mean() for gate in gates]).mean())
    below = sum(int((gate <= 0.1).sum()) for gate in gates)
    assert free_sparsity(layers) == below / scores.numel()


def test_the_penalty_grows_with_the_schedule_and_pulls_scores_down() -> None:
    prepared = METHODS["soft-movement"].prepare(start(tiny_bert()), goal("soft-movement", 0.5))
    penalty, callback = prepared.penalty, prepared.callbacks[0]
    assert penalty is not None
    assert isinstance(callback, ScheduleCallback)
    values = []
    for step in (0, 10, 40, 100):
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=100), None)  # type: ignore[arg-type]
        values.append(penalty().item())
    expected = [100.0 * 0.5 * cubic_sparsity(t, 100, target_sparsity=0.5) / 0.5 for t in (0, 10, 40, 100)]
    assert values == pytest.approx(expected)
    penalty().backward()
    scores = [p for name, p in prepared.model.named_parameters() if name.endswith(".scores")]
    assert all(bool((score.grad > 0).all()) for score in scores)


def test_wanda_prunes_rows_alike_by_weight_times_input_norm() -> None:
    model = tiny_bert()
    norms = input_norms(start(model))
    name = "bert.encoder.layer.0.intermediate.dense"
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, 16)))
    with torch.no_grad():
        for batch in calibration():
            model(**batch)
    hook.remove()
    inputs = torch.cat(seen)
    torch.testing.assert_close(norms[name], torch.tensor([column.norm() for column in inputs.T]))
    weight = layer.weight.detach()
    ranks = wanda(start(model))[name]
    for row in range(weight.shape[0]):
        order = sorted(range(16), key=lambda j, row=row: (weight[row, j].abs() * norms[name][j]).item())
        assert [int(ranks[row, j]) for j in order] == list(range(16))
    METHODS["one-shot-wanda"].prepare(start(model), goal("one-shot-wanda", 0.7))
    zeros = [count_zeros(row) for row in layer.weight]
    assert sum(zeros) == num_pruned(weight.numel(), 0.7)
    assert set(zeros) <= {11, 12}  # 0.7 of 16 is 11.2


def test_one_shot_masks_never_move() -> None:
    prepared = METHODS["one-shot-magnitude"].prepare(start(tiny_bert()), goal("one-shot-magnitude", 0.5))
    before = {name: buffer.clone() for name, buffer in prepared.model.named_buffers() if name.endswith(".mask")}
    assert before
    assert all(torch.count_nonzero(mask) == mask.numel() / 2 for mask in before.values())
    train(prepared, torch.tensor([0, 2]))
    after = dict(prepared.model.named_buffers())
    assert all(torch.equal(after[name], mask) for name, mask in before.items())


def test_merging_masks_leaves_no_parametrization() -> None:
    model = tiny_gpt2()
    names = [name for name, _ in model.named_parameters()]
    layers = add_masks(model, rank=2)
    prune_each(layers, 0.5)
    assert sorted(name for name, _ in merge_masks(model, layers).named_parameters()) == sorted(names)


def test_pst_is_known_by_its_differences_from_the_paper() -> None:
    assert METHODS["pst-paper"].resolve({}) == {}
    assert METHODS["pst-paper"].resolve({"alpha1": 2.0}) == {"alpha1": 2.0}
    assert METHODS["pst-importance"].resolve({})["r"] == 0
    assert "init_weights" in METHODS["pst"].resolve({})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match=r"movement pruning has no option 'rank'; it has warmup_ratio, cooldown_ratio"):
        METHODS["movement"].resolve({"rank": 3})
    with pytest.raises(TypeError, match="rank"):
        METHODS["pst"].resolve({"rank": 3})
