"""An adapter loads alike through every door: PEFT's, PEFT's with low_cpu_mem_usage, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
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


# What a load that fails leaves behind: nothing


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(folder: Path, part: str, changed: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change or drop the tensors of an adapter file whose names end so."""
    file = folder / "adapter_model.safetensors"
    state = {name: changed(tensor) if name.endswith(part) else tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


def misshape(folder: Path) -> None:
    change(folder, "pst_R", lambda tensor: tensor[:-1].contiguous())


def delete(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


DAMAGES = [truncate, misshape, delete]


class Attentive(nn.Module):
    """Every kind of place that PST takes: a host, a layer within it, an embedding, a plain layer; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
        self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x)
        return self.head(torch.tanh(self.up(self.layers[0](hidden, hidden, hidden)[0])))


ATTENTIVE: dict[str, Any] = {
    "target_modules": ["layers.0", "up"],
    "embedding_modules": ["tokens"],
    "modules_to_save": ["head"],
    "initial_sparsity": 0.2,
    "target_sparsity": 0.5,
}
IDS = torch.tensor([[1, 5, 9, 3]])


def attentive() -> Attentive:
    torch.manual_seed(0)
    return Attentive().eval()


def state_of(model: nn.Module) -> dict[str, Any]:
    """What of a model a load may change: modules in order, tensors by identity and value, and what trains."""
    tensors = model.state_dict(keep_vars=True)
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "tensors": [(name, id(tensor), tensor.detach().clone().tolist()) for name, tensor in tensors.items()],
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "adapters": {n: (sorted(la.pst_plans), list(la.active_adapters)) for n, la in layers_of(model).items()},
        "configs": dict(getattr(model, "peft_config", {})),
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
    }


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_is_as_it_was_when_an_adapter_could_not_be_loaded(
    tmp_path: Path, damage: Callable[[Path], None], low_cpu_mem_usage: bool
) -> None:
    model = train_a_little(get_peft_model(attentive(), PSTConfig(**ATTENTIVE))).eval()
    for folder in ("good", "bad"):
        model.save_pretrained(tmp_path / folder)
    damage(tmp_path / "bad")
    base = attentive()
    base.up.bias.requires_grad_(False)
    before = state_of(base)
    with pytest.raises(Exception, match=r"pst_R has shape|deserializing|Repo id"):
        PeftModel.from_pretrained(base, tmp_path / "bad", low_cpu_mem_usage=low_cpu_mem_usage)
    assert state_of(base) == before
    loaded = PeftModel.from_pretrained(base, tmp_path / "good", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs(loaded, IDS), outputs(model, IDS))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_could_not_be_loaded_beside_another_is_gone(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    wider = PSTConfig(**{**ATTENTIVE, "target_modules": ["layers.0", "up"]})
    train_a_little(get_peft_model(attentive(), wider)).save_pretrained(tmp_path)
    narrow = {**ATTENTIVE, "target_modules": ["up"], "embedding_modules": []}
    model = train_a_little(get_peft_model(attentive(), PSTConfig(**narrow), "first"))
    before, expected = state_of(model), outputs(model, IDS)
    damage(tmp_path)
    with pytest.raises(Exception, match=r"pst_R has shape|deserializing|Repo id"):
        model.load_adapter(tmp_path, "second")
    assert state_of(model) == before
    assert torch.equal(outputs(model, IDS), expected)
    assert model.active_adapters == ["first"]
    wider_model = get_peft_model(attentive(), wider)
    wider_model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(outputs(model, IDS), outputs(wider_model.eval(), IDS))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plain_model_is_as_it_was_when_transformers_could_not_load(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    expected = logits(saved_gpt2(tmp_path))
    copytree(tmp_path / "adapter", tmp_path / "bad")
    damage(tmp_path / "bad")
    model = tiny_gpt2()
    for name in ("first", "second"):  # into a plain model, and beside another adapter
        before = state_of(model)
        with pytest.raises(Exception, match=r"ignore_mismatched_sizes|deserializing|No such file"):
            model.load_adapter(str(tmp_path / "bad"), adapter_name=name)
        assert state_of(model) == before
        model.load_adapter(str(tmp_path / "adapter"), adapter_name=name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model), expected)


def test_a_name_that_is_taken_costs_the_injected_adapter_nothing(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    base = train_a_little(inject_adapter_in_model(PSTConfig(target_sparsity=0.5), net()))
    before = state_of(base)
    with pytest.raises(ValueError, match="carries a PST adapter named 'default'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert state_of(base) == before


def test_another_tuner_is_left_to_peft(tmp_path: Path) -> None:
    get_peft_model(net(), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    delete(tmp_path)
    base = net()
    with pytest.raises(ValueError, match="Repo id"):
        PeftModel.from_pretrained(base, tmp_path)
    assert any("lora_" in name for name in base.state_dict())


# Files that do not hold the whole adapter


@pytest.mark.parametrize(
    "tensors", [{}, {"x": torch.ones(1)}, {"base_model.model.head.weight": torch.ones(3, 8)}], ids=list
)
@pytest.mark.parametrize("options", [{}, {"r": 0}, {"score_rank": 0, "structured": False}], ids=str)
def test_a_file_without_any_tensor_of_the_adapter_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    model = pruned_net(**options)
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    message = (
        "The file holds no tensor of adapter 'default', which 4 layers have, such as base_model.model.layers.0.down"
    )
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(net(), tmp_path)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert state_of(model) == before


def test_a_rank_may_set_nothing_and_biases_may_be_set_alone() -> None:
    model = pruned_net()
    before = state_of(model)
    set_peft_model_state_dict(model, {})
    assert state_of(model) == before
    bias = {"base_model.model.layers.0.up.base_layer.bias": torch.ones(12)}
    set_peft_model_state_dict(model, bias)
    assert layers_of(model)["base_model.model.layers.0.up"].base_layer.bias.tolist() == [1.0] * 12


LAYER = r"Layer transformer\.h\.0\.attn\.c_attn, adapter 'default': "
DAMAGED_TENSORS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = [
    ("h.0.attn.c_attn.pst_num_pruned", lambda _: None, LAYER + "pst_num_pruned is missing"),
    ("h.0.attn.c_attn.pst_U", lambda _: None, LAYER + "pst_U is missing"),
    ("pst_num_pruned", lambda _: None, "pst_num_pruned is missing"),
    ("h.0.attn.c_attn.pst_C", lambda tensor: tensor * float("nan"), LAYER + "pst_C holds a NaN"),
    ("h.0.attn.c_attn.pst_num_pruned", lambda count: count + 768, LAYER + r"pst_num_pruned=1152 is outside \[0, 768\)"),
]


def load_here(folder: Path) -> nn.Module:
    model = tiny_gpt2()
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("load", [load_here, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("part", "changed", "message"), DAMAGED_TENSORS, ids=[case[2].removeprefix(LAYER) for case in DAMAGED_TENSORS]
)
def test_what_transformers_loads_by_itself_is_checked(
    tmp_path: Path, load: Callable[[Path], nn.Module], part: str, changed: Any, message: str
) -> None:
    saved_gpt2(tmp_path)
    change(tmp_path / "adapter", part, changed)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "adapter")


def test_transformers_casts_counts_before_anyone_can_look(tmp_path: Path) -> None:
    saved_gpt2(tmp_path)
    change(tmp_path / "adapter", "h.0.attn.c_attn.pst_num_pruned", lambda count: count + 0.5)
    loaded = load_here(tmp_path / "adapter")
    assert layers_of(loaded)["transformer.h.0.attn.c_attn"].get_num_pruned("default") == 384


def test_what_has_no_place_in_a_plain_model_is_refused(tmp_path: Path) -> None:
    saved_gpt2(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.transformer.h.9.mlp.c_fc.pst_U": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"h\.9\.mlp\.c_fc\.pst_U\S* has no place in adapter 'default'"):
        load_here(tmp_path / "adapter")


def test_what_does_not_fit_is_refused_also_where_transformers_would_ignore_it(tmp_path: Path) -> None:
    saved_gpt2(tmp_path)
    misshape(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"pst_R has shape \(47,\), but the model's has \(48,\)"):
        tiny_gpt2().load_adapter(str(tmp_path / "adapter"), ignore_mismatched_sizes=True)


# Into what is merged


def test_nothing_is_loaded_into_an_adapter_that_is_merged(tmp_path: Path) -> None:
    options = {**ATTENTIVE, "init_weights": False}
    other = train_a_little(get_peft_model(attentive(), PSTConfig(**options)), seed=1).eval()
    other.save_pretrained(tmp_path)
    model = train_a_little(get_peft_model(attentive(), PSTConfig(**options))).eval()
    model.merge_adapter()
    before = state_of(model)
    message = r"adapter 'default' while it is merged, .* into 4 layers, such as layers.0.\S+; call unmerge_adapter\(\)"
    with pytest.raises(RuntimeError, match=message):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(RuntimeError, match=message):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert state_of(model) == before
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(model, IDS), outputs(other, IDS))
