"""Nothing in an adapter's files is trusted: whatever they hold, loading ends in a clear error or in a sound model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save
from tiny_models import assert_same_tensors, inputs, layers_of, net, outputs, pruned_net, snapshot
from torch import Tensor

QUICK, THOROUGH = 40, 2000
OPTIONS: dict[str, Any] = {"residual": 4, "mask_interval": 3}
UP = "base_model.model.layers.0.up"
# Errors of reading and checking. Anything else, such as a KeyError deep in a library, tells its user nothing.
CLEAR = (ValueError, RuntimeError, SafetensorError)


def saved(folder: Path) -> tuple[bytes, dict[str, Any]]:
    model = pruned_net(**OPTIONS)
    model.update_sparsity(9, 10)
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    return saved(tmp_path_factory.mktemp("adapter"))


def assert_clear_error_or_sound_model(content: bytes, config: dict[str, Any]) -> None:
    base = net()
    before, modules = snapshot(base), dict(base.named_modules())
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(name) / "adapter_model.safetensors").write_bytes(content)
        (Path(name) / "adapter_config.json").write_text(json.dumps(config))
        try:
            model = PeftModel.from_pretrained(base, name)
        except CLEAR:
            assert dict(base.named_modules()) == modules  # taken back, so that a whole file can be loaded now
            assert_same_tensors(snapshot(base), before)
            assert all(parameter.requires_grad for parameter in base.parameters())
            return
    assert_sound(model, before)


def assert_sound(model: PeftModel, base: dict[str, Tensor]) -> None:
    layers = layers_of(model)
    assert layers
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(inputs())
        for name, layer in layers.items():
            assert torch.equal(layer.base_layer.weight, base[f"{name.removeprefix('base_model.model.')}.weight"])
            factors = layer.get_factors("default")
            assert all(t is None or torch.isfinite(t).all() for t in factors.tensors)
            zeros = int((~layer.get_mask("default")).sum())
            assert zeros == layer.get_num_pruned("default")
            assert int((layer.get_masked_weight() == 0).sum()) >= zeros


# Files


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    damage = draw(st.sampled_from(["cut", "flip", "insert", "noise"]))
    if damage == "noise":
        return draw(st.binary(max_size=200))
    # Half of the places lie in the header, which is small beside the tensors.
    header = int.from_bytes(content[:8], "little") + 8
    place = draw(st.integers(0, header) | st.integers(0, len(content) - 1))
    if damage == "cut":
        return content[:place]
    junk = draw(st.binary(min_size=1, max_size=4))
    return content[:place] + junk + content[place + (len(junk) if damage == "flip" else 0) :]


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    state = load(content)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(state)))
        tensor = state[name]
        damage = draw(st.sampled_from(["drop", "rename", "shape", "dtype", "value", "entry", "extra", "swap"]))
        if damage == "drop":
            del state[name]
        elif damage == "rename":
            state[draw(st.sampled_from([name + ".default", "base_model.model.pst_U", "x", name + "U"]))] = state.pop(
                name
            )
        elif damage == "shape":
            state[name] = draw(
                st.sampled_from([tensor.flatten(), tensor[None], tensor.flatten()[:-1], tensor.new_zeros(0)])
            )
        elif damage == "dtype":
            state[name] = tensor.to(
                draw(st.sampled_from([torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]))
            )
        elif damage == "value":
            state[name] = torch.full_like(tensor, draw(st.sampled_from([0, 1, 50])))
        elif damage == "entry" and tensor.numel():
            values: list[float] = [0, 1, 95, 96] + (
                [float("nan"), float("inf"), 3e38] if tensor.is_floating_point() else []
            )
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(values))
        elif damage == "extra":
            state[draw(st.sampled_from([f"{UP}.pst_Z", "base_model.model.layers.9.up.pst_U"]))] = torch.ones(2)
        elif damage == "swap":
            other = draw(st.sampled_from(sorted(state)))
            state[name], state[other] = state[other].clone(), state[name].clone()
        if not state:
            break
    return save({name: tensor.contiguous() for name, tensor in state.items()})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=5) | st.just("up") | st.just("("),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["up", "down", "(", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = [
    "target_sparsity", "initial_sparsity", "r", "score_rank", "structured", "residual", "residual_positions", "beta",
    "alpha1", "alpha2", "warmup_ratio", "cooldown_ratio", "total_steps", "mask_interval", "init_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "fan_in_fan_out", "sparsity_pattern", "rank_pattern", "residual_pattern", "score_rank_pattern", "format_version",
    "inference_mode", "task_type", "revision", "base_model_name_or_path", "a_field_to_come",
]  # fmt: skip


def fuzzing(examples: int) -> Any:
    unhurried = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=unhurried, derandomize=True)


def check_bytes(adapter: tuple[bytes, dict[str, Any]], data: st.DataObject) -> None:
    assert_clear_error_or_sound_model(data.draw(damaged_bytes(adapter[0])), adapter[1])


def check_tensors(adapter: tuple[bytes, dict[str, Any]], data: st.DataObject) -> None:
    assert_clear_error_or_sound_model(data.draw(damaged_tensors(adapter[0])), adapter[1])


def check_config(adapter: tuple[bytes, dict[str, Any]], data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
    assert_clear_error_or_sound_model(adapter[0], {**adapter[1], **changes})


CHECKS = [check_bytes, check_tensors, check_config]


@pytest.mark.parametrize("check", CHECKS)
@given(data=st.data())
@fuzzing(QUICK)
def test_damaged_adapters(adapter: tuple[bytes, dict[str, Any]], check: Any, data: st.DataObject) -> None:
    check(adapter, data)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@given(data=st.data())
@fuzzing(THOROUGH)
def test_damaged_adapters_thoroughly(adapter: tuple[bytes, dict[str, Any]], check: Any, data: st.DataObject) -> None:
    check(adapter, data)


# What each damage is called


def refused(changes: dict[str, Tensor | None], match: str, model: PeftModel | None = None) -> None:
    model = pruned_net(**OPTIONS) if model is None else model
    state = {**get_peft_model_state_dict(model), **changes}
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        set_peft_model_state_dict(model, {name: tensor for name, tensor in state.items() if tensor is not None})
    assert_same_tensors(snapshot(model), before)


NAMED = r"Layer layers\.0\.up, adapter 'default': "


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C", "pst_S"])
def test_a_factor_that_is_not_finite(part: str, value: float) -> None:
    tensor = get_peft_model_state_dict(pruned_net(**OPTIONS))[f"{UP}.{part}"].clone()
    tensor.view(-1)[1] = value
    refused({f"{UP}.{part}": tensor}, NAMED + f"{part} holds a NaN or an infinity")


@pytest.mark.parametrize("part", ["pst_U", "pst_C", "pst_S", "pst_mask"])
def test_a_tensor_that_is_missing(part: str) -> None:
    refused({f"{UP}.{part}": None}, NAMED + f"{part} is missing")


def test_a_layer_that_is_missing() -> None:
    names = [name for name in get_peft_model_state_dict(pruned_net(**OPTIONS)) if name.startswith(UP)]
    refused(dict.fromkeys(names), NAMED + "pst_U is missing")


def test_a_tensor_that_has_no_place() -> None:
    refused({f"{UP}.pst_Z": torch.ones(2)}, r"layers\.0\.up\.pst_Z has no place in adapter 'default'")


@pytest.mark.parametrize(
    ("part", "tensor", "problem"),
    [
        ("pst_U", torch.ones(2, 12), r"pst_U has shape \(2, 12\), but the model's has \(12, 2\)"),
        ("pst_R", torch.ones(12, dtype=torch.int64), r"pst_R is of torch\.int64, which is no floating-point type"),
        ("pst_num_pruned", torch.tensor(3.5), r"pst_num_pruned is of torch\.float32 instead of torch\.int64"),
        ("pst_num_pruned", torch.tensor(97), r"pst_num_pruned=97 is outside \[0, 96\)"),
        ("pst_num_pruned", torch.tensor(3), r"pst_mask prunes 57 weights, but pst_num_pruned=3"),
        ("pst_mask", torch.ones(12), r"pst_mask is of torch\.float32 instead of torch\.uint8"),
        ("pst_mask", torch.full((12,), 255, dtype=torch.uint8), r"pst_mask prunes 0 weights, but pst_num_pruned=57"),
        (
            "pst_positions",
            torch.tensor([5, 4, 3, 2]),
            r"pst_positions is not strictly ascending; entry 1 is 4, after 5",
        ),
    ],
    ids=str,
)
def test_a_tensor_of_another_kind(part: str, tensor: Tensor, problem: str) -> None:
    refused({f"{UP}.{part}": tensor}, NAMED + problem)


def test_what_is_sound_loads(adapter: tuple[bytes, dict[str, Any]]) -> None:
    model = pruned_net(**OPTIONS, init_weights=False)
    result = set_peft_model_state_dict(model, load(adapter[0]))
    assert not result.unexpected_keys
    expected = pruned_net(**OPTIONS)
    expected.update_sparsity(9, 10)
    assert torch.equal(outputs(model), outputs(expected))
