"""The adapted layer against the oracle: values, masks and every gradient."""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace

import oracle
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peft_pst
from peft_pst import PSTConfig
from peft_pst.linear import PSTLinear
from peft_pst.masked_linear import Pruner, masked_linear
from peft_pst.masking import num_pruned, pack_mask
from peft_pst.scoring import Factors

LETTERS = "UVABRCS"

# (out, in) of every adapted layer of BERT-base and of GPT-2 small, which stores its weights transposed.
FIRST = [("linear", 768, 768), ("conv1d", 768, 768), ("linear", 3072, 768)]  # the last is worked on in pieces
OTHERS = [("linear", 768, 3072), ("conv1d", 2304, 768), ("conv1d", 3072, 768), ("conv1d", 768, 3072)]
SHAPES = [*FIRST, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in OTHERS)]


# Anywhere in the matrix, and quick.
PLACES = {"residual_positions": "random"}


def make_base(kind: str, out: int, in_: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    base = Conv1D(out, in_) if kind == "conv1d" else nn.Linear(in_, out, bias=bias)
    nn.init.normal_(base.weight, std=0.04)
    if bias:
        nn.init.normal_(base.bias, std=0.04)
    return base.to(dtype)


def adapt(base: nn.Module, **options: object) -> PSTLinear:
    """An adapted layer with one adapter, "default", all parts on; everything through PEFT's public door."""
    config = PSTConfig(target_modules=["0"], **{"residual": 7, **PLACES, **options})
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]


def perturb(layer: PSTLinear, adapter: str = "default", std: float = 0.05) -> None:
    with torch.no_grad():
        for tensor in layer.get_factors(adapter).tensors:
            if tensor is not None:
                tensor.add_(torch.randn_like(tensor), alpha=std)


def dense_weight(layer: PSTLinear) -> Tensor:
    weight = layer.get_base_layer().weight.detach()
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def oracle_adapter(layer: PSTLinear, name: str = "default", dtype: torch.dtype | None = None) -> oracle.Adapter:
    """The layer's tensors as leaves of a graph of their own."""
    factors, config = layer.get_factors(name), layer.pst_plans[name].config
    leaves = {
        letter: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for letter, tensor in zip(LETTERS, factors.tensors, strict=True)
        if tensor is not None
    }
    scales = {"beta": config.beta, "alpha1": config.alpha1, "alpha2": config.alpha2}
    return oracle.Adapter(**leaves, positions=factors.positions, **scales, count=layer.get_num_pruned(name))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected tensor, 0 where both are zero.

    Entry by entry no bound can hold: an entry that is a sum of cancelling terms has any relative error. The norm does
    bound what matters, the length of the error against the length of the step that the optimizer takes.
    """
    assert actual.shape == expected.shape
    difference, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return 0.0 if difference == 0 else (difference / size).item()


def run(layer: PSTLinear, x: Tensor, gy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the layer for the input, the bias and every factor."""
    x = x.detach().clone().requires_grad_()
    bias = layer.get_base_layer().bias
    if bias is not None:
        bias.requires_grad_()
        bias.grad = None
    layer.zero_grad()
    y = layer(x)
    y.backward(gy)
    named = dict(zip(LETTERS, layer.get_factors("default").tensors, strict=True)) | {"x": x, "bias": bias}
    return y.detach(), {name: tensor.grad for name, tensor in named.items() if tensor is not None}


def run_oracle(
    layer: PSTLinear, x: Tensor, gy: Tensor, masks: list[Tensor] | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.detach().to(dtype, copy=True).requires_grad_()
    bias = layer.get_base_layer().bias
    bias = None if bias is None else bias.detach().to(dtype, copy=True).requires_grad_()
    adapter = oracle_adapter(layer, dtype=dtype)
    y = oracle.linear(x, dense_weight(layer).to(dtype), bias, [adapter], masks)
    y.backward(gy.to(dtype))
    named = adapter.tensors | {"x": x, "bias": bias}
    return y.detach(), {name: tensor.grad for name, tensor in named.items() if tensor is not None}


def assert_agrees(layer: PSTLinear, x: Tensor, gy: Tensor, tolerance: float) -> None:
    """Output and gradients against the oracle in float64, on the layer's own mask."""
    y, gradients = run(layer, x, gy)
    expected_y, expected = run_oracle(layer, x, gy, [layer.get_mask("default")])
    assert gradients.keys() == expected.keys()
    assert relative_error(y, expected_y) <= tolerance
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Every layer shape of the two models


@pytest.mark.parametrize(("kind", "out", "in_"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance", "sparsity"), [(torch.float32, 1e-6, 0.9), (torch.float64, 1e-12, 0.5)])
def test_paper_start_values(
    kind: str, out: int, in_: int, sparsity: float, dtype: torch.dtype, tolerance: float
) -> None:
    layer = adapt(make_base(kind, out, in_, dtype), init_weights="paper", initial_sparsity=sparsity)
    adapter = oracle_adapter(layer)
    assert not any(adapter.tensors[letter].any() for letter in "VBRCS")
    expected = oracle.mask(oracle.scores(dense_weight(layer), adapter), int(out * in_ * sparsity))
    assert torch.equal(layer.get_mask("default"), expected)
    x, gy = torch.randn(2, 12, in_, dtype=dtype), torch.randn(2, 12, out, dtype=dtype)
    assert_agrees(layer, x, gy, tolerance)


@pytest.mark.parametrize(("kind", "out", "in_"), SHAPES)
def test_perturbed_float64(kind: str, out: int, in_: int) -> None:
    layer = adapt(make_base(kind, out, in_, torch.float64), initial_sparsity=0.9, beta=0.7, alpha1=1.3, alpha2=0.4)
    perturb(layer)
    # Scores lie about 1e-7 apart near the cut, rounding differs by 1e-16: the masks agree entry by entry.
    scores = oracle.scores(dense_weight(layer), oracle_adapter(layer))
    assert torch.equal(layer.get_mask("default"), oracle.mask(scores, int(out * in_ * 0.9)))
    x, gy = torch.randn(24, in_, dtype=torch.float64), torch.randn(24, out, dtype=torch.float64)
    assert_agrees(layer, x, gy, 1e-12)


@pytest.mark.parametrize(("kind", "out", "in_"), SHAPES)
def test_perturbed_float32(kind: str, out: int, in_: int) -> None:
    layer = adapt(make_base(kind, out, in_), initial_sparsity=0.9, beta=0.7, alpha1=1.3, alpha2=0.4)
    perturb(layer)
    exact = oracle.scores(dense_weight(layer).double(), oracle_adapter(layer, dtype=torch.float64))
    exact = exact.detach()
    scores, mask = layer.get_scores("default"), layer.get_mask("default")
    count = layer.get_num_pruned("default")
    assert torch.equal(mask, oracle.mask(scores, count))
    # Two ways of adding up the same score round differently; only entries that close to the cut may change sides.
    rounding = float((scores - exact).abs().max())
    assert rounding < 1e-6
    expected = oracle.mask(exact, count)
    cut = exact[~expected].max()
    assert ((exact - cut).abs()[mask != expected] <= 2 * rounding).all()
    assert_agrees(layer, torch.randn(24, in_), torch.randn(24, out), 1e-6)


# One small layer, every variation


@pytest.fixture
def small() -> PSTLinear:
    layer = adapt(make_base("linear", 12, 20, torch.float64), initial_sparsity=0.5, r=3, score_rank=2)
    perturb(layer, std=0.3)
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.995])
def test_sparsities(kind: str, sparsity: float) -> None:
    options = {"r": 3, "score_rank": 2, "beta": -0.6, "alpha1": 2.5, "alpha2": -0.3}
    layer = adapt(make_base(kind, 15, 21, torch.float64), initial_sparsity=sparsity, target_sparsity=0.995, **options)
    perturb(layer, std=0.3)
    expected = oracle.mask(oracle.scores(dense_weight(layer), oracle_adapter(layer)), num_pruned(15 * 21, sparsity))
    assert torch.equal(layer.get_mask("default"), expected)
    assert_agrees(layer, torch.randn(7, 21).double(), torch.randn(7, 15).double(), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"score_rank": 0},
        {"structured": False},
        {"residual": 0, "residual_positions": "grebsmo"},
        {"r": 0, "score_rank": 0},
        {"r": 0, "structured": False},
        {"score_rank": 0, "structured": False},
        {"r": 0, "score_rank": 0, "structured": False},
    ],
    ids=str,
)
def test_parts_switched_off(options: dict[str, int]) -> None:
    layer = adapt(make_base("linear", 12, 20, torch.float64), initial_sparsity=0.6, **options)
    perturb(layer, std=0.3)
    off = {"r": "UV", "score_rank": "AB", "structured": "RC", "residual": "S", "residual_positions": ""}
    expected = set(LETTERS) - set("".join(off[option] for option in options)) | {"x", "bias"}
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    assert run(layer, x, gy)[1].keys() == expected
    assert_agrees(layer, x, gy, 1e-12)


def test_layer_without_bias() -> None:
    layer = adapt(make_base("linear", 12, 20, torch.float64, bias=False), initial_sparsity=0.6)
    perturb(layer, std=0.3)
    assert_agrees(layer, torch.randn(5, 20).double(), torch.randn(5, 12).double(), 1e-12)


def test_zero_weights_have_no_sign() -> None:
    base = make_base("linear", 12, 20, torch.float64)
    nn.init.zeros_(base.weight)
    layer = adapt(base, initial_sparsity=0.5)  # W = 0 everywhere, so all |W| tie and sign(W) = 0
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    assert not layer.get_mask("default").flatten()[:120].any()
    assert layer.get_mask("default").flatten()[120:].all()
    assert_agrees(layer, x, gy, 1e-12)


def frozen_subsets() -> list[str]:
    return ["".join(letters) for size in range(7) for letters in itertools.combinations(LETTERS, size)]


@pytest.mark.parametrize("frozen", frozen_subsets())
def test_frozen_subsets(small: PSTLinear, frozen: str) -> None:
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    _, expected = run(small, x, gy)
    for letter in frozen:
        getattr(small, f"pst_{letter}").requires_grad_(False)
    _, gradients = run(small, x, gy)
    for letter in LETTERS:
        if letter in frozen:
            assert gradients[letter] is None
        else:
            assert torch.equal(gradients[letter], expected[letter])


def test_everything_frozen_still_passes_the_input_gradient(small: PSTLinear) -> None:
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    _, expected = run(small, x, gy)
    small.requires_grad_(False)
    x.requires_grad_()
    small(x).backward(gy)
    assert relative_error(x.grad, expected["x"]) <= 1e-12


def test_no_input_gradient(small: PSTLinear) -> None:
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    _, expected = run(small, x, gy)
    small.zero_grad()
    small(x).backward(gy)
    assert x.grad is None
    for letter, tensor in zip(LETTERS, small.get_factors("default").tensors, strict=True):
        assert torch.equal(tensor.grad, expected[letter])


def test_trainable_base_weight(small: PSTLinear) -> None:
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    weight = small.get_base_layer().weight.requires_grad_()
    small(x).backward(gy)
    leaf = weight.detach().clone().requires_grad_()
    adapter = oracle_adapter(small)
    oracle.linear(x, leaf, small.get_base_layer().bias.detach(), [adapter]).backward(gy)
    assert relative_error(weight.grad, leaf.grad) <= 1e-12
    assert relative_error(small.pst_U["default"].grad, adapter.U.grad) <= 1e-12


@pytest.mark.parametrize(
    "make_input",
    [
        lambda: torch.randn(20),
        lambda: torch.randn(2, 3, 20),
        lambda: torch.randn(2, 2, 3, 20),
        lambda: torch.randn(3, 20, 2).transpose(1, 2),
        lambda: torch.randn(20, 5).T,
        lambda: torch.randn(4, 40)[:, ::2],
        lambda: torch.randn(1, 20).expand(6, 20),
        lambda: torch.randn(0, 20),
        lambda: torch.randn(2, 0, 20),
    ],
    ids=["1-D", "3-D", "4-D", "transposed 3-D", "transposed", "strided", "expanded", "no rows", "no tokens"],
)
def test_input_layouts(small: PSTLinear, make_input: Callable[[], Tensor]) -> None:
    x = make_input().double()
    assert_agrees(small, x, torch.randn(*x.shape[:-1], 12, dtype=torch.float64), 1e-12)


def test_non_contiguous_output_gradient(small: PSTLinear) -> None:
    x = torch.randn(5, 20).double()
    assert_agrees(small, x, torch.randn(12, 5).double().T, 1e-12)
    assert_agrees(small, x, torch.randn(1, 1).double().expand(5, 12), 1e-12)


@pytest.mark.parametrize(("product", "reduction"), [(1, 1), (21 * 16, 1), (21 * 16, 21 * 8), (21 * 24, 21 * 16)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, kind: str, product: int, reduction: int) -> None:
    """The dense gradient is made and reduced a few rows at a time, also where the last block is a short one."""
    monkeypatch.setattr(peft_pst.masked_linear, "_PRODUCT_NUMEL", product)
    monkeypatch.setattr(peft_pst.masked_linear, "CACHE_NUMEL", reduction)
    layer = adapt(make_base(kind, 45, 21, torch.float64), initial_sparsity=0.6, r=3, score_rank=2)
    perturb(layer, std=0.3)
    assert_agrees(layer, torch.randn(7, 21).double(), torch.randn(7, 45).double(), 1e-12)


def test_layer_used_twice_in_one_graph() -> None:
    layer = adapt(make_base("linear", 16, 16, torch.float64), initial_sparsity=0.7)
    perturb(layer, std=0.3)
    x = torch.randn(5, 16, dtype=torch.float64)
    layer(torch.tanh(layer(x))).square().sum().backward()
    adapter, weight = oracle_adapter(layer), dense_weight(layer)
    bias = layer.get_base_layer().bias.detach()
    hidden = torch.tanh(oracle.linear(x, weight, bias, [adapter]))
    oracle.linear(hidden, weight, bias, [adapter]).square().sum().backward()
    for letter, tensor in adapter.tensors.items():
        assert relative_error(getattr(layer, f"pst_{letter}")["default"].grad, tensor.grad) <= 1e-12


def test_sparsity_moved_between_forward_and_backward(small: PSTLinear) -> None:
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    _, expected = run(small, x, gy)
    small.zero_grad()
    y = small(x)
    small.set_sparsity("default", 0.9)
    y.backward(gy)
    assert torch.equal(small.pst_U["default"].grad, expected["U"])
    assert torch.equal(small.pst_R["default"].grad, expected["R"])


def test_nothing_of_the_layers_size_is_kept_for_backward() -> None:
    layer = adapt(make_base("linear", 320, 640), initial_sparsity=0.9, r=1, score_rank=1)
    kept: dict[int, Tensor] = {}
    x = torch.randn(3, 640, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = layer(x)
    frozen, factors = layer.get_base_layer().weight.data_ptr(), layer.get_factors("default")
    assert frozen in kept
    assert sum(tensor.nbytes for pointer, tensor in kept.items() if pointer != frozen) <= (
        320 * 640 // 8 + x.nbytes + sum(tensor.nbytes for tensor in (*factors.tensors, factors.positions))
    )
    alive = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.shape == (320, 640)]
    assert y.requires_grad
    assert {tensor.data_ptr() for tensor in alive} == {frozen}


def test_factor_written_between_forward_and_backward_is_refused(small: PSTLinear) -> None:
    y = small(torch.randn(5, 20).double())
    with torch.no_grad():
        small.pst_V["default"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(small: PSTLinear, use_reentrant: bool) -> None:
    x, gy = torch.randn(5, 20).double(), torch.randn(5, 12).double()
    y, expected = run(small, x, gy)
    small.zero_grad()
    leaf = x.clone().requires_grad_()
    rerun = checkpoint(small, leaf, use_reentrant=use_reentrant)
    rerun.backward(gy)
    assert torch.equal(rerun, y)
    assert torch.equal(leaf.grad, expected["x"])
    for letter, tensor in zip(LETTERS, small.get_factors("default").tensors, strict=True):
        assert torch.equal(tensor.grad, expected[letter])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(small: PSTLinear, context: Callable, training: bool) -> None:
    x = torch.randn(5, 20).double()
    expected = small(x).detach()
    small.set_sparsity("default", 0.5)  # so that the mask is selected anew, in this mode
    small.train(training)
    with context():
        y = small(x)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    # What inference mode left behind must not reach a graph, neither as a mask nor as a weight.
    small(x).sum().backward()
    assert small.pst_U["default"].grad is not None
    small.requires_grad_(False)
    small(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["affine", "square"])
def test_second_derivatives_are_refused(small: PSTLinear, loss: Callable[[Tensor], Tensor]) -> None:
    """Also where all that follows the layer is affine, so that the gradient of its output is a constant."""
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(small(x)), x, create_graph=True)


# Precisions


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_base(kind: str, dtype: torch.dtype, epsilon: float) -> None:
    layer = adapt(make_base(kind, 96, 64, dtype), initial_sparsity=0.9)
    assert {tensor.dtype for tensor in layer.get_factors("default").tensors} == {torch.float32}
    # Half-precision magnitudes tie often; the scores are exact in float32, so the masks agree with the sort.
    expected = oracle.mask(dense_weight(layer).float().abs(), int(96 * 64 * 0.9))
    assert torch.equal(layer.get_mask("default"), expected)
    perturb(layer)
    scores = oracle.scores(dense_weight(layer).float(), oracle_adapter(layer))
    assert relative_error(layer.get_scores("default"), scores) <= 1e-6
    x, gy = torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype)
    y, gradients = run(layer, x, gy)
    assert y.dtype == gradients["x"].dtype == gradients["bias"].dtype == dtype
    assert all(gradients[letter].dtype == torch.float32 for letter in LETTERS)
    # Weight, output and dL/dW are each rounded once to half precision: by half an epsilon.
    assert_agrees(layer, x, gy, 2 * epsilon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapter(dtype: torch.dtype) -> None:
    """PEFT keeps the adapter in the base's dtype when told to; scores and gradients are still made in float32."""
    config = PSTConfig(target_modules=["0"], initial_sparsity=0.9)
    model = get_peft_model(nn.Sequential(make_base("linear", 96, 64, dtype)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    perturb(layer)
    assert layer.get_scores("default").dtype == torch.float32
    expected = oracle.mask(layer.get_scores("default"), int(96 * 64 * 0.9))
    assert torch.equal(layer.get_mask("default"), expected)
    _, gradients = run(layer, torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype))
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
    assert_agrees(layer, torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype), 2**-7)


def test_float32_scores_of_a_half_precision_base() -> None:
    """An update too small for bfloat16 to hold still decides which weights are kept."""
    base = nn.Linear(4, 1, bias=False)
    nn.init.ones_(base.weight)
    layer = adapt(base.to(torch.bfloat16), initial_sparsity=0.5, structured=False, r=1, score_rank=1, residual=1)
    with torch.no_grad():
        layer.pst_U["default"].fill_(1.0)
        layer.pst_V["default"].copy_(torch.tensor([[4e-4, 1e-4, 3e-4, 2e-4]]))
    assert layer.get_mask("default").tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, autocast: torch.dtype) -> None:
    layer = adapt(make_base("linear", 96, 64, dtype), initial_sparsity=0.9)
    perturb(layer)
    mask = layer.get_mask("default")
    dense = layer.get_masked_weight()
    layer.set_sparsity("default", 0.9)  # so that the mask is selected anew, under autocast
    x, gy = torch.randn(5, 64), torch.randn(5, 96).to(autocast)
    with torch.autocast("cpu", dtype=autocast):
        y, gradients = run(layer, x, gy)
        assert torch.equal(layer.get_mask("default"), mask)
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), y)
            assert torch.equal(layer.get_masked_weight(), dense)  # what is merged must not be rounded by autocast
    assert y.dtype == autocast
    assert gradients["x"].dtype == torch.float32
    expected_y, expected = run_oracle(layer, x, gy, [mask])
    assert relative_error(y, expected_y) <= 2**-7
    assert max(relative_error(gradients[name], expected[name]) for name in expected) <= 2**-7


# Several adapters


def two_adapters() -> PSTLinear:
    model = nn.Sequential(make_base("linear", 12, 20, torch.float64))
    peft_model = get_peft_model(model, PSTConfig(target_modules=["0"], initial_sparsity=0.5, beta=0.8, residual=30))
    second = PSTConfig(
        target_modules=["0"], initial_sparsity=0.6, r=2, score_rank=3, alpha1=0.5, alpha2=2.0, residual=50, **PLACES
    )
    peft_model.add_adapter("second", second)
    layer = peft_model.base_model.model[0]
    layer.set_adapter(["default", "second"])
    for name in ("default", "second"):
        perturb(layer, name, std=0.3)
    return layer


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_two_adapters(order: list[str]) -> None:
    layer = two_adapters()
    layer.set_adapter(order)
    x, gy = torch.randn(5, 20, dtype=torch.float64, requires_grad=True), torch.randn(5, 12).double()
    y = layer(x)
    y.backward(gy)
    adapters = {name: oracle_adapter(layer, name) for name in order}
    leaf = x.detach().clone().requires_grad_()
    expected = oracle.linear(
        leaf, dense_weight(layer), layer.get_base_layer().bias.detach(), [adapters[name] for name in order]
    )
    expected.backward(gy)
    assert relative_error(y, expected) <= 1e-12
    assert relative_error(x.grad, leaf.grad) <= 1e-12
    for name, adapter in adapters.items():
        for letter, tensor in adapter.tensors.items():
            assert relative_error(getattr(layer, f"pst_{letter}")[name].grad, tensor.grad) <= 1e-12


def test_two_adapters_zero_where_either_prunes() -> None:
    layer = two_adapters()
    masks = [layer.get_mask(name) for name in ("default", "second")]
    assert not torch.equal(*masks)
    weight = layer.get_masked_weight()
    assert torch.equal(weight != 0, masks[0] & masks[1])
    assert not torch.signbit(weight[~(masks[0] & masks[1])]).any()


# The operation by itself


def test_masked_linear_by_itself_with_three_pruners() -> None:
    out, in_ = 6, 9
    weight = torch.randn(out, in_, dtype=torch.float64)
    x = torch.randn(4, in_, dtype=torch.float64)
    shapes = {"U": (out, 2), "V": (2, in_), "A": (out, 3), "B": (3, in_), "R": (out,), "C": (in_,), "S": (11,)}
    adapters = [
        oracle.Adapter(
            **{name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()},
            positions=torch.randperm(out * in_)[:11],
            beta=0.3 * index,
            alpha1=0.5,
            alpha2=-0.2,
            count=7 * index,
        )
        for index in (1, 2, 3)
    ]
    expected = oracle.linear(x, weight, None, adapters)
    expected.square().sum().backward()
    copies = [
        replace(adapter, **{n: t.detach().clone().requires_grad_() for n, t in adapter.tensors.items()})
        for adapter in adapters
    ]
    pruners = [
        Pruner(
            Factors(**copy.tensors, positions=copy.positions, beta=copy.beta, alpha1=copy.alpha1, alpha2=copy.alpha2),
            pack_mask(oracle.mask(oracle.scores(weight, copy), copy.count)),
        )
        for copy in copies
    ]
    y = masked_linear(x, weight, None, pruners)
    y.square().sum().backward()
    assert relative_error(y, expected) <= 1e-12
    for adapter, copy in zip(adapters, copies, strict=True):
        for name, tensor in adapter.tensors.items():
            assert relative_error(copy.tensors[name].grad, tensor.grad) <= 1e-12


def test_straight_through_gradient_of_a_single_weight() -> None:
    """By hand: W = 2 and G = 3 x; a kept weight sends G (1 + |W|) to U V, a pruned one G |W|; both send G W to S."""
    for count, into_update in ((0, 3.0 * (1 + 2.0)), (1, 3.0 * 2.0)):
        V, R = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
        factors = Factors(U=torch.ones(1, 1), V=V, R=R, C=torch.zeros(1))
        keep = torch.tensor([[count == 0]])
        masked_linear(torch.tensor([[3.0]]), torch.tensor([[2.0]]), None, [Pruner(factors, pack_mask(keep))]).backward()
        assert V.grad.item() == into_update
        assert R.grad.item() == 6.0


def test_pruned_infinities_leave_zeros_and_no_warning() -> None:
    layer = adapt(make_base("linear", 4, 4), initial_sparsity=0.5)
    with torch.no_grad():
        layer.pst_R["default"].copy_(torch.tensor([-1e9, -1e9, 0.0, 0.0]))
        layer.get_base_layer().weight[0] = -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = layer.get_masked_weight()
    assert torch.equal(weight[:2], torch.zeros(2, 4))
    assert not torch.signbit(weight[:2]).any()
