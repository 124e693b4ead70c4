"""The masked weight as a differentiable operation, against autograd of the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from peft_pst.masked_linear import Pruner, effective_weight, masked_linear, straight_through_weight
from peft_pst.masking import pack_mask
from peft_pst.scoring import Factors

EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}


def adapters(out: int, in_: int, dtype: torch.dtype, number: int) -> list[oracle.Adapter]:
    """Adapters with all parts on, scales of their own, and from a quarter of the weights upwards at zero."""
    shapes = {"U": (out, 2), "V": (2, in_), "A": (out, 3), "B": (3, in_), "R": (out,), "C": (in_,), "S": (11,)}
    return [
        oracle.Adapter(
            **{name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()},
            positions=torch.randperm(out * in_)[:11],
            beta=0.3 * index,
            alpha1=0.5,
            alpha2=-0.2,
            count=out * in_ * index // 4,
        )
        for index in range(1, number + 1)
    ]


def in_float64(adapter: oracle.Adapter) -> oracle.Adapter:
    return replace(adapter, **{n: t.detach().double().requires_grad_() for n, t in adapter.tensors.items()})


def pruners_of(weight: Tensor, trained: Sequence[oracle.Adapter]) -> tuple[list[Pruner], list[Tensor]]:
    """What the package is given, and the masks, selected from the scores in float64."""
    masks = [oracle.mask(oracle.scores(weight.detach().double(), in_float64(a)), a.count) for a in trained]
    pruners = [
        Pruner(Factors(**a.tensors, positions=a.positions, beta=a.beta, alpha1=a.alpha1, alpha2=a.alpha2), packed)
        for a, packed in zip(trained, map(pack_mask, masks), strict=True)
    ]
    return pruners, masks


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 9), (13, 40), (3, 17)], ids=str)
def test_whole_tensors_against_autograd_of_the_formulas(
    shape: tuple[int, int], dtype: torch.dtype, number: int
) -> None:
    weight = torch.randn(shape).to(dtype).requires_grad_()
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    trained = adapters(*shape, factor_dtype, number)
    pruners, masks = pruners_of(weight, trained)
    gradient = torch.randn(shape).to(dtype)
    masked = straight_through_weight(weight, pruners)
    masked.backward(gradient)

    exact = [in_float64(adapter) for adapter in trained]
    leaf = weight.detach().double().requires_grad_()
    expected = oracle.effective_weight(leaf, exact, masks)
    expected.backward(gradient.double())

    assert masked.dtype == weight.grad.dtype == dtype
    assert torch.equal(masked, effective_weight(weight, pruners))
    assert not masked[~torch.stack(masks).all(0)].any()
    assert error(masked, expected) <= EPSILON[dtype]
    assert error(weight.grad, leaf.grad) <= EPSILON[dtype]
    for own, other in zip(trained, exact, strict=True):
        for name, tensor in own.tensors.items():
            assert tensor.grad.dtype == factor_dtype
            assert error(tensor.grad, other.tensors[name].grad) <= EPSILON[dtype], name


def test_a_matrix_that_is_gone_through_in_blocks_has_the_gradients_of_the_linear_map() -> None:
    weight = torch.randn(1100, 2100)
    gradients = []
    trained = adapters(*weight.shape, torch.float32, 1)
    pruners, _ = pruners_of(weight, trained)
    x, gy = torch.randn(3, 2100), torch.randn(3, 1100)
    for y in (x @ straight_through_weight(weight, pruners).T, masked_linear(x, weight, None, pruners)):
        y.backward(gy)
        gradients.append({name: tensor.grad for name, tensor in trained[0].tensors.items()})
        for tensor in trained[0].tensors.values():
            tensor.grad = None
    own, expected = gradients
    assert max(error(own[name], expected[name]) for name in expected) <= 1e-6


@pytest.mark.parametrize("frozen", ["", "U", "VAB", "UVABRC"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str) -> None:
    weight = torch.randn(8, 5).double()
    trained = adapters(8, 5, torch.float64, 1)
    pruners, _ = pruners_of(weight, trained)
    straight_through_weight(weight, pruners).sum().backward()
    expected = {name: tensor.grad.clone() for name, tensor in trained[0].tensors.items()}
    for name, tensor in trained[0].tensors.items():
        tensor.grad = None
        tensor.requires_grad_(name not in frozen)
    straight_through_weight(weight, pruners).sum().backward()
    for name, tensor in trained[0].tensors.items():
        if name in frozen:
            assert tensor.grad is None
        else:
            assert torch.equal(tensor.grad, expected[name])


def test_nothing_of_the_weights_size_is_kept_for_the_backward_but_the_weight() -> None:
    weight = torch.randn(320, 640)
    pruners, _ = pruners_of(weight, adapters(320, 640, torch.float32, 1))
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        straight_through_weight(weight, pruners)
    large = [tensor for tensor in kept.values() if tensor.nbytes > 320 * 640 // 8]
    assert [tensor.data_ptr() for tensor in large] == [weight.data_ptr()]


def test_a_second_derivative_is_refused() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    trained = adapters(4, 3, torch.float64, 1)
    pruners, _ = pruners_of(weight, [replace(trained[0], S=None, positions=None)])
    masked = straight_through_weight(weight, pruners)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(masked.square().sum(), trained[0].U, create_graph=True)
