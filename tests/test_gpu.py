"""What a GPU may do differently: selection without the host, and the masked product in its precisions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_pst import PSTConfig, update_sparsity
from peft_pst.masking import _select_on_device, select_mask

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")]), min_size=1, max_size=40),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_selection_for_devices_equals_the_one_for_the_cpu(values, share, dtype):
    # The code for accelerators runs on any device; only its speed needs one.
    scores = torch.tensor(values, dtype=dtype)
    count = max(1, int(share * len(values)))
    assert torch.equal(_select_on_device(scores, count), select_mask(scores, count))


def test_selection_for_devices_keeps_the_count_when_scores_are_nan():
    scores = torch.randn(100)
    scores[::10] = float("nan")
    assert int((~_select_on_device(scores, 50)).sum()) == 50
    assert _select_on_device(scores, 50)[::10].all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_gpu_selects_the_same_entries(sparsity):
    scores = torch.randn(3072, 768).round(decimals=2)  # full of ties
    count = int(scores.numel() * sparsity)
    assert torch.equal(select_mask(scores.cuda(), count).cpu(), select_mask(scores, count))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [0, 7])  # the kernels leave the second to the formulas
def test_a_training_step_on_the_gpu_equals_one_on_the_cpu(dtype, residual):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)
    on_cpu = get_peft_model(base, PSTConfig(target_modules=["0", "2"], target_sparsity=0.9, residual=residual))
    update_sparsity(on_cpu, 1, 1)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(32, 96, dtype=dtype)
    for model, batch in ((on_cpu, x), (on_gpu, x.cuda())):
        model(batch).float().square().mean().backward()
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-3}
    for (name, a), (_, b) in zip(on_gpu.named_parameters(), on_cpu.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad.cpu(), b.grad, msg=name, **tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("residual", [0, 7])
def test_a_step_does_not_wait_for_the_host(residual):
    model = get_peft_model(nn.Sequential(nn.Linear(96, 64)), PSTConfig(target_modules=["0"], residual=residual)).cuda()
    x = torch.randn(32, 96, device="cuda")
    model(x)  # looks at what has come from elsewhere, once
    update_sparsity(model, 1, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
