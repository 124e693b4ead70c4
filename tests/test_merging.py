"""Merging and unmerging: bit for bit, with exact zeros, and what may happen while an adapter is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny_models import (
    BERT,
    activate,
    assert_same_tensors,
    layers_of,
    logits,
    net,
    outputs,
    pruned_net,
    snapshot,
    tiny_bert,
    tiny_gpt2,
    train_a_little,
    two_adapters,
)
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import peft_pst
from peft_pst import PSTConfig
from peft_pst.masking import num_pruned


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


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_a_head_of_several_layers_survives(how: str) -> None:
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**{**BERT, "pad_token_id": 1}))
    adapted = train_a_little(get_peft_model(model, PSTConfig(task_type="SEQ_CLS"))).eval()
    head = snapshot(adapted.base_model.model.classifier.modules_to_save["default"])
    expected = logits(adapted)
    plain = getattr(adapted, how)()
    assert_same_tensors(plain.classifier.state_dict(), head)
    if how == "merge_and_unload":
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=0)


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


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2)).eval()


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
@pytest.mark.parametrize(
    ("targets", "embeddings"),
    [(["q_proj", "lm_head"], "auto"), (["q_proj", "embed_tokens"], "auto"), (None, True)],
)
def test_saved_while_merged_with_what_peft_saves_of_the_base(
    targets: list[str] | None, embeddings: bool | str, tmp_path: Path
) -> None:
    """PEFT writes embeddings and output layers into the file: the dense ones, or they would be pruned twice."""
    config = PSTConfig(target_modules=targets, target_sparsity=0.6, task_type="CAUSAL_LM")
    model = train_a_little(get_peft_model(tiny_llama(), config)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "dense", save_embedding_layers=embeddings)
    model.merge_adapter()
    before = snapshot(model)
    model.save_pretrained(tmp_path / "merged", save_embedding_layers=embeddings)
    assert_same_tensors(snapshot(model), before)
    files = [load_file(tmp_path / how / "adapter_model.safetensors") for how in ("merged", "dense")]
    assert any("base_layer" in key for key in files[1])
    assert_same_tensors(*files)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged").eval()), expected)


def test_a_state_loaded_while_merged_leaves_the_dense_weight_alone() -> None:
    model = pruned_net()
    dense = snapshot(model)
    model.merge_adapter()
    model.load_state_dict(snapshot(model))
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), dense)


def test_too_few_zeros_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the package on itself: what is promised is counted before it is written."""
    model = two_adapters()
    activate(model, ["a", "b"])
    before = snapshot(model)
    make = peft_pst.layer.effective_weight
    monkeypatch.setattr(peft_pst.layer, "effective_weight", lambda weight, pruners: make(weight, pruners[:1]))
    with pytest.raises(
        RuntimeError, match=r"holds 48 zeros, but adapters \['a', 'b'\] promise 57\. The base layer is unch"
    ):
        model.merge_adapter()
    assert_same_tensors(snapshot(model), before)


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
    message = (
        r"^NaNs detected in the merged weights\. The adapter default seems to be broken: "
        r"layer layers\.1\.down would not be finite\.$"
    )
    with pytest.raises(ValueError, match=message):
        model.base_model.model.layers[1].down.merge(safe_merge=True)
    assert not model.base_model.model.layers[1].down.merged
    assert_same_tensors(snapshot(model), before)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=message):
            merge(safe_merge=True)
        assert_same_tensors(snapshot(model), before)  # of the layers before it too
        assert not any(layer.merged for layer in layers_of(model).values())


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
