"""PST through every door of PEFT and transformers: making, saving, loading, merging, switching, deleting."""

from __future__ import annotations

import copy
import enum
import gc
import importlib
import json
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import oracle
import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import peft_pst
from peft_pst import PSTConfig, PSTLayer, PSTModel, get_sparsity, update_sparsity
from peft_pst import _registration as registration
from peft_pst.config import PSTPeftType
from peft_pst.masking import num_pruned

PARAMETERS = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")
NEVER_PRUNED = "prunes nothing: its sparsity is still 0"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two residual blocks and a head: the smallest thing with the structure of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
TOKENS = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2)).eval()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def layers_of(model: nn.Module) -> dict[str, PSTLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PSTLayer)}


def train_a_little(model: nn.Module, step: int = 10, seed: int = 0) -> nn.Module:
    """Stand-in for training: every trainable tensor moves, and the schedule too (step 10 of 10 is the target)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    update_sparsity(model, step, 10)
    return model


def pruned_net(dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = PSTConfig(**{"target_sparsity": 0.6, "r": 2, "score_rank": 3, **options})
    return train_a_little(get_peft_model(net(dtype), config)).eval()


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor | None = None) -> Tensor:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return model(inputs(parameter.dtype) if x is None else x)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def run_python(code: str, *arguments: object) -> str:
    """Run code in a new process that knows the package by its import alone."""
    root = str(Path(peft_pst.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Registration


def test_registered_under_the_name_and_the_prefix() -> None:
    for key in (PSTPeftType.PST, "PST"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is PSTConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is PSTModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "pst_"


def test_registering_again_is_harmless() -> None:
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    registration.register()
    importlib.reload(registration)
    importlib.reload(peft_pst)
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    assert outputs(pruned_net()).isfinite().all()


@pytest.mark.parametrize("version", ["0.20.0", "0.9.1", "0.21.0rc1"])
def test_peft_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs peft>=0\.21\.0, but peft {version} is installed; run `pip install"):
        registration.register()


def test_tuner_name_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PSTPeftType.PST, LoraModel)
    with pytest.raises(ImportError, match="already has a method named PST or with the prefix pst_"):
        registration.register()


def test_prefix_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.LORA, "pst_")
    with pytest.raises(ImportError, match="already has a method named PST or with the prefix pst_"):
        registration.register()


def test_name_taken_by_a_later_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "PeftType", enum.Enum("PeftType", {"LORA": "LORA", "PST": "PST"}))
    with pytest.raises(ImportError, match="Upgrade peft_pst, or install an older peft"):
        registration.register()


IN_A_NEW_PROCESS = """
import importlib, pickle, sys
from pathlib import Path
import peft_pst, torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

folder = Path(sys.argv[1])
tokens = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])
base = AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()
models = {
    "loaded": PeftModel.from_pretrained(base, folder / "adapter"),
    "auto": AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter"),
    "pickled": pickle.loads((folder / "model.pickle").read_bytes()),
    "merged": AutoModelForSequenceClassification.from_pretrained(folder / "merged"),
}
assert pickle.loads((folder / "config.pickle").read_bytes()) == PeftConfig.from_pretrained(folder / "adapter")
with torch.no_grad():
    save_file({name: model.eval()(input_ids=tokens).logits for name, model in models.items()}, folder / "logits")
print(models["loaded"].get_sparsity())
for name in ("config", "layer", "model", "_registration"):
    importlib.reload(importlib.import_module(f"peft_pst.{name}"))
importlib.reload(peft_pst)
again = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")
assert type(again.base_model) is peft_pst.PSTModel
"""


def test_a_new_process_gives_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    """Saved in mid-schedule: loaded by path, by AutoPeft, pickled whole, and merged."""
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, PSTConfig(target_sparsity=0.8, total_steps=10, task_type="SEQ_CLS")).eval()
    train_a_little(model, step=3)
    assert 0 < model.get_sparsity() < 0.8
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(PeftConfig.from_pretrained(tmp_path / "adapter")))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    sparsity = model.get_sparsity()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert float(run_python(IN_A_NEW_PROCESS, tmp_path)) == sparsity
    results = load_file(tmp_path / "logits")
    assert set(results) == {"loaded", "auto", "pickled", "merged"}
    for name, result in results.items():
        assert torch.equal(result, expected), name


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
        model = get_peft_model(BertModel(BertConfig()), PSTConfig(r=8, score_rank=8))
    assert model.get_nb_trainable_parameters()[0] == 2_820_096


def test_trainable_count_of_gpt2() -> None:
    with torch.device("meta"):
        model = get_peft_model(GPT2Model(GPT2Config()), PSTConfig(r=8, score_rank=8))
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
    with pytest.raises(ValueError, match=r"Layer layers\.0\.up: the patterns leave r=0 and score_rank=0"):
        get_peft_model(net(), config)


@pytest.mark.parametrize("field", ["rank_pattern", "score_rank_pattern", "sparsity_pattern"])
def test_pattern_keys_that_match_nothing_are_named(field: str) -> None:
    config = PSTConfig(**{field: {"up": 0.5 if field == "sparsity_pattern" else 1, "nowhere": 0}})
    with pytest.warns(RuntimeWarning, match=rf"{field}.*nowhere") as caught:
        get_peft_model(net(), config)
    assert not any("'up'" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("embed", r"Target module embed \(Embedding\) is not supported\. PST adapts torch\.nn\.Linear"),
        ("conv", r"Target module conv \(Conv2d\) is not supported"),
        ("quantised", r"Target module quantised \(Linear\) is not supported.*dequantise it"),
    ],
)
def test_unsupported_modules_are_refused(target: str, match: str) -> None:
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "conv": nn.Conv2d(1, 1, 1), "quantised": quantised})
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, PSTConfig(target_modules=[target]))


def test_the_projection_that_attention_reads_without_calling_is_left_alone() -> None:
    """An adapter on it would train, save and merge, and do nothing in between."""
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    adapted = get_peft_model(copy.deepcopy(model), PSTConfig())
    assert adapted.peft_config["default"].target_modules == {"linear1", "linear2"}
    with pytest.raises(
        ValueError, match=r"self_attn\.out_proj.*not supported.*except inside torch\.nn\.MultiheadAttent"
    ):
        get_peft_model(model, PSTConfig(target_modules=["out_proj"]))


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(net(), PSTConfig(target_modules=["nowhere"]))


def test_a_model_without_blocks_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`: this model has no linear"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PSTConfig())


def test_nested_tuners_are_refused() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["up"]), net(), adapter_name="lora")
    with pytest.raises(ValueError, match=r"Module layers\.0\.up already carries a peft\.tuners\.lora"):
        inject_adapter_in_model(PSTConfig(target_modules=["up"]), model, adapter_name="pst")


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
    set_peft_model_state_dict(model, state)
    message = rf"Layer layers\.1\.up, adapter 'default': pst_num_pruned={count} is outside \[0, 96\)"
    with pytest.raises(ValueError, match=message):
        outputs(model)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    other = net()
    other.layers[0].up = nn.Linear(8, 20)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)


def test_counts_survive_a_change_of_dtype() -> None:
    model = pruned_net()
    counts = [layer.get_num_pruned("default") for layer in layers_of(model).values()]
    model.to(torch.bfloat16)
    assert [layer.get_num_pruned("default") for layer in layers_of(model).values()] == counts
    assert {layer.pst_num_pruned["default"].dtype for layer in layers_of(model).values()} == {torch.int64}


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


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [net, tiny_bert, tiny_gpt2])
def test_merge_and_unmerge_bit_for_bit(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = train_a_little(get_peft_model(make().to(dtype), PSTConfig(target_sparsity=0.6))).eval()
    output = outputs if make is net else logits
    expected, before = output(model), snapshot(model)
    model.merge_adapter()
    assert torch.equal(output(model), expected)
    for layer in layers_of(model).values():
        weight = layer.get_base_layer().weight
        assert weight.dtype == dtype
        assert int((weight == 0).sum()) >= num_pruned(weight.numel(), 0.6)
        assert not torch.signbit(weight[weight == 0]).any()
    assert snapshot(model).keys() == before.keys()  # the dense weight put aside is no part of the state
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("base", [nn.Linear(1000, 100), Conv1D(100, 1000)], ids=["linear", "conv1d"])
def test_a_merged_weight_lies_in_memory_as_a_loaded_one_does(base: nn.Module) -> None:
    """At this size the order of the sums, and so the last bits, depend on the layout."""
    nn.init.normal_(base.weight)
    model = train_a_little(get_peft_model(nn.Sequential(copy.deepcopy(base)), PSTConfig(target_modules=["0"]))).eval()
    x = torch.randn(5, 1000)
    expected = outputs(model, x)
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged, x), expected)
    stock = nn.Sequential(base)
    stock.load_state_dict(merged.state_dict())
    assert stock[0].weight.stride() == merged[0].weight.stride()
    assert torch.equal(outputs(stock, x), expected)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_merge_and_unload(make: Callable[[], PreTrainedModel]) -> None:
    plain = {name: type(module) for name, module in make().named_modules()}
    model = train_a_little(get_peft_model(make(), PSTConfig(target_sparsity=0.7))).eval()
    expected = logits(model)
    names = [name.removeprefix("base_model.model.") for name in layers_of(model)]
    merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert {name: type(module) for name, module in merged.named_modules()} == plain
    for name, module in merged.named_modules():
        if name in names:
            weight = module.weight
            assert int((weight == 0).sum()) == num_pruned(weight.numel(), 0.7)
        elif isinstance(module, nn.Linear):
            assert module.weight.all()
    assert torch.equal(logits(merged), expected)
    assert not hasattr(merged, "peft_config")


def test_merge_from_a_schedule_in_mid_course() -> None:
    model = train_a_little(get_peft_model(net(), PSTConfig()), step=4)
    counts = {
        name.removeprefix("base_model.model."): layer.get_num_pruned("default")
        for name, layer in layers_of(model).items()
    }
    merged = model.merge_and_unload()
    for name, count in counts.items():
        assert 0 < count < num_pruned(96, 0.9)
        assert int((merged.get_submodule(name).weight == 0).sum()) == count


def test_progressbar_shows_unless_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    pruned_net().merge_and_unload(progressbar=True)
    assert "Unloading and merging model" in capsys.readouterr().err
    pruned_net().merge_and_unload()
    assert "Unloading" not in capsys.readouterr().err


def test_unload_returns_the_base() -> None:
    model = pruned_net()
    assert_same_tensors(model.unload().state_dict(), net().state_dict())


def test_a_merged_model_does_not_prune_twice() -> None:
    model = pruned_net()
    model.merge_adapter()
    expected = outputs(model)
    scores = {name: layer.get_scores("default") for name, layer in layers_of(model).items()}
    with pytest.warns(UserWarning, match="merge"):
        model.merge_adapter()
    assert torch.equal(outputs(model), expected)
    model.unmerge_adapter()
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.get_scores("default"), scores[name])


def test_a_cast_while_merged_holds_after_unmerging() -> None:
    model, expected = pruned_net(), net(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    assert {layer.get_masked_weight().dtype for layer in layers_of(model).values()} == {torch.bfloat16}
    model.unmerge_adapter()
    assert outputs(model).dtype == torch.bfloat16
    assert_same_tensors(model.unload().state_dict(), expected.state_dict())


def test_a_merged_adapter_cannot_be_deleted() -> None:
    model = two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        model.delete_adapter("b")


def test_switching_while_merged_unmerges_first() -> None:
    model = two_adapters()
    expected = outputs(model)
    model.set_adapter("a")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert torch.equal(outputs(model), expected)


def test_saved_while_merged(tmp_path: Path) -> None:
    model = pruned_net()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(net(), tmp_path)), outputs(model))


def test_a_state_loaded_while_merged_leaves_the_dense_weight_alone() -> None:
    model = pruned_net()
    dense = snapshot(model)
    model.merge_adapter()
    model.load_state_dict(snapshot(model))
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), dense)


def test_unmerging_twice_warns() -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        pruned_net().unmerge_adapter()


def test_the_sparsity_of_a_merged_adapter_cannot_change() -> None:
    model = pruned_net()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"cannot change while it is merged; call unmerge_adapter\(\) first"):
        model.update_sparsity(3, 10)


def test_merge_under_autocast_is_exact() -> None:
    model = pruned_net()
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = model.merge_and_unload()
    assert_same_tensors(merged.state_dict(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["pst_V", "pst_R"])
@pytest.mark.parametrize("step", [1, 10])
def test_safe_merge_refuses_broken_adapters(name: str, bad: float, step: int) -> None:
    """A NaN in the scores counts too, although it need not reach any weight; at step 1 nothing is pruned yet."""
    model = train_a_little(get_peft_model(net(), PSTConfig()), step=step)
    with torch.no_grad():
        getattr(model.base_model.model.layers[1].down, name)["default"].view(-1)[0] = bad
    before = snapshot(model)
    message = r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
    with pytest.raises(ValueError, match=message):
        model.base_model.model.layers[1].down.merge(safe_merge=True)
    assert not model.base_model.model.layers[1].down.merged
    assert_same_tensors(snapshot(model), before)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)


def test_safe_merge_refuses_what_overflows_in_the_bases_dtype() -> None:
    model = pruned_net(torch.float16)
    with torch.no_grad():
        model.base_model.model.layers[1].down.pst_V["default"].mul_(1e6)
    assert model.base_model.model.layers[1].down.get_scores("default").isfinite().all()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


def test_nan_scores_end_in_an_error_that_names_the_layer() -> None:
    model = pruned_net()
    with torch.no_grad():
        model.base_model.model.layers[1].down.pst_C["default"][3] = float("nan")
    with pytest.raises(ValueError, match=r"Layer layers\.1\.down, adapter 'default': The scores hold a NaN"):
        outputs(model)


# Several adapters


def two_adapters() -> PeftModel:
    model = get_peft_model(net(), PSTConfig(target_sparsity=0.5, r=2), adapter_name="a")
    model.add_adapter("b", PSTConfig(target_sparsity=0.6, r=3, score_rank=2))
    for seed, name in enumerate("ab"):
        model.set_adapter(name)
        train_a_little(model, seed=seed)
    return model.eval()


def activate(model: PeftModel, names: list[str]) -> None:
    model.base_model.set_adapter(names)


def test_set_adapter_switches() -> None:
    model = two_adapters()
    results = {}
    for name in "abab":
        model.set_adapter(name)
        result = outputs(model)
        assert torch.equal(results.setdefault(name, result), result)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable
        assert {parameter.rsplit(".", 1)[1] for parameter in trainable} == {name}
    assert not torch.equal(results["a"], results["b"])
    alone = PSTConfig(target_sparsity=0.5, r=2)
    other = get_peft_model(net(), alone)
    state = get_peft_model_state_dict(model, adapter_name="a")
    set_peft_model_state_dict(other, state)
    assert torch.equal(outputs(other.eval()), results["a"])


def test_two_active_adapters_are_zero_where_either_prunes() -> None:
    model = two_adapters()
    activate(model, ["a", "b"])
    active = outputs(model)
    masks = {name: layer.get_mask("a") & layer.get_mask("b") for name, layer in layers_of(model).items()}
    model.merge_adapter(adapter_names=["a", "b"])
    assert torch.equal(outputs(model), active)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.get_base_layer().weight != 0, masks[name])


def test_merging_two_adapters_in_any_order() -> None:
    merged = []
    for steps in ([["a", "b"]], [["b", "a"]], [["a"], ["b"]], [["b"], ["a"]]):
        model = two_adapters()
        activate(model, ["a", "b"])
        dense = snapshot(model)
        for names in steps:
            model.merge_adapter(adapter_names=names)
        merged.append(
            {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers_of(model).items()}
        )
        model.unmerge_adapter()
        assert_same_tensors(snapshot(model), dense)
    for other in merged[1:]:
        for name, weight in merged[0].items():
            assert torch.equal(other[name] == 0, weight == 0)
            torch.testing.assert_close(other[name], weight, rtol=1e-6, atol=1e-6)
    assert_same_tensors(merged[2], merged[0])
    assert_same_tensors(merged[3], merged[1])


def test_merge_and_unload_of_one_of_two() -> None:
    model = two_adapters()
    model.set_adapter("b")
    expected = outputs(model)
    model.set_adapter("a")
    merged = model.merge_and_unload(adapter_names=["b"])
    assert torch.equal(outputs(merged), expected)


def test_two_adapters_against_the_oracle() -> None:
    model = two_adapters()
    activate(model, ["b", "a"])
    for layer in layers_of(model).values():
        weight = layer.get_base_layer().weight.detach()
        adapters = []
        for name in ("b", "a"):
            factors = layer.get_factors(name)
            tensors = dict(zip("UVABRC", factors.tensors, strict=True))
            adapters.append(oracle.Adapter(**tensors, count=num_pruned(96, 0.5 if name == "a" else 0.6)))
        expected = oracle.effective_weight(weight, adapters)
        torch.testing.assert_close(layer.get_masked_weight(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_adapters_with_different_targets() -> None:
    model = get_peft_model(net(), PSTConfig(target_modules=["up"], target_sparsity=0.5), adapter_name="ups")
    train_a_little(model)
    model.eval()
    ups = outputs(model)
    model.add_adapter("downs", PSTConfig(target_modules=["down"], target_sparsity=0.7, initial_sparsity=0.3))
    assert torch.equal(outputs(model), ups)  # it prunes from the start, but is not active yet
    model.set_adapter("downs")
    train_a_little(model)
    assert model.get_sparsity() == num_pruned(96, 0.7) / 96
    downs = outputs(model)
    activate(model, ["ups", "downs"])
    both = outputs(model)
    assert not torch.equal(both, downs)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(outputs(merged), both)
    zeros = [int((merged.layers[0].get_submodule(name).weight == 0).sum()) for name in ("up", "down")]
    assert zeros == [num_pruned(96, 0.5), num_pruned(96, 0.7)]
    model.delete_adapter("downs")
    model.set_adapter("ups")
    assert torch.equal(outputs(model), ups)


def test_delete_adapter_leaves_nothing_behind() -> None:
    model = two_adapters()
    model.set_adapter("a")
    expected = outputs(model)
    model.delete_adapter("b")
    assert torch.equal(outputs(model), expected)
    assert list(model.peft_config) == ["a"]
    assert not [name for name in model.state_dict() if name.endswith(".b")]
    for layer in layers_of(model).values():
        assert "b" not in layer.pst_plans
    model.add_adapter("b", PSTConfig(r=1, initial_sparsity=0.2))
    model.set_adapter("b")
    assert model.get_sparsity() == num_pruned(96, 0.2) / 96


def test_disable_adapter_is_the_base_bit_for_bit() -> None:
    dense = outputs(net())
    model = pruned_net()
    pruned = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), dense)
    assert torch.equal(outputs(model), pruned)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model), dense)
    assert torch.equal(outputs(model), pruned)


def test_model_and_layer_status() -> None:
    model = two_adapters()
    status = model.get_model_status()
    assert status.adapter_model_type == "PSTModel"
    assert set(status.peft_types.values()) == {"PST"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["b"], [])
    assert status.requires_grad == {"a": False, "b": True}
    assert set(status.available_adapters) == {"a", "b"}
    assert status.num_adapter_layers == 4
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    model.merge_adapter()
    for layer in model.get_layer_status():
        assert layer.module_type == "pst.PSTLinear"
        assert layer.merged_adapters == ["b"]
        assert layer.devices == {"a": ["cpu"], "b": ["cpu"]}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# The warning about a schedule that never moved


def never_pruned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if NEVER_PRUNED in str(warning.message)]


def test_evaluating_a_schedule_that_never_moved_warns_once() -> None:
    model = get_peft_model(net(), PSTConfig()).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs(model)
        outputs(model)
    (message,) = never_pruned(caught)
    for part in ("'default'", "target is 0.9", "callbacks=[PSTCallback()]", "update_sparsity(step, total_steps)"):
        assert part in message


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


def test_a_loaded_adapter_that_was_pruned_does_not_warn(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(net(), tmp_path)
        outputs(model)
        model.merge_and_unload()


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


# Caches


def fresh_outputs(model: nn.Module) -> Tensor:
    """The same numbers without any cache: a new model that is given the tensors."""
    config = next(iter(layers_of(model).values())).pst_plans["default"].config
    other = get_peft_model(net(), copy.deepcopy(config)).eval()
    other.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    dtype = next(model.parameters()).dtype
    return outputs(other.to(dtype))


def write_in_place(model: PeftModel) -> None:
    with torch.no_grad():
        model.base_model.model.layers[0].up.pst_V["default"].mul_(-3)


def write_scores(model: PeftModel) -> None:
    with torch.no_grad():
        model.base_model.model.layers[0].up.pst_R["default"].add_(torch.linspace(-5, 5, 12))


def write_base_weight(model: PeftModel) -> None:
    with torch.no_grad():
        model.base_model.model.layers[0].up.get_base_layer().weight.mul_(-2)


def write_count(model: PeftModel) -> None:
    model.base_model.model.layers[0].up.pst_num_pruned["default"].fill_(90)


def replace_data(model: PeftModel) -> None:
    parameter = model.base_model.model.layers[0].up.pst_V["default"]
    parameter.data = parameter.data * -3


def replace_parameter(model: PeftModel) -> None:
    parameters = model.base_model.model.layers[0].up.pst_V
    parameters["default"] = nn.Parameter(parameters["default"].detach() * -3)


def load_state(model: PeftModel) -> None:
    model.load_state_dict({name: -2 * t if "pst_V" in name else t for name, t in model.state_dict().items()})


def load_adapter_state(model: PeftModel) -> None:
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: -2 * t if "pst_V" in name else t for name, t in state.items()})


def optimizer_step(model: PeftModel) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model(inputs()).square().sum().backward()
    optimizer.step()


def move_schedule(model: PeftModel) -> None:
    model.update_sparsity(3, 10)


def change_dtype(model: PeftModel) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def train_in_between(model: PeftModel) -> None:
    model.train()
    optimizer_step(model)
    model.eval()


def write_through_data_in_training(model: PeftModel) -> None:
    """As some optimizers do; autograd's counter of writes does not see it, the step of the schedule tells."""
    model.base_model.model.layers[0].up.pst_V["default"].data.mul_(-3)
    model.update_sparsity(10, 10)


CHANGES = [
    write_in_place,
    write_scores,
    write_base_weight,
    write_count,
    replace_data,
    replace_parameter,
    load_state,
    load_adapter_state,
    optimizer_step,
    move_schedule,
    change_dtype,
    train_in_between,
    write_through_data_in_training,
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(change: Callable[[PeftModel], None], training: bool) -> None:
    model = pruned_net().train(training)
    before = outputs(model)
    assert torch.equal(before, fresh_outputs(model))
    change(model)
    model.train(training)
    after = outputs(model)
    assert torch.equal(after, fresh_outputs(model))
    assert not torch.equal(after, before)
    graph = model(inputs())
    assert torch.equal(graph, after)


def test_a_deep_copy_is_independent() -> None:
    model = pruned_net()
    before = outputs(model)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    write_in_place(twin)
    twin.update_sparsity(4, 10)
    assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(twin), fresh_outputs(twin))
    write_scores(model)
    assert torch.equal(outputs(model), fresh_outputs(model))


def test_a_deep_copy_of_a_merged_model_unmerges() -> None:
    model = pruned_net()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same_tensors(twin.unload().state_dict(), net().state_dict())
    assert model.base_model.model.layers[0].up.merged


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a mask was selected, and how often a masked weight was made."""
    counter: Counter[str] = Counter()

    def count(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*arguments: object) -> Tensor:
            counter[name] += 1
            return original(*arguments)

        return counting

    for name in ("select_mask", "effective_weight"):
        monkeypatch.setattr(peft_pst.layer, name, count(name, getattr(peft_pst.layer, name)))
    return counter


def test_evaluation_ranks_once(calls: Counter[str]) -> None:
    model = pruned_net()
    for _ in range(3):
        outputs(model)
    assert calls == {"select_mask": 4, "effective_weight": 4}  # one for each layer
    model.train()
    model.eval()
    outputs(model)
    model.merge_adapter()
    outputs(model)
    assert calls["select_mask"] == 4


def test_training_ranks_once_a_step(calls: Counter[str]) -> None:
    model = get_peft_model(net(), PSTConfig(total_steps=10)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        for _ in range(3):  # micro-batches
            model(inputs()).sum().backward()
        optimizer.step()
        model.update_sparsity(step)
        assert calls["select_mask"] == 4 * step


def test_dropped_models_are_freed() -> None:
    model = pruned_net()
    outputs(model)
    reference = weakref.ref(model.base_model.model.layers[0].up)
    del model
    gc.collect()
    assert reference() is None


def test_saved_files_hold_no_pickle(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    save_file(saved, tmp_path / "again.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PST"
