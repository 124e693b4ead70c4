"""What another tuner learned on a pruned model is merged without filling its zeros."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import Net, logits, net, outputs, pruned_net, shake, tiny_gpt2, train_a_little
from torch import nn

from peft_pst import PSTConfig, merge_keeping_zeros


def pruned_base(dtype: torch.dtype = torch.float32) -> Net:
    """A plain model with zeros in its blocks."""
    return pruned_net(dtype).merge_and_unload()


TARGETS: dict[str, Any] = {"target_modules": ["up", "down"]}
TUNERS: list[PeftConfig] = [
    LoraConfig(r=2, init_lora_weights=False, **TARGETS),
    LoraConfig(r=2, init_lora_weights=False, use_dora=True, **TARGETS),
    LoraConfig(r=2, init_lora_weights=False, modules_to_save=["head"], **TARGETS),
    LoHaConfig(r=2, init_weights=False, **TARGETS),
    IA3Config(feedforward_modules=[], init_ia3_weights=False, **TARGETS),
]


def adapted(config: PeftConfig, base: nn.Module, name: str = "default") -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base, config, adapter_name=name).eval()


@pytest.mark.parametrize("config", TUNERS, ids=lambda config: f"{config.peft_type.value}-{config.modules_to_save}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_tuners_with_the_zeros_of_the_base(config: PeftConfig, dtype: torch.dtype) -> None:
    plain = adapted(config, pruned_base(dtype)).merge_and_unload()
    merged, kept = merge_keeping_zeros(adapted(config, pruned_base(dtype)))
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    base = dict(pruned_base(dtype).named_parameters())
    for name, weight in plain.named_parameters():
        expected = torch.where(base[name] == 0, 0, weight) if name in kept else weight
        assert torch.equal(merged.get_parameter(name), expected), name
    assert set(kept) == {f"layers.{i}.{layer}.weight" for i in (0, 1) for layer in ("up", "down")}
    for name, count in kept.items():
        assert count.zeros == int((merged.get_parameter(name) == 0).sum()) >= int((base[name] == 0).sum()) == 57
        assert count.refilled == int(((plain.get_parameter(name) != 0) & (base[name] == 0)).sum())
        assert count.refilled == (0 if isinstance(config, IA3Config) else 57)


def test_lora_alone_would_make_the_model_dense() -> None:
    merged = adapted(TUNERS[0], pruned_base()).merge_and_unload()
    assert all(torch.count_nonzero(block.up.weight) == 96 for block in merged.layers)


def test_weights_stored_transposed_and_what_was_not_adapted() -> None:
    base = train_a_little(get_peft_model(tiny_gpt2(), PSTConfig(target_sparsity=0.7))).eval().merge_and_unload()
    zeros = {name: int((parameter == 0).sum()) for name, parameter in base.named_parameters() if parameter.dim() == 2}
    lora = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    merged, kept = merge_keeping_zeros(adapted(lora, base))
    assert set(kept) == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    assert {n: int((p == 0).sum()) for n, p in merged.named_parameters() if p.dim() == 2} == zeros
    assert logits(merged).isfinite().all()


def test_chosen_adapters() -> None:
    def model() -> PeftModel:
        both = adapted(TUNERS[0], pruned_base())
        both.add_adapter("other", LoraConfig(r=1, init_lora_weights=False, target_modules=["up"]))
        return both

    merged, kept = merge_keeping_zeros(model(), ["other"])
    assert set(kept) == {"layers.0.up.weight", "layers.1.up.weight"}
    assert torch.equal(merged.layers[0].down.weight, pruned_base().layers[0].down.weight)
    with pytest.raises(ValueError, match=r"no adapters \['nowhere'\] to merge; the model has \['default', 'other'\]"):
        merge_keeping_zeros(model(), ["nowhere"])


def test_without_zeros_it_is_the_ordinary_merge() -> None:
    expected = outputs(adapted(TUNERS[0], net()).merge_and_unload())
    merged, kept = merge_keeping_zeros(adapted(TUNERS[0], net()))
    assert torch.equal(outputs(merged), expected)
    assert {count.refilled for count in kept.values()} == {0}


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    model = adapted(TUNERS[0], pruned_base())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Layer layers\.0\.up: adapters \['default'\] are merged already"):
        merge_keeping_zeros(model)
    model = adapted(TUNERS[0], pruned_base())
    model.base_model.model.layers[1].down.lora_A["default"].weight.data[0, 0] = torch.nan
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"Layer layers\.1\.down: lora_A\.default\.weight holds a NaN"):
        merge_keeping_zeros(model)
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old, rtol=0, atol=0, equal_nan=True)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="changes no weights"):
        merge_keeping_zeros(get_peft_model(tiny_gpt2(), prompts))
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"Layer attention: PEFT takes the weights of torch\.nn\.MultiheadAttention"):
        merge_keeping_zeros(get_peft_model(attention, LoraConfig(target_modules=["attention"])))


def test_modules_trained_in_full_keep_their_zeros_too() -> None:
    base = pruned_base()
    expected = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")}
    zero = {name: base.get_parameter(name) == 0 for name in expected}
    config = LoraConfig(target_modules=["up"], modules_to_save=["down", "head"], init_lora_weights=False)
    model = adapted(config, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    trained = model.base_model.model.layers[1].down.modules_to_save["default"].weight.detach().clone()
    merged, kept = merge_keeping_zeros(model)
    assert set(kept) == expected
    for name, at in zero.items():
        assert torch.equal(merged.get_parameter(name) == 0, at), name
        assert kept[name].zeros == int(at.sum())
    down = "layers.1.down.weight"
    assert kept[down].refilled == kept[down].zeros
    assert torch.equal(merged.get_parameter(down), torch.where(zero[down], 0, trained))


def test_tokens_trained_alone_are_named_as_in_the_plain_model() -> None:
    base = tiny_gpt2()
    base.transformer.wte.weight.data[:, 3] = 0
    config = LoraConfig(target_modules=["c_proj"], trainable_token_indices=[1, 2])
    model = adapted(config, base)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(1.0)
    merged, kept = merge_keeping_zeros(model)
    assert kept["transformer.wte.weight"].refilled == 2
    assert (merged.get_parameter("transformer.wte.weight")[:, 3] == 0).all()
    assert set(kept) <= {name for name, _ in merged.named_parameters(remove_duplicate=False)}  # wte is tied


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_fill_the_zeros_themselves_are_refused(start: str) -> None:
    model = adapted(LoraConfig(r=2, init_lora_weights=start, **TARGETS), pruned_base())
    with pytest.raises(ValueError, match=f"'default' was started with init_lora_weights='{start}', which takes"):
        merge_keeping_zeros(model)


def test_a_quantised_base_is_refused() -> None:
    model = adapted(TUNERS[0], pruned_base())
    layer = model.base_model.model.layers[0].up.base_layer
    layer.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Layer layers\.0\.up: weight is stored as torch\.int8"):
        merge_keeping_zeros(model)


def test_pst_adapters_merge_as_ever() -> None:
    expected = pruned_net().merge_and_unload()
    merged, kept = merge_keeping_zeros(pruned_net())
    assert torch.equal(merged.layers[0].up.weight, expected.layers[0].up.weight)
    assert kept["layers.0.up.weight"].zeros == 57


def test_training_goes_on_through_it() -> None:
    """LoRA trained on a pruned model, merged, pruned further: the zeros only grow."""
    model = adapted(LoraConfig(**TARGETS), pruned_base())
    shake(model, 5)
    merged, _ = merge_keeping_zeros(model)
    again = train_a_little(get_peft_model(merged, PSTConfig(target_sparsity=0.8, keep_zeros=True))).merge_and_unload()
    zero = pruned_base().layers[0].up.weight == 0
    assert not again.layers[0].up.weight[zero].any()
    assert int((again.layers[0].up.weight == 0).sum()) == 76


OVER_PST = r"Layer layers\.0\.up: a peft\.tuners\.lora\.layer adapter cannot be put over its PST adapter"


def test_another_tuner_over_pst_is_refused_before_anything_is_wrapped() -> None:
    """A copy, and a model that never ran, are no different: there is no such model."""
    for model in (pruned_net(), copy.deepcopy(pruned_net()), pickle.loads(pickle.dumps(pruned_net()))):
        expected = outputs(model)
        with pytest.raises(ValueError, match=OVER_PST):
            inject_adapter_in_model(LoraConfig(**TARGETS), model.get_base_model(), "lora")
        with pytest.raises(ValueError, match=OVER_PST):
            get_peft_model(model.get_base_model(), LoraConfig(**TARGETS), adapter_name="lora")
        assert torch.equal(outputs(model), expected)
        assert torch.equal(outputs(model.merge_and_unload()), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_tuner_put_on_what_pst_has_pruned_is_warned_about(copied: Callable[[nn.Module], nn.Module]) -> None:
    def base() -> Net:
        return copied(pruned_base())

    with pytest.warns(UserWarning, match="on weights that PST has pruned.*merge_keeping_zeros") as caught:
        lora = adapted(TUNERS[0], base())
    assert {warning.filename for warning in caught} == {__file__}
    expected, kept = merge_keeping_zeros(lora)
    for model in (copy.deepcopy(adapted(TUNERS[0], base())), adapted(TUNERS[0], copy.deepcopy(base()))):
        merged, again = merge_keeping_zeros(model)  # before any forward
        assert again == kept
        assert torch.equal(outputs(merged), outputs(expected))


def test_no_warning_where_nothing_was_pruned() -> None:
    unloaded = pruned_net().unload()
    dense = pruned_net(target_sparsity=0.0).merge_and_unload()
    head = LoraConfig(target_modules=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(unloaded, TUNERS[0])
        get_peft_model(dense, TUNERS[0])
        get_peft_model(pruned_base(), head)
        get_peft_model(pruned_base(), PSTConfig(keep_zeros=True))
