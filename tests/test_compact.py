"""Compact checkpoints: exact, small, streamed, whole or not there, and refused where they are damaged."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_bert, save_gpt2
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertLayer

from peft_pst import compact_checkpoint, expand_checkpoint, load_compact, topk_mask
from peft_pst.checkpoint import COMPACT_INDEX_NAME, COMPACT_NAME, StoredTensor, checkpoint_files, stored_tensors
from peft_pst.compact import compact_sizes
from peft_pst.packing import compact_ratio


def prune(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data[~topk_mask(parameter.data.abs().float(), sparsity)] = 0
    return model


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """The same tensors, bit for bit, whatever the files."""
    tensors = [
        {k: t for file in checkpoint_files(path) for k, t in load_file(file).items()} for path in (actual, expected)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[1].items():
        assert same_bits(tensors[0][key], tensor), key


def mixed_tensors() -> dict[str, Tensor]:
    """Sparse and dense, in every precision, with what comparisons and copies like to change."""
    torch.manual_seed(0)
    tensors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        sparse = torch.randn(24, 40).where(torch.rand(24, 40) < 0.1, 0)
        sparse[0, :4] = torch.tensor([-0.0, math.inf, -math.inf, math.nan])
        sparse = sparse.to(dtype)
        words = sparse.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        words[0, 3] += 5
        tensors[f"layers.0.{dtype}.weight"] = sparse
        tensors[f"layers.1.{dtype}.weight"] = torch.randn(24, 40).to(dtype)
    tensors["layers.0.bias"] = torch.zeros(24)
    tensors["ids"] = torch.arange(600) * (torch.arange(600) % 20 == 0)
    tensors["flags"] = torch.arange(9) % 2 == 0
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    return tensors


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    folder.mkdir()
    save_file(mixed_tensors(), folder / "model.safetensors", {"format": "pt", "note": "kept"})
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


# Round trips


@pytest.mark.parametrize("shard", ["2GB", "4KB", 1])
def test_every_bit_comes_back(mixed, tmp_path, shard):
    sizes = compact_checkpoint(mixed, tmp_path / "small", max_shard_size=shard)
    expand_checkpoint(tmp_path / "small", tmp_path / "dense", max_shard_size=shard)
    assert_same_checkpoint(tmp_path / "dense", mixed)
    for file in checkpoint_files(tmp_path / "dense"):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt", "note": "kept"}
    assert sizes.compact < sizes.dense == sum(tensor.nbytes for tensor in mixed_tensors().values())
    assert sizes == compact_sizes(tmp_path / "small")
    assert (sizes.packed, sizes.tensors) == (5, 13)
    is_sharded = shard != "2GB"
    assert (tmp_path / "small" / COMPACT_INDEX_NAME).is_file() == is_sharded
    assert (tmp_path / "small" / COMPACT_NAME).is_file() != is_sharded
    assert not [*(tmp_path / "small").glob("*.part")]


def test_an_expanded_file_is_the_original_file(mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small")
    expand_checkpoint(tmp_path / "small", tmp_path / "dense")
    original, expanded = ((folder / "model.safetensors").read_bytes() for folder in (mixed, tmp_path / "dense"))
    assert sorted(original) == sorted(expanded)
    assert len(original) == len(expanded)


def test_shards_keep_to_their_size_and_the_index_tells_them_apart(mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small", max_shard_size="4KB")
    index = json.loads((tmp_path / "small" / COMPACT_INDEX_NAME).read_text())
    files = checkpoint_files(tmp_path / "small")
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        tensors = load_file(file)
        assert (
            sum(tensor.nbytes for tensor in tensors.values()) <= 4000
            or len({key.partition(".pst_")[0] for key in tensors}) == 1
        )
        assert all(index["weight_map"][key] == file.name for key in tensors)
    assert index["metadata"]["total_size"] == compact_sizes(tmp_path / "small").compact


def test_a_tensor_is_packed_only_where_that_is_smaller(tmp_path):
    def zeros_but(kept: int, numel: int = 4096) -> Tensor:
        return (torch.arange(numel) < kept).half()

    tensors = {"a": zeros_but(4096 - 256 - 60), "b": zeros_but(4096 - 256), "c": zeros_but(0, 8), "d": zeros_but(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    compact_checkpoint(tmp_path, tmp_path / "small")
    packed = {stored.key: stored.kept for stored in stored_tensors(checkpoint_files(tmp_path / "small"))}
    assert packed == {"a": None, "b": None, "c": None, "d": 0}
    tensors["a"] = zeros_but(4096 - 256 - 80)
    save_file(tensors, tmp_path / "model.safetensors")
    compact_checkpoint(tmp_path, tmp_path / "smaller")
    assert (tmp_path / "smaller" / COMPACT_NAME).stat().st_size < (tmp_path / "small" / COMPACT_NAME).stat().st_size
    assert {s.key: s.kept for s in stored_tensors(checkpoint_files(tmp_path / "smaller"))}["a"] is not None


def test_one_file_without_a_folder_of_its_own(mixed, tmp_path):
    compact_checkpoint(mixed / "model.safetensors", tmp_path / "small")
    assert [file.name for file in (tmp_path / "small").iterdir()] == [COMPACT_NAME]
    expand_checkpoint(tmp_path / "small" / COMPACT_NAME, tmp_path / "dense")
    assert_same_checkpoint(tmp_path / "dense", mixed)


def test_ninety_per_cent_zeros_take_a_sixth_of_the_dense_file(tmp_path):
    torch.manual_seed(0)
    layer = prune(BertLayer(BertConfig()).bfloat16())
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    compact_checkpoint(tmp_path, tmp_path / "small")
    dense, small = (
        (f / n).stat().st_size for f, n in ((tmp_path, "model.safetensors"), (tmp_path / "small", COMPACT_NAME))
    )
    assert small <= 0.17 * dense
    stored = [s for s in stored_tensors(checkpoint_files(tmp_path / "small")) if s.kept is not None]
    assert len(stored) == 8, "six matrices and two biases of zeros"
    stored = [s for s in stored if len(s.shape) == 2]
    ratio = sum(s.stored_bytes for s in stored) / sum(s.dense_bytes for s in stored)
    assert ratio == pytest.approx(compact_ratio(16, 0.9), abs=1e-4)


def torch_pruned() -> Tensor:
    """What multiplying by a mask leaves: -0.0 where a negative weight was."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    return weight * topk_mask(weight.abs(), 0.9)


def test_negative_zeros_are_values_unless_they_are_given_up(tmp_path):
    weight = torch_pruned()
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"^1,8\d\d of 4,096 weights are -0.0, .*negative_zeros=False"):
        sizes = compact_checkpoint(tmp_path, tmp_path / "exact")
    assert same_bits(read_all(tmp_path / "exact")["a.weight"], weight)
    without = compact_checkpoint(tmp_path, tmp_path / "small", negative_zeros=False)
    assert without.compact < sizes.compact / 2
    back = read_all(tmp_path / "small")["a.weight"]
    assert torch.equal(back, weight)
    assert same_bits(back, torch.where(weight == 0, 0, weight))


def test_giving_up_negative_zeros_changes_nothing_else(mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small", negative_zeros=False)
    tensors = read_all(tmp_path / "small")
    for key, tensor in mixed_tensors().items():
        expected = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
        assert not torch.equal(expected.signbit(), tensor.signbit()) or "0.torch" not in key
        assert same_bits(tensors[key], expected), key


# What goes along


def test_configuration_tokenizer_and_the_like_are_copied(tmp_path):
    folder = Path(save_gpt2(tmp_path / "gpt2"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "model.safetensors").write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / ".cache").mkdir()
    with pytest.warns(UserWarning, match=r"checkpoint-7' holds other weights, and was not copied"):
        compact_checkpoint(folder, tmp_path / "small")
    left_out = {"model.safetensors", "checkpoint-7", "training_args.bin", ".cache"}
    expected = {entry.name for entry in folder.iterdir()} - left_out
    assert {entry.name for entry in (tmp_path / "small").iterdir()} == expected | {COMPACT_NAME}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "small" / name).read_bytes() == (folder / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("the film")["input_ids"]
    expand_checkpoint(tmp_path / "small", tmp_path / "dense")
    GPT2LMHeadModel.from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize("model_class", [BertModel, AutoModel])
def test_a_stock_loader_says_that_there_are_no_weights(tmp_path, model_class):
    folder = save_bert(tmp_path / "bert")
    compact_checkpoint(folder, tmp_path / "small")
    compact_checkpoint(folder, tmp_path / "shards", max_shard_size="4KB")
    for name in ("small", "shards"):
        with pytest.raises(OSError, match=r"no file named model.safetensors"):
            model_class.from_pretrained(tmp_path / name)


# Loading


def save_llama(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    prune(LlamaForCausalLM(config).bfloat16()).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    prune(T5ForConditionalGeneration(config)).save_pretrained(folder)


def save_mixtral(folder: Path) -> None:
    config = MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=2,
    )
    prune(MixtralForCausalLM(config)).save_pretrained(folder)


def save_classifier(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    prune(BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))).save_pretrained(folder)


def assert_same_model(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(actual) is type(expected)
    assert actual.training is expected.training is False
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[1].items():
        assert same_bits(states[0][key], tensor), key
    pointers = [{key: tensor.data_ptr() for key, tensor in state.items()} for state in states]
    for a in states[1]:
        for b in states[1]:
            assert (pointers[0][a] == pointers[0][b]) == (pointers[1][a] == pointers[1][b]), f"{a} and {b}: tied?"


@pytest.mark.parametrize(
    "save", [save_classifier, save_llama, save_t5, save_mixtral, save_gpt2], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("shard", ["2GB", "3KB"])
def test_one_call_loads_the_stock_model(save: Callable[[Path], object], shard, tmp_path):
    torch.manual_seed(0)
    save(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small", max_shard_size=shard)
    loaded = load_compact(tmp_path / "small")
    expected = type(loaded).from_pretrained(tmp_path / "dense")
    assert type(loaded).__name__ == expected.config.architectures[0]
    assert_same_model(loaded, expected)
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "small")
    if expected.can_generate():
        assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()


def test_the_class_may_be_named(tmp_path):
    save_classifier(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    for model_class in (BertModel, AutoModel):
        expected = model_class.from_pretrained(tmp_path / "dense")
        assert_same_model(load_compact(tmp_path / "small", model_class), expected)


def test_options_of_from_pretrained_hold(tmp_path):
    save_llama(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, device_map="cpu")
    actual = load_compact(tmp_path / "small", AutoModelForCausalLM, dtype=torch.float32, device_map="cpu")
    assert actual.dtype == torch.float32
    assert_same_model(actual, expected)


def test_a_configuration_without_a_type_leaves_it_to_the_weights(tmp_path):
    save_llama(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    assert load_compact(tmp_path / "small").dtype == torch.bfloat16


def test_another_configuration_may_be_given(tmp_path):
    save_classifier(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    config = BertConfig.from_pretrained(tmp_path / "dense", num_labels=5)
    model = load_compact(tmp_path / "small", config=config, ignore_mismatched_sizes=True)
    assert model.num_labels == 5


def test_a_class_that_transformers_do_not_have_is_refused(tmp_path):
    save_classifier(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "architectures": ["MyBert"]}))
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    with pytest.raises(ValueError, match=r"names the class 'MyBert', which transformers do not have; pass model_class"):
        load_compact(tmp_path / "small")
    with pytest.raises(ValueError, match="is no model class of transformers"):
        load_compact(tmp_path / "small", nn.Linear)


# Streaming


def test_no_more_than_one_file_and_one_tensor_are_held(mixed, tmp_path, monkeypatch):
    limit = 8000
    alive: dict[int, int] = {}
    most = []
    original = StoredTensor.read

    def read(stored: StoredTensor) -> Tensor:
        most.append(sum(alive.values()))
        tensor = original(stored)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", read)
    sizes = compact_checkpoint(mixed, tmp_path / "small", max_shard_size=limit)
    largest = max(tensor.nbytes for tensor in mixed_tensors().values())
    assert max(most) <= limit + largest < sizes.dense / 2
    most.clear()
    expand_checkpoint(tmp_path / "small", tmp_path / "dense", max_shard_size=limit)
    assert max(most) <= limit + largest


def test_loading_holds_no_second_copy(tmp_path, monkeypatch):
    save_llama(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    made: list[Tensor] = []
    original = StoredTensor.read

    def read(stored: StoredTensor) -> Tensor:
        made.append(original(stored))
        return made[-1]

    monkeypatch.setattr(StoredTensor, "read", read)
    model = load_compact(tmp_path / "small")
    pointers = {tensor.data_ptr() for tensor in made}
    assert {parameter.data_ptr() for parameter in model.parameters()} <= pointers, "what was read is the parameter"
    assert len(made) == len({*model.parameters()}), "each was read once"


# Whole or not there


def test_what_fails_leaves_what_was_there(mixed, tmp_path, monkeypatch):
    compact_checkpoint(mixed, tmp_path / "small")
    before = {file.name: file.read_bytes() for file in (tmp_path / "small").iterdir()}
    calls = []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        save_file(*args)

    monkeypatch.setattr("peft_pst.compact.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        compact_checkpoint(mixed, tmp_path / "small", max_shard_size="4KB", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "small").iterdir()} == before
    calls.clear()
    with pytest.raises(OSError, match="disk full"):
        compact_checkpoint(mixed, tmp_path / "other", max_shard_size="4KB")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mixed", "small"]


def test_what_is_there_is_replaced_only_if_asked(mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small", max_shard_size="4KB")
    with pytest.raises(FileExistsError, match="exists already"):
        compact_checkpoint(mixed, tmp_path / "small")
    compact_checkpoint(mixed, tmp_path / "small", overwrite=True)
    assert checkpoint_files(tmp_path / "small") == [tmp_path / "small" / COMPACT_NAME]
    with pytest.raises(FileExistsError, match="is read from it"):
        compact_checkpoint(mixed, mixed, overwrite=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds something else"):
        compact_checkpoint(mixed, tmp_path / "letters", overwrite=True)


def test_what_is_no_input_is_refused(mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small")
    with pytest.raises(ValueError, match="is compact already"):
        compact_checkpoint(tmp_path / "small", tmp_path / "smaller")
    for function in (lambda: expand_checkpoint(mixed, tmp_path / "other"), lambda: load_compact(mixed)):
        with pytest.raises(ValueError, match=r"is a dense checkpoint; load it with from_pretrained\(\)"):
            function()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no safetensors files"):
        compact_checkpoint(tmp_path / "nothing", tmp_path / "other")
    for size in ("2 parsecs", 0, -3):
        with pytest.raises(ValueError, match="max_shard_size="):
            compact_checkpoint(mixed, tmp_path / "other", max_shard_size=size)
    save_file({"a.pst_mask": torch.ones(3)}, tmp_path / "nothing" / "model.safetensors")
    with pytest.raises(ValueError, match=r"'a.pst_mask' .* has a name that the compact format keeps for itself"):
        compact_checkpoint(tmp_path / "nothing", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Damage


def read_all(path: Path) -> dict[str, Tensor]:
    return {stored.key: stored.read() for stored in stored_tensors(checkpoint_files(path))}


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def in_shapes(change: Callable[[dict], object]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def changed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        shapes = json.loads(metadata["shapes"])
        change(shapes)
        metadata["shapes"] = json.dumps(shapes)

    return changed


IDS, MASK, VALUES = "ids", "ids.pst_mask", "ids.pst_values"
DAMAGES = {
    "a value is missing": (lambda t, m: t.update({VALUES: t[VALUES][1:]}), "'ids': its mask keeps 29 values, but 28"),
    "a bit is flipped": (lambda t, m: t[MASK].__setitem__(0, 5), "'ids': its mask keeps 3[01] values, but 29"),
    "no values": (lambda t, m: t.pop(VALUES), "'ids.pst_values' is missing"),
    "no mask": (lambda t, m: t.pop(MASK), "'ids.pst_mask' is missing"),
    "a mask of another kind": (
        lambda t, m: t.update({MASK: t[MASK].to(torch.int8)}),
        r"ids.pst_mask is I8 of shape \[75\]",
    ),
    "values in a matrix": (
        lambda t, m: t.update({VALUES: t[VALUES][None]}),
        r"ids.pst_values is I64 of shape \[1, 29\]",
    ),
    "more values than entries": (in_shapes(lambda s: s.update(ids=[20])), "ids.pst_mask is U8 of shape"),
    "a huge shape": (in_shapes(lambda s: s.update(ids=[1 << 62, 1 << 62])), "has a mask of .* bytes"),
    "a negative shape": (in_shapes(lambda s: s.update(ids=[-600])), "the shape of tensor 'ids' holds what is no size"),
    "a text for a shape": (in_shapes(lambda s: s.update(ids="600")), "the shape of tensor 'ids' is no list"),
    "sizes in fractions": (
        in_shapes(lambda s: s.update(ids=[600.0])),
        "the shape of tensor 'ids' holds what is no size",
    ),
    "axes without end": (
        in_shapes(lambda s: s.update(ids=[600, *[1] * 99])),
        "the shape of tensor 'ids' is no list of at",
    ),
    "a shape without a tensor": (in_shapes(lambda s: s.update(more=[8])), "'more.pst_mask' is missing"),
    "twice": (lambda t, m: t.update(ids=torch.ones(2)), "tensor 'ids' is there twice"),
    "shapes that are no JSON": (lambda t, m: m.update(shapes="{"), "its metadata 'shapes' cannot be read"),
    "shapes nested without end": (lambda t, m: m.update(shapes="[" * 100_000), "its metadata 'shapes' cannot be read"),
    "shapes in a list": (lambda t, m: m.update(shapes="[]"), "its metadata 'shapes' is no JSON object"),
    "no shapes": (lambda t, m: m.pop("shapes"), "its metadata 'shapes' cannot be read"),
    "a later version": (lambda t, m: m.update(version="2"), "is of version '2' of the compact format, .* reads 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(name, mixed, tmp_path):
    change, message = DAMAGES[name]
    compact_checkpoint(mixed, tmp_path / "small")
    rewrite(tmp_path / "small" / COMPACT_NAME, change)
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / "small")
    with pytest.raises(ValueError, match=message):
        expand_checkpoint(tmp_path / "small", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_damage_is_refused_while_loading(tmp_path):
    save_classifier(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    key = "bert.encoder.layer.0.attention.self.key.weight"
    rewrite(tmp_path / "small" / COMPACT_NAME, lambda t, m: t[f"{key}.pst_mask"].__setitem__(0, 255))
    with pytest.raises((ValueError, RuntimeError), match=rf"tensor '{key}': its mask keeps"):
        load_compact(tmp_path / "small")


@pytest.mark.parametrize("names", [["../mixed/model.safetensors"], ["/etc/passwd"], [""], [3], {"a": "b"}, None])
def test_an_index_leads_nowhere_else(names, mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small", max_shard_size="4KB")
    index = tmp_path / "small" / COMPACT_INDEX_NAME
    weight_map = dict(enumerate(names)) if isinstance(names, list) else names
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"is damaged|is missing"):
        read_all(tmp_path / "small")


def test_a_missing_or_doubled_file_is_named(mixed, tmp_path):
    compact_checkpoint(mixed, tmp_path / "small", max_shard_size="4KB")
    first, second, *_ = checkpoint_files(tmp_path / "small")
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=rf"{second.name}.* is damaged: tensor .* is in {first.name} too"):
        read_all(tmp_path / "small")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{first.name}' is missing, although compact.safetensors.index.json"):
        load_compact(tmp_path / "small")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tensors = {"a.weight": (torch.arange(300.0) % 7 == 0).bfloat16().view(20, 15), "b.bias": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    compact_checkpoint(folder, folder / "small")
    return folder / "small" / COMPACT_NAME


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_the_file_nothing_but_a_clear_error_comes_out(small_file, tmp_path, data):
    good = small_file.read_bytes()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, len(bad) - 1))
        bad[position] = data.draw(st.integers(0, 255))
    bad = bad[: data.draw(st.sampled_from([len(bad), data.draw(st.integers(0, len(bad)))]))]
    file = tmp_path / COMPACT_NAME
    file.write_bytes(bad)
    try:
        tensors = read_all(tmp_path)
    except (ValueError, FileNotFoundError) as error:
        outcome = str(error)
    else:
        # Values, names and shapes of as many entries may have changed, which nothing can tell.
        outcome = COMPACT_NAME if sum(tensor.numel() for tensor in tensors.values()) < 10_000 else "too much"
    assert COMPACT_NAME in outcome


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, small_file, tmp_path):
    content = small_file.read_bytes()
    (tmp_path / COMPACT_NAME).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{COMPACT_NAME}' is damaged"):
        load_compact(tmp_path)
