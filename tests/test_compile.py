"""The training step under `torch.compile`: one graph, none more as the sparsity moves, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft_pst import PSTConfig, update_sparsity

CONFIG = {"target_modules": ["0", "2"], "r": 2, "score_rank": 2, "residual": 5, "target_sparsity": 0.8}


def make_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24))
    return get_peft_model(base, PSTConfig(**CONFIG, **options))


def train(model: nn.Module, forward: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outputs = []
    for step, batch in enumerate(batches, start=1):
        output = forward(batch)
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_sparsity(model, step, len(batches))
        outputs.append(output.detach())
    return outputs


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(12, 8, 24, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("interval", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_one_graph_with_the_eager_numbers(backend, interval, batches):
    torch._dynamo.reset()
    eager = make_model(mask_interval=interval)
    compiled = copy.deepcopy(eager)
    graphs = CompileCounterWithBackend(backend)
    expected = train(eager, eager, batches)
    actual = train(compiled, torch.compile(compiled, backend=graphs, fullgraph=True), batches)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert graphs.frame_count == 1


def test_compiled_evaluation_follows_the_parameters(batches):
    torch._dynamo.reset()
    model = make_model()
    update_sparsity(model, 10, 10)
    model.eval()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(forward(batches[0]), model(batches[0]))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))


def test_a_copied_layer_selects_from_its_own_tensors(batches):
    torch._dynamo.reset()
    model = make_model()
    update_sparsity(model, 10, 10)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batches[0]), twin(batches[0]))
    assert not torch.allclose(compiled(batches[0]), model(batches[0]))
