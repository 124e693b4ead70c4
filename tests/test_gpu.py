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
from peft_pst.kernels import available
from peft_pst.masked_linear import Pruner, effective_weight, masked_linear
from peft_pst.masking import _select_on_device, pack_mask, select_mask, select_packed_mask, unpack_mask
from peft_pst.scoring import Factors, base_scores, rank_zeros_lowest
from peft_pst.selection import select_adapter_mask

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


@given(zeros=st.floats(0, 1), share=st.floats(0, 1))
def test_selection_for_devices_prunes_kept_zeros_first(zeros, share):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (9, 11), generator=generator) * (torch.rand(9, 11, generator=generator) >= zeros)
    ranked = rank_zeros_lowest(torch.randn(9, 11, generator=generator), weight)
    zero_count = int((weight == 0).sum())
    count = max(1, zero_count + int(share * (99 - zero_count)))
    mask = _select_on_device(ranked.flatten(), count).view(9, 11)
    assert torch.equal(mask, select_mask(ranked, count))
    assert not mask[weight == 0].any() or count < zero_count


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_gpu_keeps_the_zeros_of_the_base(dtype, share):
    weight = torch.randn(3072, 768).to(dtype)
    weight.view(-1)[::2] = 0
    factors = Factors(R=torch.randn(3072), C=torch.randn(768))
    on_gpu = Factors(R=factors.R.cuda(), C=factors.C.cuda())
    count = int(weight.numel() * share)
    packed = select_adapter_mask(weight.cuda(), on_gpu, (count,), keep_zeros=True).cpu()
    keep = unpack_mask(packed, weight.shape)
    assert int((~keep).sum()) == count
    assert not keep[weight == 0].any()


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
    with torch.no_grad():  # V and B start at zero, and so would the gradients of U and A
        for parameter in on_cpu.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    update_sparsity(on_cpu, 1, 1)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(32, 96, dtype=dtype)
    for model, batch in ((on_cpu, x), (on_gpu, x.cuda())):
        model(batch).float().square().mean().backward()
    trained = [(n, a, b) for (n, a), b in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True)]
    for name, a, b in trained:
        if b.grad is not None:
            assert b.grad.norm() > 0, name
            error = (a.grad.cpu() - b.grad).norm() / b.grad.norm()
            assert error < (1e-4 if dtype == torch.float32 else 0.05), (name, error)


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


# The Triton kernels against the torch functions on the same GPU, which PEFT_PST_TRITON=0 brings back


@pytest.fixture
def reference(monkeypatch):
    """Calls a function without the kernels, having made sure that they are there."""

    def call(function, *arguments):
        assert available(torch.ones(1, device="cuda")), "the kernels are not in use on this machine"
        with monkeypatch.context() as patch:
            patch.setenv("PEFT_PST_TRITON", "0")
            return function(*arguments)

    return call


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def special(scores):
    scores = scores.flatten()
    for start, step, value in ((0, 3, -0.0), (1, 7, float("nan")), (2, 11, -float("inf")), (3, 13, float("inf"))):
        scores[start::step] = value
    return scores


SCORES = {
    "normal": lambda scores: scores,
    "magnitudes": lambda scores: scores.abs(),
    "ties": lambda scores: scores.round(decimals=2),
    "bfloat16": lambda scores: scores.bfloat16(),
    "float16": lambda scores: scores.half(),
    "bfloat16 magnitudes": lambda scores: scores.bfloat16().float().abs(),
    "equal": torch.zeros_like,
    "half zeros": lambda scores: scores.clamp(min=0),
    "rows apart": lambda scores: scores.abs() + torch.arange(scores.shape[0], device=scores.device)[:, None],
    "wide": lambda scores: scores * 10 ** (20 * torch.randn_like(scores)).clamp(1e-38, 1e38),
    "special": special,
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(4096, 11008), (768, 3072), (33, 1001), (1, 1)])
@pytest.mark.parametrize("kind", SCORES)
def test_selection_by_kernels(kind, shape, reference):
    scores = SCORES[kind](torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda"))
    for share in (0.0, 1e-3, 0.2, 0.5, 0.9, 0.99, 1.0):
        count = max(1, int(share * scores.numel()))
        packed = select_packed_mask(scores, count)
        assert torch.equal(packed, pack_mask(reference(select_mask, scores, count))), share
        assert torch.equal(packed, select_packed_mask(scores, count)), share


def example(shape, rank, dtype, structured=True, transposed=False):
    """Base weight, factors and packed mask."""
    torch.manual_seed(0)
    out, in_ = shape
    weight = 0.02 * (torch.randn(in_, out, device="cuda").T if transposed else torch.randn(out, in_, device="cuda"))

    def normal(*sizes):
        return 0.02 * torch.randn(sizes, device="cuda")

    products = (normal(out, rank), normal(rank, in_)) if rank else (None, None)
    scores = (normal(out, rank), normal(rank, in_)) if rank else (None, None)
    sums = (normal(out), normal(in_)) if structured else (None, None)
    factors = Factors(*products, *scores, *sums, beta=0.7, alpha1=1.3, alpha2=0.4)
    return weight.to(dtype), factors, pack_mask(torch.rand(shape, device="cuda") < 0.3)


EXAMPLES = [
    ((4096, 11008), 8, torch.bfloat16, True, False),
    ((11008, 4096), 8, torch.float16, True, False),
    ((4096, 4096), 16, torch.float32, True, False),
    ((768, 2304), 32, torch.bfloat16, True, True),
    ((100, 77), 64, torch.float32, False, True),
    ((65, 1001), 1, torch.bfloat16, True, False),
    ((9, 8), 0, torch.float32, True, False),
]
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EXAMPLES)
def test_effective_weight_by_a_kernel(case, dtype, reference):
    weight, factors, mask = example(*case)
    actual = effective_weight(weight, [Pruner(factors, mask)], dtype)
    expected = reference(effective_weight, weight, [Pruner(factors, mask)], dtype)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual == 0, expected == 0)
    # Where the sum lies between two roundings, the order of its terms decides: seldom, and by one unit.
    assert relative_error(actual, expected) < ROUNDING[torch.float32 if dtype is None else dtype] + (
        0 if weight.dtype == torch.float32 else 1e-4
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", EXAMPLES)
def test_scores_by_a_kernel(case, reference):
    weight, factors, _ = example(*case)
    assert relative_error(base_scores(weight, factors), reference(base_scores, weight, factors)) < 1e-6


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EXAMPLES)
def test_gradients_by_a_kernel(case, autocast, reference):
    weight, factors, mask = example(*case)
    x = torch.randn(48, weight.shape[1], device="cuda", dtype=weight.dtype)
    gy = torch.randn(48, weight.shape[0], device="cuda")

    def run():
        leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in factors.tensors]
        own = Factors(*leaves, None, *factors.scales)
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            y = masked_linear(x, weight, None, [Pruner(own, mask)])
        y.backward(gy.to(y.dtype))
        return [leaf.grad for leaf in leaves if leaf is not None]

    actual, expected, again = run(), reference(run), run()
    # The input's gradient flows through rounded weights, those of the factors do not; parts in bfloat16 leave 2^-16.
    exact = weight.dtype == torch.float32 and autocast is None
    for a, b, c in zip(actual, expected, again, strict=True):
        assert relative_error(a, b) < (2e-5 if exact else 2e-4)
        assert torch.equal(a, c)


@pytest.mark.gpu
@needs_gpu
def test_a_large_layer_makes_no_copies_in_float32_but_of_its_scores():
    base = nn.Sequential(nn.Linear(11008, 4096, bias=False)).to("cuda", torch.bfloat16)
    model = get_peft_model(base, PSTConfig(target_modules=["0"]))
    update_sparsity(model, 1, 1)
    x = torch.randn(256, 11008, device="cuda", dtype=torch.bfloat16)
    numel = 4096 * 11008
    peaks = []
    for run in (lambda: model(x), lambda: model(x).float().square().mean().backward()):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if len(peaks) == 0:
            update_sparsity(model, 1, 1)
        run()
        peaks.append((torch.cuda.max_memory_allocated() - before) / numel)
    selecting, training = peaks
    assert selecting < 5.0  # bytes a weight: 4 for the scores, the bins, the mask
    assert training < 4.0  # 2 for the effective weight, or the gradient in blocks of 2^24 and what is summed up


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_kernels_does_not_wait_for_the_host(dtype):
    model = get_peft_model(nn.Sequential(nn.Linear(1024, 512)).to(dtype), PSTConfig(target_modules=["0"])).cuda()
    x = torch.randn(32, 1024, device="cuda", dtype=dtype)
    for _ in range(2):  # compiling the kernels may wait
        update_sparsity(model, 1, 1)
        model(x).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_sparsity(model, 1, 1)
        model(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
