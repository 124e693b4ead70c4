"""An adapter loads alike through every door: PEFT's, PEFT's with low_cpu_mem_usage, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny_models import (
    assert_same_tensors,
    inputs,
    layers_of,
    logits,
    masks,
    net,
    outputs,
    pruned_net,
    tiny_gpt2,
    train_a_little,
)
from torch import nn
from transformers import AutoModelForCausalLM

from peft_pst import PSTConfig

HALF = [torch.bfloat16, torch.float16]


def adapter_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if "pst_" in name}


def saved_gpt2(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A trained adapter in `folder` / adapter, on a base in `folder` / base."""
    tiny_gpt2().to(dtype).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = get_peft_model(base, PSTConfig(**{"target_sparsity": 0.5, "task_type": "CAUSAL_LM", **options}))
    train_a_little(model).eval().save_pretrained(folder / "adapter")
    return model


# The precision that an adapter was stored in decides which weights are pruned


def by_auto_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=dtype)


def by_load_adapter(folder: Path, dtype: torch.dtype) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model.load_adapter(str(folder / "adapter"))
    return model


def by_low_cpu_mem_usage(folder: Path, dtype: torch.dtype) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder / "adapter", low_cpu_mem_usage=True)


@pytest.mark.parametrize("load", [by_auto_model, by_load_adapter, by_low_cpu_mem_usage])
@pytest.mark.parametrize("dtype", HALF)
def test_a_base_in_half_precision_does_not_round_the_adapter(
    tmp_path: Path, dtype: torch.dtype, load: Callable[[Path, torch.dtype], nn.Module]
) -> None:
    model = saved_gpt2(tmp_path, dtype)
    loaded = load(tmp_path, dtype).eval()
    assert loaded.dtype == dtype
    assert_same_tensors(get_peft_model_state_dict(loaded), unprefixed(loaded, get_peft_model_state_dict(model)))
    for mask, expected in zip(masks(loaded).values(), masks(model).values(), strict=True):
        assert torch.equal(mask, expected)
    assert torch.equal(logits(loaded), logits(model))


def unprefixed(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(model, PeftModel):
        return state
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_injected_adapter_keeps_its_precision(low_cpu_mem_usage: bool) -> None:
    model = pruned_net(torch.bfloat16)
    config = PSTConfig(target_sparsity=0.6, r=2, score_rank=3)
    injected = inject_adapter_in_model(config, net(torch.bfloat16), low_cpu_mem_usage=low_cpu_mem_usage)
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model), low_cpu_mem_usage=low_cpu_mem_usage)
    assert adapter_dtypes(injected) == {torch.float32}
    assert torch.equal(outputs(injected, inputs(torch.bfloat16)), outputs(model, inputs(torch.bfloat16)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_autocast_adapter_dtype_false_rounds_to_the_base_alike(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    pruned_net(torch.bfloat16).save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": False, "is_trainable": True}
    model = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path, **options)
    other = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **options)
    assert adapter_dtypes(other) == {torch.bfloat16}
    assert_same_tensors(get_peft_model_state_dict(other), get_peft_model_state_dict(model))
    assert {layer.pst_num_pruned["default"].dtype for layer in layers_of(other).values()} == {torch.int64}
    assert all(p.requires_grad == ("pst_" in name) for name, p in other.named_parameters())


def test_on_a_base_in_double_precision_the_adapter_is_in_double_too(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(net(torch.float64), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert adapter_dtypes(loaded) == {torch.float64}
