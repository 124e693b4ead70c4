"""PST through every door of PEFT and transformers: making, saving, loading, injecting, and the schedule's warnings."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tiny_models import (
    TOKENS,
    Net,
    assert_same_tensors,
    inputs,
    layers_of,
    logits,
    net,
    outputs,
    pruned_net,
    tiny_bert,
    tiny_gpt2,
    train_a_little,
)
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from peft_pst import PSTConfig, get_sparsity, update_sparsity
from peft_pst.masking import num_pruned
from peft_pst.model import pst_layers

PARAMETERS = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")
NEVER_PRUNED = "prunes nothing: its sparsity is still 0"


# Making


def test_state_dict_names_and_shapes() -> None:
    model = get_peft_model(net(), PSTConfig(r=2, score_rank=3))
    shapes = {"pst_U": (12, 2), "pst_V": (2, 8), "pst_A": (12, 3), "pst_B": (3, 8), "pst_R": (12,), "pst_C": (8,)}
    transposed = {"pst_U": (8, 2), "pst_V": (2, 12), "pst_A": (8, 3), "pst_B": (3, 12), "pst_R": (8,), "pst_C": (12,)}
    expected = {
        f"base_model.model.layers.{index}.{layer}.{name}": shape
        for index in (0, 1)
        for layer, layer_shapes in (("up", shapes), ("down", transposed))
        for name, shape in (layer_shapes | {"pst_num_pruned": ()}).items()
    }
    state = get_peft_model_state_dict(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    for name, tensor in state.items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_pruned") else torch.float32)
    in_memory = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    assert {f"{name}.default" for name in expected} <= in_memory


def test_conv1d_tensors_are_out_by_in() -> None:
    model = get_peft_model(tiny_gpt2(), PSTConfig(r=2, score_rank=3))
    state = get_peft_model_state_dict(model)
    prefix = "base_model.model.transformer.h.0.mlp.c_fc."
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
    assert shapes == {
        "pst_U": (64, 2),
        "pst_V": (2, 16),
        "pst_A": (64, 3),
        "pst_B": (3, 16),
        "pst_R": (64,),
        "pst_C": (16,),
        "pst_num_pruned": (),
    }


@pytest.mark.parametrize("init_weights", [True, "fan_in", "paper"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_a_new_adapter_is_the_identity(make: Callable[[], PreTrainedModel], init_weights: bool | str) -> None:
    base = make()
    expected = logits(base)
    model = get_peft_model(base, PSTConfig(init_weights=init_weights)).eval()
    with pytest.warns(UserWarning, match=NEVER_PRUNED):
        assert torch.equal(logits(model), expected)
    model.train()
    assert torch.equal(model.eval()(input_ids=TOKENS).logits, expected)


@pytest.mark.parametrize("options", [{}, {"r": 0}, {"r": 0, "score_rank": 0}, {"structured": False}], ids=str)
def test_without_init_weights_an_adapter_is_not_the_identity(options: dict[str, int]) -> None:
    expected = outputs(net())
    model = get_peft_model(net(), PSTConfig(init_weights=False, **options)).eval()
    assert (outputs(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("init_weights", "spread"), [(True, 1 / 32), ("fan_in", 1 / 32), ("paper", 1.0)])
def test_start_values(init_weights: bool | str, spread: float) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(1024, 512)), PSTConfig(target_modules=["0"], init_weights=init_weights)
    )
    layer = model.base_model.model[0]
    for name in ("pst_U", "pst_A"):
        tensor = getattr(layer, name)["default"]
        assert tensor.std().item() == pytest.approx(spread, rel=0.05)
        assert abs(tensor.mean().item()) < 0.1 * spread
    for name in ("pst_V", "pst_B", "pst_R", "pst_C"):
        assert not getattr(layer, name)["default"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_initial_sparsity_is_in_force_at_once(dtype: torch.dtype) -> None:
    model = get_peft_model(net(dtype), PSTConfig(initial_sparsity=0.37))
    for layer in layers_of(model).values():
        assert layer.get_num_pruned("default") == num_pruned(96, 0.37) == 35
        assert int((layer.get_masked_weight() == 0).sum()) == 35
    assert model.get_sparsity() == get_sparsity(model) == 35 / 96


def test_only_the_adapter_trains() -> None:
    model = get_peft_model(net(), PSTConfig())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {
        f"base_model.model.layers.{i}.{layer}.{name}.default"
        for i in (0, 1)
        for layer in ("up", "down")
        for name in PARAMETERS
    }
    assert trainable == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_not_active_does_not_train(dtype: torch.dtype) -> None:
    model = get_peft_model(net(dtype), PSTConfig())
    model.add_adapter("other", PSTConfig(target_modules="all-linear"))
    trainable = {name.rsplit(".", 1)[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"default"}


def test_trainable_count_of_bert_base() -> None:
    with torch.device("meta"):
        model = get_peft_model(BertModel(BertConfig()), PSTConfig(r=8, score_rank=8, embedding_r=4))
    assert model.get_nb_trainable_parameters()[0] == 2_820_096 + 4 * (30522 + 768)


def test_trainable_count_of_gpt2() -> None:
    with torch.device("meta"):
        model = get_peft_model(GPT2Model(GPT2Config()), PSTConfig(r=8, score_rank=8, embedding_r=0))
    per_block = (2304 + 768) + (768 + 768) + (3072 + 768) + (768 + 3072)  # query, key and value are one matrix
    assert model.get_nb_trainable_parameters()[0] == 12 * 17 * per_block


def test_patterns() -> None:
    config = PSTConfig(
        r=2,
        score_rank=3,
        target_sparsity=0.5,
        rank_pattern={"up": 5},
        score_rank_pattern={r"layers\.1\..*": 1},
        sparsity_pattern={"layers.0.down": 0.75, "1.up": 0.25},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(net(), config)
    update_sparsity(model, 10, 10)
    layers = {name.removeprefix("base_model.model.layers."): layer for name, layer in layers_of(model).items()}
    ranks = {name: (layer.pst_V["default"].shape[0], layer.pst_B["default"].shape[0]) for name, layer in layers.items()}
    assert ranks == {"0.up": (5, 3), "0.down": (2, 3), "1.up": (5, 1), "1.down": (2, 1)}
    zeros = {name: int((layer.get_masked_weight() == 0).sum()) for name, layer in layers.items()}
    assert zeros == {"0.up": 48, "0.down": 72, "1.up": 24, "1.down": 48}
    assert model.get_sparsity() == 192 / 384


def test_a_rank_pattern_may_switch_a_part_off() -> None:
    model = pruned_net(rank_pattern={"up": 0}, score_rank_pattern={"down": 0})
    up, down = model.base_model.model.layers[0].up, model.base_model.model.layers[0].down
    assert not up.pst_U
    assert not up.pst_V
    assert up.pst_A
    assert not down.pst_A
    assert down.pst_U
    assert outputs(model).isfinite().all()


def test_patterns_that_leave_nothing_to_train_are_refused() -> None:
    config = PSTConfig(structured=False, rank_pattern={"layers.0.up": 0}, score_rank_pattern={"layers.0.up": 0})
    with pytest.raises(ValueError, match=r"Layer layers\.0\.up: the patterns leave r=0, residual=0 and score_rank=0"):
        get_peft_model(net(), config)


@pytest.mark.parametrize("field", ["rank_pattern", "residual_pattern", "score_rank_pattern", "sparsity_pattern"])
def test_pattern_keys_that_match_nothing_are_named(field: str) -> None:
    config = PSTConfig(**{field: {"up": 0.5 if field == "sparsity_pattern" else 1, "nowhere": 0}})
    with pytest.warns(RuntimeWarning, match=rf"{field}.*nowhere") as caught:
        get_peft_model(net(), config)
    (warning,) = caught
    assert "'up'" not in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("norm", r"Target module norm \(LayerNorm\) is not supported: PST adapts torch\.nn\.Linear"),
        ("quantised", r"Target module quantised \(Linear\) is not supported.*dequantise the model"),
    ],
)
def test_unsupported_modules_are_refused(target: str, match: str) -> None:
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "quantised": quantised})
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, PSTConfig(target_modules=[target]))


def test_linears_that_torch_reads_without_calling_them_are_adapted_where_they_are_named_only() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    with pytest.raises(ValueError, match="no linear layers inside numbered blocks"):
        get_peft_model(nn.TransformerEncoder(block, 2, enable_nested_tensor=False), PSTConfig())


def test_an_adapter_without_its_counts_is_refused(tmp_path: Path) -> None:
    model = pruned_net()
    state = get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=r"lack pst_num_pruned.*for 4 layers, such as .*layers\.0\.down"):
        set_peft_model_state_dict(model, {name: t for name, t in state.items() if "num_pruned" not in name})


def test_a_base_without_data_is_refused() -> None:
    model = get_peft_model(net(), PSTConfig()).to("meta")
    with pytest.raises(RuntimeError, match=r"Layer layers\.0\.up: the base weight has no data"):
        model(inputs().to("meta"))


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(net(), PSTConfig(target_modules=["nowhere"]))


def test_a_model_without_blocks_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`: this model has no linear"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PSTConfig())


def test_nested_tuners_are_refused() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["up"]), net(), adapter_name="lora")
    with pytest.raises(ValueError, match=r"module layers\.0\.up .*it already carries a peft\.tuners\.lora"):
        inject_adapter_in_model(PSTConfig(target_modules=["up"]), model, adapter_name="pst")
    assert set(model.peft_config) == {"lora"}


def test_a_refused_adapter_leaves_the_configuration_of_its_name() -> None:
    model = pruned_net()
    config = model.peft_config["default"]
    with pytest.raises(ValueError, match="carries a PST adapter named 'default'"):
        inject_adapter_in_model(PSTConfig(target_modules=["head"]), model.get_base_model())
    assert model.peft_config == {"default": config}
    assert model.get_sparsity() == pruned_net().get_sparsity()


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["head"]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)]
)
def test_no_other_tuner_is_put_around_a_pst_model(config: PeftConfig) -> None:
    model = pruned_net()
    before = [name for name, _ in model.named_modules()]
    with pytest.warns(match="for a second time"), pytest.raises(ValueError, match="PST is not nested with"):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == before


def test_mixed_batches_are_refused() -> None:
    model = pruned_net()
    with pytest.raises(ValueError, match="PST cannot mix adapters within a batch"):
        model(inputs(), adapter_names=["default"] * 5)


def test_mixed_models_and_hotswap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PST"):
        get_peft_model(net(), PSTConfig(), mixed=True)
    model = pruned_net()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PST"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


def test_all_linear_and_exclude_modules() -> None:
    model = get_peft_model(net(), PSTConfig(target_modules="all-linear", exclude_modules=["down"]))
    assert {name.removeprefix("base_model.model.") for name in layers_of(model)} == {
        "layers.0.up",
        "layers.1.up",
        "head",
    }


def test_layers_to_transform() -> None:
    model = get_peft_model(tiny_bert(), PSTConfig(layers_to_transform=[1]))
    assert len(layers_of(model)) == 6
    assert all(name.startswith("base_model.model.bert.encoder.layer.1.") for name in layers_of(model))


def test_hooks_on_the_base_layer_are_reported() -> None:
    base = net()
    base.layers[0].up.register_forward_hook(lambda *_: None)
    model = pruned_net()
    model.base_model.model.layers[0].up.base_layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"Hooks on the base layer of layers\.0\.up do not run"):
        outputs(model)


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pruned_net(dtype)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PSTConfig)
    assert (config.r, config.score_rank, config.target_sparsity, config.peft_type) == (2, 3, 0.6, "PST")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or unexpected keys would warn
        loaded = PeftModel.from_pretrained(net(dtype), tmp_path)
    assert_same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(outputs(loaded), outputs(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_load_without_spare_memory(tmp_path: Path, low_cpu_mem_usage: bool, is_trainable: bool) -> None:
    model = pruned_net()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert any(parameter.requires_grad for parameter in loaded.parameters()) == is_trainable
    assert torch.equal(outputs(loaded), outputs(model))


def test_load_adapter_beside_another(tmp_path: Path) -> None:
    model = pruned_net()
    model.save_pretrained(tmp_path)
    other = get_peft_model(net(), PSTConfig(r=4, initial_sparsity=0.1), adapter_name="first").eval()
    before = outputs(other)
    other.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(outputs(other), before)
    other.set_adapter("second")
    assert torch.equal(outputs(other), outputs(model))


def test_save_one_of_several(tmp_path: Path) -> None:
    model = pruned_net()
    model.add_adapter("other", PSTConfig(initial_sparsity=0.2, r=1))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    loaded = PeftModel.from_pretrained(net(), tmp_path / "other")
    assert loaded.get_sparsity() == num_pruned(96, 0.2) / 96


def test_auto_model_for_causal_lm(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    model = train_a_little(get_peft_model(base, PSTConfig(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_sequence_classification_head_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = train_a_little(get_peft_model(base, PSTConfig(task_type="SEQ_CLS"))).eval()
    head = {name for name in get_peft_model_state_dict(model) if "classifier" in name}
    assert head == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert not any("classifier" in name for name in layers_of(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded.base_model.model.classifier.weight, model.base_model.model.classifier.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_modules_to_save(tmp_path: Path) -> None:
    model = pruned_net(modules_to_save=["head"])
    assert not torch.equal(model.base_model.model.head.weight, net().head.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    merged = model.merge_and_unload()
    assert type(merged.head) is nn.Linear
    assert torch.equal(outputs(merged), outputs(loaded))


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", set()),
        ("pst_only", {"layers.0.up", "layers.1.up"}),
        ("all", {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"}),
    ],
)
def test_bias_options(tmp_path: Path, bias: str, trained: set[str]) -> None:
    model = pruned_net(bias=bias, target_modules=["up"])
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".bias")
        for name, parameter in model.named_parameters()
        if name.endswith("bias") and parameter.requires_grad
    }
    assert names == trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(outputs(merged), outputs(model))


def test_trained_bias_gets_a_gradient() -> None:
    model = pruned_net(bias="pst_only")
    model(inputs()).sum().backward()
    for layer in layers_of(model).values():
        assert layer.get_base_layer().bias.grad.any()
        assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize("count", [-1, 96, 10**6])
def test_a_damaged_count_is_refused(count: int) -> None:
    model = pruned_net()
    state = get_peft_model_state_dict(model)
    state["base_model.model.layers.1.up.pst_num_pruned"] = torch.tensor(count)
    message = rf"Layer layers\.1\.up, adapter 'default': pst_num_pruned={count} is outside \[0, 96\)"
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, state)
    model.load_state_dict({f"{name}.default": tensor for name, tensor in state.items()}, strict=False)
    with pytest.raises(ValueError, match=message):
        outputs(model)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    other = net()
    other.layers[0].up = nn.Linear(8, 20)
    with pytest.raises(
        ValueError, match=r"Layer layers\.0\.up.*pst_U has shape \(12, 2\), but the model's has \(20, 2\)"
    ):
        PeftModel.from_pretrained(other, tmp_path)


def test_counts_survive_a_change_of_dtype() -> None:
    model = pruned_net()
    counts = [layer.get_num_pruned("default") for layer in layers_of(model).values()]
    model.to(torch.bfloat16)
    assert [layer.get_num_pruned("default") for layer in layers_of(model).values()] == counts
    assert {layer.pst_num_pruned["default"].dtype for layer in layers_of(model).values()} == {torch.int64}


def test_saved_files_hold_no_pickle(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    save_file(saved, tmp_path / "again.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PST"


# Injection, without a PeftModel round it


def test_inject_adapter_in_model() -> None:
    model = train_a_little(inject_adapter_in_model(PSTConfig(target_sparsity=0.6, r=2, score_rank=3), net()))
    assert type(model) is Net
    assert model.eval().layers[0].up.get_num_pruned("default") == 57
    assert get_sparsity(model) == 57 / 96
    assert torch.equal(outputs(model), outputs(pruned_net()))


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    model = tiny_bert()
    dense = logits(model)
    model.add_adapter(PSTConfig(target_sparsity=0.7), adapter_name="mine")
    train_a_little(model)
    model.eval()
    pruned = logits(model)
    assert model.active_adapters() == ["mine"]
    model.save_pretrained(tmp_path)
    assert "adapter_model.safetensors" in {path.name for path in tmp_path.iterdir()}

    loaded = tiny_bert()
    loaded.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(loaded.eval()), pruned)
    assert get_sparsity(loaded) == get_sparsity(model)

    model.disable_adapters()
    assert torch.equal(logits(model), dense)
    model.enable_adapters()
    assert torch.equal(logits(model), pruned)
    model.add_adapter(PSTConfig(target_sparsity=0.7), adapter_name="other")
    model.set_adapter("mine")
    assert torch.equal(logits(model), pruned)
    model.delete_adapter("mine")
    assert not any("pst_" in name and name.endswith(".mine") for name in model.state_dict())


# The warning about a schedule that never moved


def never_pruned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if NEVER_PRUNED in str(warning.message)]


@pytest.mark.parametrize("with_gradient", [False, True])
def test_evaluating_a_schedule_that_never_moved_warns_once(with_gradient: bool) -> None:
    model = get_peft_model(net(), PSTConfig()).eval()
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(with_gradient):
        warnings.simplefilter("always")
        model(inputs())
        model(inputs())
    (message,) = never_pruned(caught)
    for part in ("'default'", "target is 0.9", "callbacks=[PSTCallback()]", "update_sparsity(step, total_steps)"):
        assert part in message


@pytest.mark.parametrize("run", [logits, lambda model: model.merge_and_unload()], ids=["evaluating", "merging"])
def test_the_warning_names_the_line_that_led_to_it(run: Callable[[nn.Module], object]) -> None:
    model = get_peft_model(tiny_bert(), PSTConfig()).eval()
    with pytest.warns(UserWarning, match=NEVER_PRUNED) as caught:
        run(model)
    assert {warning.filename for warning in caught} <= {__file__, tiny_models.__file__}  # where `logits` is


def test_merging_a_schedule_that_never_moved_warns_once() -> None:
    model = get_peft_model(net(), PSTConfig())
    with pytest.warns(UserWarning, match=NEVER_PRUNED) as caught:
        model.merge_and_unload()
    assert len(never_pruned(caught.list)) == 1


@pytest.mark.parametrize("options", [{}, {"initial_sparsity": 0.3}, {"target_sparsity": 0.0}], ids=str)
def test_no_warning_where_none_is_due(options: dict[str, float]) -> None:
    model = get_peft_model(net(), PSTConfig(**options))
    if not options:
        update_sparsity(model, 1, 100)  # driven, though still at 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        model(inputs()).sum().backward()
        outputs(model.eval())
        model.merge_and_unload()


def test_training_does_not_warn() -> None:
    model = get_peft_model(net(), PSTConfig()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs()).sum().backward()


def one_group_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=24, num_key_value_heads=1)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "heads"},  # one group of heads, of which half is none
        {"pattern": "heads+neurons"},
        {"pattern": "16x16", "target_sparsity": 0.4, "target_modules": ["q_proj", "up_proj"]},
        {"scope": "global", "target_sparsity": 0.05, "target_modules": ["q_proj", "up_proj"]},
    ],
    ids=str,
)
def test_a_layer_that_its_target_leaves_dense_is_not_said_to_have_never_been_pruned(
    options: dict[str, object], tmp_path: Path
) -> None:
    config = PSTConfig(**{"target_sparsity": 0.5, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(one_group_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if options.get("scope") and "q_proj.pst_R" in name:
                parameter += 100.0  # so that the other matrix bears all zeros
    update_sparsity(model, 1, 1)
    assert any(not layer.get_num_pruned("default") for layer in pst_layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(one_group_llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NEVER_PRUNED}")
        loaded(inputs_of_llama())
        loaded.merge_and_unload()
        plain = one_group_llama()
        plain.load_adapter(str(tmp_path))
        plain.eval()(inputs_of_llama())


def test_a_loaded_adapter_that_was_never_pruned_still_warns(tmp_path: Path) -> None:
    options = {"scope": "global", "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(one_group_llama(), PSTConfig(**options)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=NEVER_PRUNED):
        PeftModel.from_pretrained(one_group_llama(), tmp_path)(inputs_of_llama())


def inputs_of_llama() -> torch.Tensor:
    return torch.tensor([[3, 7, 11, 20]])


def test_a_loaded_adapter_that_was_pruned_does_not_warn(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(net(), tmp_path)
        outputs(model)
        model.merge_and_unload()


@pytest.mark.parametrize(
    "options", [{}, {"mask_interval": None}, {"residual": 3}, {"embedding_modules": ["embed_tokens"]}], ids=str
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_an_adapter_without_data_says_how_it_gets_some(options: dict[str, object], with_gradient: bool) -> None:
    config = PSTConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    loaded = get_peft_model(one_group_llama(), config)
    state, expected = get_peft_model_state_dict(loaded), loaded(inputs_of_llama()).logits
    model = get_peft_model(one_group_llama(), config, low_cpu_mem_usage=True)
    uses = [
        lambda: model(inputs_of_llama()),
        lambda: model.train()(inputs_of_llama()),
        model.merge_adapter,
        model.merge_and_unload,
        lambda: update_sparsity(model, 1, 1),
    ]
    with torch.set_grad_enabled(with_gradient):
        for use in uses:
            with pytest.raises(
                RuntimeError, match=r"Layer \S+: adapter 'default' has no data .*set_peft_model_state_dict"
            ):
                use()
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        assert torch.equal(model.eval()(inputs_of_llama()).logits, expected)


def test_update_sparsity_refusals() -> None:
    with pytest.raises(ValueError, match=r"no active PST adapter\. Make one with get_peft_model"):
        update_sparsity(net(), 1, 10)
    with pytest.raises(ValueError, match="no active PST adapter"):
        get_sparsity(net())
    model = get_peft_model(net(), PSTConfig())
    with pytest.raises(ValueError, match="total_steps is not known, so the schedule has no length"):
        model.update_sparsity(1)
    with pytest.raises(ValueError, match="step=-1 is negative"):
        model.update_sparsity(-1, 10)
    assert model.get_sparsity() == 0


def test_update_and_allocate_is_the_same() -> None:
    model = get_peft_model(net(), PSTConfig(total_steps=10))
    assert [model.update_and_allocate(step) for step in (0, 4, 10)] == [
        model.update_sparsity(step) for step in (0, 4, 10)
    ]
    assert model.get_sparsity() == num_pruned(96, 0.9) / 96
