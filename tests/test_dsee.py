"""DSEE's scripts as configurations of this package: dense stage, prune, retrain with the masks held, merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import TOKENS, assert_same_tensors, layers_of, masks
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_pst import PSTConfig, get_sparsity, prune_heads, prune_once

SHAPE = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 16}
IN_ATTENTION = ("query", "key", "value", "attention.output.dense")


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPE, num_attention_heads=12, num_labels=3)).eval()


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def after_the_dense_stage(folder: Path, **options: object) -> PeftModel:
    """Trained dense, saved, and loaded again to go on."""
    model = get_peft_model(base(), PSTConfig.dsee(task_type="SEQ_CLS", **{"r": 2, "residual": 5, **options}))
    train(model)
    assert get_sparsity(model) == 0
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base(), folder, is_trainable=True)


def retrain_and_merge(model: PeftModel) -> BertForSequenceClassification:
    """Train on with the masks held; merged, every weight is the formula's, written out."""
    held = masks(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model)
    assert_same_tensors(masks(model), held)
    moved = {name.rsplit(".", 2)[-2] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert moved >= {"pst_U", "pst_V", "pst_S"}
    assert not moved & {"pst_mask", "pst_num_pruned", "pst_positions", "base_layer"}
    expected = {}
    for layer in layers_of(model).values():
        weight = layer.get_base_layer().weight + layer.pst_U["default"] @ layer.pst_V["default"]
        for position, value in zip(layer.pst_positions["default"], layer.pst_S["default"], strict=True):
            weight.view(-1)[position] += value
        expected[layer.module_name] = torch.where(held[f"base_model.model.{layer.module_name}"], weight.detach(), 0.0)
    merged = model.eval().merge_and_unload()
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-6, atol=1e-6)
        assert torch.equal(merged.get_submodule(name).weight == 0, weight == 0)
    return merged


@pytest.mark.parametrize("positions", ["magnitude", "random", "grebsmo"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_unstructured(tmp_path: Path, sparsity: float, positions: str) -> None:
    model = after_the_dense_stage(tmp_path, residual_positions=positions)
    prune_once(model, sparsity, by="weights")
    merged = retrain_and_merge(model)
    for name, parameter in merged.bert.encoder.named_parameters():
        if parameter.dim() == 2:
            assert int((parameter == 0).sum()) == int(sparsity * parameter.numel()), name


@pytest.mark.parametrize("way", ["prune_heads", "pattern"])
def test_three_heads_of_twelve(tmp_path: Path, way: str) -> None:
    model = after_the_dense_stage(tmp_path, **({"pattern": "heads"} if way == "pattern" else {}))
    if way == "pattern":
        prune_once(model, 0.25, by="update")
    else:
        dropped = prune_heads(model, 3)
        assert [len(heads) for heads in dropped.values()] == [3, 3]
    merged = retrain_and_merge(model)
    for name, parameter in merged.bert.encoder.named_parameters():
        if parameter.dim() == 2:
            share = 0.25 if name.removesuffix(".weight").endswith(IN_ATTENTION) else 0
            assert int((parameter == 0).sum()) == share * parameter.numel(), name


def test_the_page_quotes_the_runs() -> None:
    root = Path(__file__).parents[1]
    table = (root / "benchmarks/results/runs/minilm-sst2-dsee/table.md").read_text(encoding="utf-8")
    scores = next(block for block in table.split("\n\n") if block.startswith("| method | trained |"))
    assert f"\n\n{scores}\n\n" in (root / "docs/dsee.md").read_text(encoding="utf-8")
