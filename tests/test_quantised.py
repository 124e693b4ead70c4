"""Quantised bases on the CPU: the masked product of the dequantised weight, and zeros that survive requantisation."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from peft import PeftModel, get_peft_model
from test_base_layers import oracle_adapter, relative_error
from tiny_models import layers_of, shake
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import peft_pst.quantised
from benchmarks.cost.quantisation import bitsandbytes_int8, bitsandbytes_nf4, hqq_int4, torchao_int8
from peft_pst import PSTConfig, num_pruned, report_model, update_sparsity


def needs(package: str, make: Callable[[nn.Linear], nn.Module]) -> object:
    missing = importlib.util.find_spec(package) is None
    return pytest.param(make, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"), id=make.__name__)


KEEPING_ZEROS = [
    needs("torchao", torchao_int8),
    needs("bitsandbytes", bitsandbytes_int8),
    needs("bitsandbytes", bitsandbytes_nf4),
]
every_quantisation = pytest.mark.parametrize("quantise", [*KEEPING_ZEROS, needs("hqq", hqq_int4)])
those_that_keep_zeros = pytest.mark.parametrize("quantise", KEEPING_ZEROS)


class Quantizer:
    """What transformers keeps at a model that it has quantised with torchao."""

    def __init__(self) -> None:
        self.quantization_config = self

    def get_apply_tensor_subclass(self) -> object:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    def remove_quantization_config(self, model: nn.Module) -> None:
        del model.hf_quantizer


class Model(nn.Module):
    def __init__(self, quantise: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(128, 64), nn.Linear(64, 64)
        self.adapted, self.other = quantise(first), quantise(second)
        self.hf_quantizer = Quantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.adapted(x)))


def dense_weight(model: nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    backend = peft_pst.quantised.backend_of(model, module)
    assert backend is not None
    return peft_pst.quantised.dequantised(backend, module)


X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def sparse(quantise: Callable[[nn.Linear], nn.Module], **options: object) -> PeftModel:
    config = PSTConfig(**{"target_modules": ["adapted"], "target_sparsity": 0.6, "r": 2, "score_rank": 3, **options})
    model = get_peft_model(Model(quantise), config)
    shake(model, seed=3)
    update_sparsity(model, 10, 10)
    return model.eval()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


@every_quantisation
def test_output_and_gradients_are_those_of_the_dequantised_weight(quantise: Callable) -> None:
    model = sparse(quantise, residual=5)
    (layer,) = layers_of(model).values()
    dense, adapter = layer.get_dense_weight().double(), oracle_adapter(layer, "default")
    assert dense.shape == (64, 128)
    assert adapter.count == num_pruned(dense.numel(), 0.6)
    assert torch.equal(layer.get_mask("default"), oracle.mask(layer.get_scores("default"), adapter.count))
    y = model.train().base_model.model.adapted(X)
    y.square().sum().backward()
    bias = layer.get_base_layer().bias.double()
    expected = oracle.linear(X.double(), dense, bias, [adapter], [layer.get_mask("default")])
    expected.square().sum().backward()
    assert relative_error(y, expected) <= 1e-5
    for letter, tensor in adapter.tensors.items():
        assert relative_error(getattr(layer, f"pst_{letter}")["default"].grad, tensor.grad) <= 1e-4, letter
    with torch.no_grad():
        assert torch.equal(model.eval().base_model.model.adapted(X), y)


@every_quantisation
def test_no_dense_weight_is_kept_between_passes(quantise: Callable) -> None:
    model = sparse(quantise)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train().base_model.model.adapted(X)
    assert any(tensor is X for tensor in kept), "a checkpoint around the layer has a say in whatever it keeps"
    assert not [tensor for tensor in kept if tensor.numel() == 64 * 128 and tensor.is_floating_point()]
    output(model.eval())
    (layer,) = layers_of(model).values()
    assert layer._masked_weight is None


@every_quantisation
def test_a_weight_is_dequantised_once_a_pass(quantise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse(quantise).train().base_model.model.adapted
    times: list[None] = []
    dequantised = peft_pst.quantised.dequantised
    monkeypatch.setattr(peft_pst.quantised, "dequantised", lambda *args: times.append(None) or dequantised(*args))
    y = layer(X)  # selects the mask, too
    assert len(times) == 1
    y.sum().backward()
    assert len(times) == 2


@every_quantisation
def test_under_autocast_the_weight_stays_in_its_precision(quantise: Callable) -> None:
    layer = sparse(quantise).train().base_model.model.adapted
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(X)
    with torch.no_grad():
        expected = X.bfloat16() @ layer.get_masked_weight().bfloat16().T + layer.get_base_layer().bias.bfloat16()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) <= 1e-2


@those_that_keep_zeros
def test_merging_quantises_again_with_every_zero_in_its_place(quantise: Callable) -> None:
    model = sparse(quantise)
    (layer,) = layers_of(model).values()
    with model.disable_adapter():
        assert torch.equal(output(model), output(Model(quantise).eval()))
    before, mask = output(model), layer.get_mask("default")
    base, masked = layer.get_base_layer(), layer.get_masked_weight()
    weight = layer.get_dense_weight()
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert type(layer.get_base_layer()) is type(base)
        assert not layer.get_stored_weight()[~mask].any()
        assert relative_error(layer.get_stored_weight(), masked) <= 0.15
        assert report_model(model).layers[0].zeros >= layer.get_num_pruned("default")
        assert relative_error(output(model), before) <= 0.15
        model.unmerge_adapter()
        assert layer.get_base_layer() is base
        assert torch.equal(layer.get_dense_weight(), weight)
        assert torch.equal(output(model), before)
    merged = model.merge_and_unload()
    assert type(merged.adapted) is type(base)
    assert relative_error(output(merged), before) <= 0.15


@those_that_keep_zeros
def test_the_base_is_let_go_once_unloaded(quantise: Callable) -> None:
    model = sparse(quantise)
    base = weakref.ref(model.base_model.model.adapted.get_base_layer())
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert base() is None, f"kept alive by {merged}"


def bitsandbytes_fp4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    sizes = linear.in_features, linear.out_features
    quantised = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, compress_statistics=False)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


@pytest.mark.parametrize("quantise", [needs("bitsandbytes", bitsandbytes_nf4), needs("bitsandbytes", bitsandbytes_fp4)])
def test_scales_survive_the_packing_for_a_kernel_of_the_cpu(quantise: Callable) -> None:
    model = sparse(quantise)
    (layer,) = layers_of(model).values()
    weight, before = layer.get_dense_weight(), output(model)
    for _ in range(2):
        with model.disable_adapter():
            output(model)  # the layer itself runs, and bitsandbytes packs it where the CPU has bfloat16
        assert relative_error(layer.get_dense_weight(), weight) <= 4e-3, "the scales are rounded"
    assert relative_error(output(model), before) <= 0.02


@every_quantisation
def test_a_dense_result_is_exact(quantise: Callable) -> None:
    model = sparse(quantise)
    (layer,) = layers_of(model).values()
    before, masked = output(model), layer.get_masked_weight()
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.adapted) is type(merged.other) is nn.Linear
    assert torch.equal(merged.adapted.weight, masked)
    assert int((merged.adapted.weight == 0).sum()) == num_pruned(masked.numel(), 0.6)
    assert not hasattr(merged, "hf_quantizer")
    torch.testing.assert_close(output(merged), before, rtol=1e-4, atol=2e-2)  # `other` runs dense, no longer quantised


@pytest.mark.parametrize("quantise", [needs("hqq", hqq_int4)])
def test_zeros_that_would_be_lost_are_counted_and_nothing_is_changed(quantise: Callable) -> None:
    model = sparse(quantise)
    before, base = output(model), model.base_model.model.adapted.get_base_layer()
    with pytest.raises(RuntimeError, match=r"Layer adapted: \d+ of 4915 zeros would be lost.*dequantize=True"):
        model.merge_adapter()
    assert model.base_model.model.adapted.get_base_layer() is base
    assert not model.base_model.model.adapted.merged
    assert torch.equal(output(model), before)


@those_that_keep_zeros
def test_a_copy_of_a_merged_layer_goes_back_as_well(quantise: Callable) -> None:
    model = sparse(quantise)
    before = output(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(output(twin), before)


@every_quantisation
def test_saved_and_loaded(quantise: Callable, tmp_path: Path) -> None:
    model = sparse(quantise)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Model(quantise), str(tmp_path)).eval()
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("quantise", [needs("torchao", torchao_int8)])
def test_a_layer_whose_quantisation_is_not_known_is_merged_dense(quantise: Callable) -> None:
    base = Model(quantise)
    del base.hf_quantizer
    model = get_peft_model(base, PSTConfig(target_modules=["adapted"], initial_sparsity=0.5, r=1)).eval()
    before = output(model)
    with pytest.raises(ValueError, match=r"only of models that transformers quantised.*dequantize=True"):
        model.merge_adapter()
    assert torch.equal(output(model), before)
    assert int((model.merge_and_unload(dequantize=True).adapted.weight == 0).sum()) == 64 * 128 // 2


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("torchao", {}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("bitsandbytes", {"load_in_8bit": True}),
    ],
    ids=["torchao int8", "bitsandbytes 4 bit", "bitsandbytes 8 bit"],
)
def test_a_model_that_transformers_quantised(package: str, options: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip(package)
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantisation = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantisation = BitsAndBytesConfig(**options)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    )
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(2))
    model = get_peft_model(base, PSTConfig(target_sparsity=0.5, r=2, init_weights=False))
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    update_sparsity(model, 10, 10)
    masks = {layer.module_name: layer.get_mask("default") for layer in layers_of(model).values()}
    assert len(masks) == 7
    model.eval().merge_adapter()
    for layer in layers_of(model).values():
        assert not layer.get_stored_weight()[~masks[layer.module_name]].any()
    model.unmerge_adapter()
    requantised = copy.deepcopy(model).merge_and_unload()
    requantised.save_pretrained(tmp_path / "requantised")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "requantised", device_map="cpu")
    for name, mask in masks.items():
        stored, loaded = (dense_weight(other, name) for other in (requantised, reloaded))
        assert torch.equal(loaded, stored)
        assert not loaded[~mask].any()
    with torch.no_grad():
        before = model(tokens).logits
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path / "pruned")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(tokens).logits, before, rtol=1e-3, atol=1e-3)
    for name, mask in masks.items():
        assert not reloaded.get_submodule(name).weight[~mask].any()
