"""`sparse_inference` leaves a model's outputs as they are, undoes itself exactly, and saves weights or nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model
from tiny_models import TOKENS, assert_same_tensors, inputs, logits, net, pruned_net, snapshot, tiny_bert, tiny_gpt2
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from peft_pst import PSTConfig, dense_again, inference, sparse_inference
from peft_pst.inference import SparseLinear
from peft_pst.sparse_kernels import KERNELS

MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2}
NAMED = ["transposed", "onednn", "csr", "mkl"]


def pruned(name: str, sparsity: float = 0.9) -> nn.Module:
    """A merged model of transformers, as `merge_and_unload` leaves it."""
    config = PSTConfig(target_sparsity=sparsity, initial_sparsity=sparsity, r=2, score_rank=2)
    return get_peft_model(MODELS[name](), config).merge_and_unload().eval()


def replaced(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.parametrize("kernel", NAMED)
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_everything_back(name: str, kernel: str):
    if kernel == "mkl":
        pytest.importorskip("sparse_dot_mkl")
    model = pruned(name)
    expected, before = logits(model), snapshot(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    report = sparse_inference(model, kernel=kernel)
    assert len(replaced(model)) == len(report.replaced) == {"bert": 12, "gpt2": 8}[name]
    assert {layer.kernel for layer in report.layers} == {kernel}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert_same_tensors(dict(model.state_dict()), before)
    assert dense_again(model) is model
    assert_same_tensors(snapshot(model), before)
    assert {key: id(value) for key, value in model.named_modules()} == {key: id(m) for key, m in modules.items()}
    assert {key: id(value) for key, value in model.named_parameters()} == {key: id(p) for key, p in parameters.items()}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype: torch.dtype):
    model = pruned("bert").to(dtype)
    expected = logits(model)
    sparse_inference(model, kernel="csr")
    assert logits(model).dtype == dtype
    torch.testing.assert_close(logits(model), expected, rtol=2e-2, atol=2e-3)


def test_inputs_of_any_shape():
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    with torch.no_grad():
        model[0].weight[:, 1:] = 0
    xs = [torch.randn(*shape, 8) for shape in ((), (1,), (5,), (2, 3), (2, 1, 4), (0,), (2, 0))]
    xs.append(torch.randn(8, 4, 2).permute(2, 1, 0))
    with torch.no_grad():
        expected = [model(x) for x in xs]
        sparse_inference(model, kernel="csr")
        for x, y in zip(xs, expected, strict=True):
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)


def test_saving_writes_the_dense_model(tmp_path):
    for name, kind in (("bert", BertForSequenceClassification), ("gpt2", GPT2LMHeadModel)):
        model = pruned(name)
        before = snapshot(model)
        sparse_inference(model, kernel="csr")
        model.save_pretrained(tmp_path / name)
        assert_same_tensors(snapshot(kind.from_pretrained(tmp_path / name)), before)


def test_a_copy_is_independent():
    model = pruned("bert")
    expected = logits(model)
    sparse_inference(model, kernel="onednn")
    other = copy.deepcopy(model)
    dense_again(model)
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-6)
    assert_same_tensors(snapshot(dense_again(other)), snapshot(model))


# The choice


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[tuple[torch.Size, int]]:
    """Stand-in for the clock; returns the list of what is measured."""
    asked = []

    def time_kernels(weight: Tensor, bias: Tensor | None, rows: int, names: list[str], **_: object) -> dict[str, float]:
        asked.append((weight.shape, rows))
        return {name: seconds.get(name, 1.0) for name in names}

    monkeypatch.setattr(inference, "time_kernels", time_kernels)
    return asked


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"csr": 0.2, "onednn": 0.5}, "csr"),
        ({"csr": 0.5, "onednn": 0.2}, "onednn"),
        ({"csr": 0.49, "onednn": 0.5}, "onednn"),  # a sparse kernel has to gain something
        ({"csr": 0.97, "onednn": 0.99}, "dense"),
        ({}, "dense"),
    ],
)
def test_the_fastest_stays_where_it_gains_enough(monkeypatch, seconds, chosen):
    timed(monkeypatch, seconds)
    model = pruned("bert")
    report = sparse_inference(model)
    assert {layer.kernel for layer in report.layers} == {chosen}
    assert len(replaced(model)) == (0 if chosen == "dense" else 12)
    layer = report.layers[0]
    assert layer.over_as_is == pytest.approx(1 / seconds.get(chosen, 1.0))
    assert layer.over_best_dense == pytest.approx(seconds.get("onednn", 1.0) / seconds.get(chosen, 1.0))
    assert ("does not pay" in report.verdict()) == (chosen != "csr")


def test_a_sample_tells_the_rows_and_alike_layers_share_a_measurement(monkeypatch):
    asked = timed(monkeypatch, {})
    model = pruned("bert")
    report = sparse_inference(model, {"input_ids": TOKENS})
    assert {layer.rows for layer in report.layers} == {TOKENS.numel()}
    assert sorted(asked) == sorted([((16, 16), 8), ((24, 16), 8), ((16, 24), 8)])
    report = sparse_inference(model, {"inputs_embeds": torch.randn(1, 3, 16)})
    assert {layer.rows for layer in report.layers} == {3}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_real_measurement_and_its_report(tmp_path):
    model = pruned("bert")
    report = sparse_inference(model, rows=4, repeats=1)
    assert {"dense", "transposed", "csr"} <= report.layers[0].seconds.keys()
    assert all(seconds > 0 for layer in report.layers for seconds in layer.seconds.values())
    report.save(tmp_path / "choice.json")
    stored = json.loads((tmp_path / "choice.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in stored["layers"]] == [layer.name for layer in report.layers]
    table = report.to_table()
    assert table.count("attention.self.query") == 2
    assert table.endswith(report.verdict())


# What is left alone


def test_what_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    names = ("plain", "full", "tied", "hooked", "scaled", "twice")
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    model["scaled"], model["embedding"], model["again"] = Scaled(8, 8), nn.Embedding(8, 8), model["twice"]
    with torch.no_grad():
        for name in names:
            if name != "full":
                model[name].weight[1:] = 0
    model["embedding"].weight = model["tied"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    report = sparse_inference(model.eval(), kernel="csr")
    assert [layer.name for layer in report.layers] == ["plain"]
    assert report.others == 4
    assert list(replaced(model)) == ["plain"]


def test_layers_whose_weights_are_read_past_them():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[:, 1:] = 0
        expected = model(inputs()[None])
        report = sparse_inference(model.eval(), kernel="csr")
        assert [layer.name for layer in report.layers] == ["1"]
        torch.testing.assert_close(model(inputs()[None]), expected)


def test_t5_which_asks_its_layers_for_their_dtype():
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    adapter = PSTConfig(target_sparsity=0.9, initial_sparsity=0.9, r=2, score_rank=2)
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(copy.deepcopy(base), adapter).merge_and_unload().eval().to(dtype)
        with torch.no_grad():
            expected = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
            sparse_inference(model, kernel="csr")
            result = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        wo = model.encoder.block[0].layer[1].DenseReluDense.wo
        assert isinstance(wo, SparseLinear)
        assert wo.weight.dtype == dtype
        assert (wo.weight.layout == torch.sparse_csr) == (dtype == torch.float32)  # no dense copy at each call
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=1e-3 if dtype == torch.float32 else 2e-2)


# Refusals


def test_an_adapted_model_is_refused_with_the_remedy():
    model = pruned_net()
    with pytest.raises(
        ValueError, match=r"still carries an adapter; merge it first: model = model.merge_and_unload\(\)"
    ):
        sparse_inference(model)
    assert len(sparse_inference(model.merge_and_unload(), kernel="csr").sparse) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rows": 0}, "rows=0, but a batch has at least 1 row"),
        ({"kernel": "cuda"}, "kernel='cuda' is none of 'dense', 'transposed', 'onednn', 'csr', 'bsr', 'mkl'"),
        ({"min_sparsity": 90}, r"min_sparsity=90 is outside \[0, 1\]"),
        ({"repeats": 0}, "repeats=0, but at least 1 round has to be timed"),
        ({"kernel": "2:4"}, "kernel='2:4' takes none of 12 pruned layers; of bert.*query: 2:4 needs a CUDA device"),
        ({"kernel": "csr", "min_sparsity": 0.95}, "No linear layer holds a fraction of 0.95 zeros or more"),
    ],
)
def test_bad_arguments_change_nothing(arguments, says):
    model = pruned("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        sparse_inference(model, **arguments)
    assert not replaced(model)
    assert_same_tensors(snapshot(model), before)


def test_states_that_are_refused():
    model = pruned("bert").train()
    with pytest.raises(ValueError, match=r"in training mode.*model.eval\(\)"):
        sparse_inference(model)
    sparse_inference(model.eval(), kernel="csr")
    with pytest.raises(ValueError, match=r"was replaced before; call dense_again\(model\) first"):
        sparse_inference(model)


def test_what_a_replaced_model_refuses():
    model = pruned("bert")
    sparse_inference(model, kernel="csr")
    model(input_ids=TOKENS)  # merging leaves it frozen
    for module in (model.get_input_embeddings(), next(iter(replaced(model).values()))):
        module.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"computes no gradients; call the model under torch.no_grad\(\)"):
            model(input_ids=TOKENS)
        module.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"stays torch.float32 on cpu; call dense_again\(model\)"):
        next(iter(replaced(model).values())).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"packed kernel; call dense_again\(model\) before loading"):
        model.load_state_dict(pruned("bert").state_dict())
    with pytest.raises(RuntimeError, match=r"The input is torch.float64, but this layer computes in torch.float32"):
        next(iter(replaced(model).values()))(torch.ones(1, 16, dtype=torch.float64))
    model.to("cpu").eval()  # nothing changes, so nothing is refused


def test_export_is_refused_and_compiling_goes_on_without():
    model = pruned("bert")
    expected = logits(model)
    sparse_inference(model, kernel="csr")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"cannot be exported; call dense_again\(model\) first"):
            torch.export.export(model, (), {"input_ids": TOKENS}, strict=False)
        with pytest.raises(RuntimeError, match=r"cannot be exported; call dense_again\(model\) first"):
            torch.jit.trace(model, example_kwarg_inputs={"input_ids": TOKENS}, strict=False)
        layer, x = model.bert.encoder.layer[0].attention.self.query, torch.randn(2, 16)
        compiled = torch.compile(nn.Sequential(layer), backend="eager")
        dense = nn.functional.linear(x, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(compiled(x), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_autocast_as_before():
    model = pruned("bert")
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        sparse_inference(model, kernel="csr")
        torch.testing.assert_close(logits(model).float(), expected.float(), rtol=2e-2, atol=5e-3)


def test_nothing_pruned_is_said():
    report = sparse_inference(net())
    assert (report.layers, report.others) == ((), 5)
    assert report.verdict() == "No layer holds enough zeros for a sparse kernel; nothing was changed."


def test_the_first_kernel_is_the_layer_as_it_is():
    weight = torch.randn(4, 3)
    assert next(iter(KERNELS.values()))(weight, 1).dense_weight() is weight
