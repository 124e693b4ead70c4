"""Reports against counts made by hand: live models, checkpoints whole and sharded, JSON, tables."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import peft_pst.report
from peft_pst import PSTConfig, compact_checkpoint, topk_mask
from peft_pst.masking import num_pruned
from peft_pst.model import pst_layers
from peft_pst.report import (
    REPORT_NAME,
    LayerSparsity,
    SparsityReport,
    checkpoint_weight,
    count_zeros,
    report_checkpoint,
    report_model,
)


def tiny_bert(**changes):
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, **changes
    )
    return BertForSequenceClassification(BertConfig(**sizes))


def tiny_gpt2():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=20, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config)


def adapt(base, adapter_name="default", **config):
    torch.manual_seed(0)
    config = PSTConfig(**{"target_sparsity": 0.7, "r": 2, "score_rank": 2, "init_weights": False, **config})
    return get_peft_model(base, config, adapter_name=adapter_name)


def merge_and_save(model, folder, **kwargs):
    """What `peft-pst merge` does: the promise first, then the weights."""
    promise = report_model(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder, **kwargs)
    promise.save(folder / REPORT_NAME)
    return merged


def slow_zeros(tensor):
    return sum(value == 0.0 for value in tensor.flatten().tolist())


@pytest.mark.parametrize("make_base", [tiny_bert, tiny_gpt2])
def test_zeros_of_a_live_model_are_those_of_the_merged_weights(make_base):
    model = adapt(make_base(), sparsity_pattern={r".*\.0\..*": 0.3})
    model.update_sparsity(7, total_steps=10)
    report = report_model(model)
    merged = dict(model.merge_and_unload().named_modules())
    assert len(report.layers) == len(merged.keys() & {row.name for row in report.layers})
    assert report.zeros == sum(row.zeros for row in report.layers) > 0
    for row in report.layers:
        weight = merged[row.name].weight
        assert row.zeros == slow_zeros(weight) == row.promised
        assert row.target_sparsity == (0.3 if ".0." in row.name else 0.7)
        assert row.shape == tuple(weight.T.shape if row.transposed else weight.shape)
        assert row.transposed == (make_base is tiny_gpt2)


def test_the_target_is_missed_until_the_schedule_reaches_it():
    model = adapt(tiny_bert())
    model.update_sparsity(5, total_steps=10)
    halfway = report_model(model)
    assert halfway.misses_target == halfway.layers
    assert halfway.lost_zeros == ()
    model.update_sparsity(10, total_steps=10)
    report = report_model(model)
    assert report.misses_target == ()
    assert report.sparsity == report.target_sparsity
    assert halfway.sparsity < report.sparsity


def test_zeros_come_from_the_weights_and_not_from_the_state():
    model = adapt(tiny_bert())
    model.update_sparsity(10, total_steps=10)
    model.merge_adapter()
    changed = next(iter(pst_layers(model)))
    changed.get_base_layer().weight.data.add_(0.5)
    report = report_model(model)
    assert [row.name for row in report.lost_zeros] == [changed.module_name]
    assert report.layers[0].zeros == 0
    assert report.layers[0].lost_zeros == report.layers[0].promised


def test_several_adapters_are_reported_alone_and_together():
    model = adapt(tiny_bert(), "first", target_modules=["query"], target_sparsity=0.5, init_weights=True)
    model.add_adapter("second", PSTConfig(target_modules=["query", "key"], target_sparsity=0.8, r=2, score_rank=2))
    for name in ("first", "second"):
        model.set_adapter(name)
        model.update_sparsity(10, total_steps=10)
    assert {row.target_sparsity for row in report_model(model, "first").layers} == {0.5}
    assert {row.name.rpartition(".")[2] for row in report_model(model, "first").layers} == {"query"}
    second = report_model(model)
    assert second == report_model(model, "second")
    assert second.zeros == sum(num_pruned(row.weights, 0.8) for row in second.layers)

    model.base_model.set_adapter(["first", "second"])
    both = report_model(model)
    for row, layer in zip(both.layers, pst_layers(model), strict=True):
        names = [name for name in ("first", "second") if name in layer.pst_plans]
        kept = torch.stack([layer.get_mask(name) for name in names]).all(0)
        assert row.zeros == slow_zeros(kept)
        assert row.promised == num_pruned(row.weights, 0.8)
        assert row.target_sparsity == 0.8
    assert both.trainable_parameters == second.trainable_parameters + report_model(model, "first").trainable_parameters


@pytest.mark.parametrize(("task_type", "bias"), [(None, "none"), ("SEQ_CLS", "none"), ("SEQ_CLS", "pst_only")])
def test_parameters_are_counted_as_trained_and_as_in_the_plain_model(task_type, bias):
    base = tiny_bert()
    plain = sum(parameter.numel() for parameter in base.parameters())
    model = adapt(base, task_type=task_type, bias=bias)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    report = report_model(model)
    assert report.total_parameters == plain
    assert report.trainable_parameters == trained


def test_bert_base_trains_the_number_of_the_paper():
    with torch.device("meta"):
        model = get_peft_model(BertForSequenceClassification(BertConfig()), PSTConfig.paper())
        assert peft_pst.report._count_adapter_parameters(model, "default") == 2_820_096


def test_an_injected_adapter_is_reported_like_a_wrapped_one():
    torch.manual_seed(1)
    base = tiny_bert()
    config = PSTConfig(target_sparsity=0.6, initial_sparsity=0.6)
    torch.manual_seed(2)
    injected = report_model(inject_adapter_in_model(config, base))
    torch.manual_seed(1)
    base = tiny_bert()
    torch.manual_seed(2)
    assert injected == report_model(get_peft_model(base, config))


def test_reporting_leaves_the_model_as_it_was():
    model = adapt(tiny_bert()).eval()
    model.update_sparsity(6, total_steps=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report_model(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("adapter_name", [None, "other"])
def test_a_model_without_the_adapter_is_refused(adapter_name):
    with pytest.raises(ValueError, match=r"has no (active PST adapter|PST adapter named 'other'); it has none"):
        report_model(tiny_bert(), adapter_name)
    if adapter_name:
        with pytest.raises(ValueError, match=r"named 'other'; it has \['default'\]"):
            report_model(adapt(tiny_bert()), adapter_name)


@pytest.mark.parametrize("make_base", [tiny_bert, tiny_gpt2])
@pytest.mark.parametrize("shard_size", ["1GB", "6KB"])
def test_a_checkpoint_keeps_what_was_promised(tmp_path, make_base, shard_size):
    model = adapt(make_base())
    model.update_sparsity(10, total_steps=10)
    promise = report_model(model)
    merged = merge_and_save(model, tmp_path, max_shard_size=shard_size)
    report = report_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "6KB")
    assert report.layers == promise.layers
    assert report.lost_zeros == ()
    assert report.files == {file.name: file.stat().st_size for file in files}
    assert report.total_parameters == promise.total_parameters
    assert report.trainable_parameters == promise.trainable_parameters
    stored = {key: value for file in files for key, value in load_file(file).items()}
    matrices = {key.removesuffix(".weight"): slow_zeros(value) for key, value in stored.items() if value.ndim == 2}
    assert {row.name: row.zeros for row in (*report.layers, *report.others)} == matrices
    modules = dict(merged.named_modules())
    for row in report.layers:
        weight = modules[row.name].weight.T if row.transposed else modules[row.name].weight
        assert torch.equal(checkpoint_weight(tmp_path, row), weight)


def test_a_dense_delta_after_the_merge_is_flagged_by_name(tmp_path):
    model = adapt(tiny_bert())
    model.update_sparsity(10, total_steps=10)
    merge_and_save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense"
    torch.manual_seed(3)
    state[f"{name}.weight"] += torch.randn(32, 1) @ torch.randn(1, 16)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = report_checkpoint(tmp_path)
    assert [row.name for row in report.lost_zeros] == [name]
    assert [row.name for row in report.misses_target] == [name]
    table = report.to_table()
    assert f"✗ {name} holds 0 zeros, {num_pruned(512, 0.7)} fewer than were put there" in table
    assert sum("zeros lost" in line for line in table.splitlines()) == 2  # its row and the total
    assert report.to_dict()["lost_zeros"] == [name]


def test_a_checkpoint_of_which_nothing_is_known_lists_the_matrices_of_the_blocks(tmp_path):
    base = tiny_bert()
    base.bert.encoder.layer[1].output.dense.weight.data[:3] = 0
    base.save_pretrained(tmp_path)
    report = report_checkpoint(tmp_path)
    assert len(report.layers) == 12
    assert {row.name: row.zeros for row in report.layers if row.zeros} == {"bert.encoder.layer.1.output.dense": 96}
    assert {row.name for row in report.others} >= {"classifier", "bert.pooler.dense"}
    assert report.target_sparsity is None
    assert "not known" in report.to_table()
    assert "✓" not in report.to_table()
    assert "✗" not in report.to_table()


def test_blocks_are_listed_in_the_order_of_their_numbers(tmp_path):
    save_file({f"h.{i}.up.weight": torch.ones(2, 2) for i in range(12)}, tmp_path / "model.safetensors")
    assert [row.name for row in report_checkpoint(tmp_path).layers] == [f"h.{i}.up" for i in range(12)]


def test_only_floating_matrices_are_counted_and_one_file_will_do(tmp_path):
    tensors = {
        "a.weight": torch.tensor([[0.0, -0.0, 1.0]], dtype=torch.bfloat16),
        "b.weight": torch.tensor([[0.0, 2.0]]).to(torch.float8_e4m3fn),
        "ids": torch.zeros(2, 2, dtype=torch.int64),
        "bias": torch.zeros(5),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    report = report_checkpoint(tmp_path / "x.safetensors")
    assert {row.name: (row.zeros, row.weights) for row in report.layers} == {"a": (2, 3), "b": (1, 2)}
    assert report.total_parameters == 10
    assert report_checkpoint(tmp_path).layers == report.layers


def test_errors_of_checkpoints_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no safetensors files"):
        report_checkpoint(tmp_path)
    model = adapt(tiny_bert(), initial_sparsity=0.7)
    merge_and_save(model, tmp_path, max_shard_size="6KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(ValueError, match=f"{shard.name}' is damaged"):
        report_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}' is missing, although model.safetensors.index.json"):
        report_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json' is damaged"):
        report_checkpoint(tmp_path)


def test_a_promise_for_another_checkpoint_is_refused(tmp_path):
    model = adapt(tiny_bert(), initial_sparsity=0.7)
    merge_and_save(model, tmp_path)
    promise = SparsityReport.load(tmp_path / REPORT_NAME).to_dict()
    for change, problem in (({"name": "x"}, "is not in the checkpoint"), ({"shape": [16, 8]}, "and not")):
        changed = {**promise, "layers": [{**promise["layers"][0], **change}]}
        (tmp_path / REPORT_NAME).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=problem):
            report_checkpoint(tmp_path)
    (tmp_path / REPORT_NAME).write_text('{"layers": 3}')
    with pytest.raises(ValueError, match=rf"{REPORT_NAME}' cannot be read: this is not a sparsity report"):
        report_checkpoint(tmp_path)


def test_json_round_trip_and_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model = adapt(tiny_gpt2())
    model.update_sparsity(5, total_steps=10)
    report = report_model(model)
    report.save(tmp_path / "report.json")
    assert SparsityReport.load(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["sparsity"] == report.zeros / report.weights
    assert values["misses_target"] == [row.name for row in report.layers]

    def fail(*args, **kwargs):
        raise OSError("disk full")

    before = (tmp_path / "report.json").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        SparsityReport("other", ()).save(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_saved_adapter_reports_the_same_in_a_new_model(tmp_path):
    torch.manual_seed(5)
    base = tiny_bert()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(base)
    model.update_sparsity(6, total_steps=10)
    model.save_pretrained(tmp_path)
    again = tiny_bert()
    again.load_state_dict(state)
    assert report_model(PeftModel.from_pretrained(again, tmp_path)) == report_model(model)


def rows(blocks, zeros=90):
    return tuple(
        LayerSparsity(f"model.layers.{block}.{kind}", (10, 10), zeros, promised=90, target_sparsity=0.9)
        for block in range(blocks)
        for kind in ("attn.q", "mlp.up")
    )


def test_a_table_is_aligned_and_groups_large_models():
    report = SparsityReport("big", rows(150), total_parameters=60_000, trainable_parameters=600)
    lines = report.to_table().splitlines()
    grouped = [line for line in lines if line.startswith(("attn.q", "mlp.up", "total"))]
    assert [line.split()[:2] for line in grouped] == [["attn.q", "150"], ["mlp.up", "150"], ["total", "300"]]
    assert len({line.index("%") for line in grouped}) == 1
    assert "27,000" in grouped[-1]
    assert len(report.to_table(show_all=True).splitlines()) == len(lines) + 298
    assert len(SparsityReport("small", rows(8)).to_table().splitlines()) == 2 + 16 + 4 + 2
    assert "of which 45.00 % are zeros in these matrices" in report.to_table()
    assert "1.00 % of the model's number" in report.to_table()


def test_a_table_marks_groups_that_miss_the_target_in_part():
    layers = (*rows(20), LayerSparsity("model.layers.20.attn.q", (10, 10), 50, promised=50, target_sparsity=0.9))
    marks = {line.split()[0]: line for line in SparsityReport("x", layers).to_table().splitlines() if line}
    assert marks["attn.q"].endswith("✗ 1 of 21 below target")
    assert marks["mlp.up"].endswith("✓")


def test_counting_zeros_of_eight_bit_floats():
    assert count_zeros(torch.tensor([0.0, 1.0, -0.0]).to(torch.float8_e5m2)) == 2


def pruned_checkpoint(folder, dtype=torch.bfloat16):
    folder.mkdir()
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    tensors = {
        "layers.0.up.weight": weight.where(topk_mask(weight.abs(), 0.9), 0).to(dtype),
        "layers.1.up.weight": weight.where(topk_mask(weight.abs(), 0.7), 0).to(dtype),
        "embed.weight": torch.randn(30, 64).to(dtype),
        "ids": torch.arange(16),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_compact_checkpoint_is_reported_as_the_dense_one_with_what_it_saves(tmp_path):
    tensors = pruned_checkpoint(tmp_path / "dense")
    compact_checkpoint(tmp_path / "dense", tmp_path / "small")
    dense, small = report_checkpoint(tmp_path / "dense"), report_checkpoint(tmp_path / "small")
    assert small.layers == dense.layers
    assert small.others == dense.others
    assert small.total_parameters == dense.total_parameters == 2 * 4096 + 1920
    assert dense.sizes.dense == small.sizes.dense == sum(tensor.nbytes for tensor in tensors.values())
    assert dense.sizes.stored == dense.sizes.dense
    assert small.sizes.layers_stored == 2 * 512 + 2 * (4096 - num_pruned(4096, 0.9) + 4096 - num_pruned(4096, 0.7))
    assert small.sizes.layers_theory == pytest.approx(small.sizes.layers_stored)
    assert small.sizes.stored == small.sizes.layers_stored + 1920 * 2 + 16 * 8
    assert (dense.sizes.is_compact, small.sizes.is_compact) == (False, True)
    assert SparsityReport.from_dict(json.loads(json.dumps(small.to_dict()))) == small
    table = small.to_table()
    assert "4.3 kB, 26.26 % of the 16.4 kB; in theory 1/16 + (1 - 0.7999) = 26.26 %" in table
    assert "Note" not in table
    assert "4.3 kB instead of 16.4 kB, 1/16 + (1 - 0.7999) = 26.26 %, with `peft-pst compact`" in dense.to_table()


def test_precisions_that_differ_and_dense_matrices_leave_the_formula_out(tmp_path):
    pruned_checkpoint(tmp_path / "mixed")
    file = tmp_path / "mixed" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "layers.1.up.weight": tensors["layers.1.up.weight"].float()}, file)
    report = report_checkpoint(tmp_path / "mixed")
    assert report.sizes.layers_bits is None
    assert "1/16" not in report.to_table()
    save_file({"layers.0.up.weight": torch.ones(8, 8)}, file)
    assert "Compact" not in report_checkpoint(tmp_path / "mixed").to_table()


def test_a_report_of_an_earlier_release_has_no_sizes(tmp_path):
    pruned_checkpoint(tmp_path / "dense")
    values = report_checkpoint(tmp_path / "dense").to_dict()
    del values["sizes"]
    assert SparsityReport.from_dict(values).sizes is None
