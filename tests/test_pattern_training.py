"""Every pattern through PEFT: trained, saved, loaded, resumed and merged with exact counts in every group."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import TOKENS, layers_of, tiny_bert, tiny_gpt2
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, prune_once, report_model, update_sparsity
from peft_pst.architecture import find_heads, find_neurons
from peft_pst.coupling import group_masks

MATRIX_PATTERNS = ["2:4", "1:4", "4x4", "2x8", "rows", "columns"]
COUPLED = ["heads", "neurons", "heads+neurons"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


BASES = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}


def train(model: nn.Module, steps: int = 8) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    labels = torch.tensor([0, 2]) if hasattr(model.base_model.model, "classifier") else TOKENS
    model.train()
    for step in range(1, steps + 1):
        model(input_ids=TOKENS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_sparsity(model, step, steps)
    model.eval()


def check_groups(model: nn.Module, pattern: str, target: float) -> None:
    """What is zero is whole groups, as many as the target says, in every matrix or attention layer or feed-forward."""
    zeros = {layer.module_name: layer.get_masked_weight() == 0 for layer in layers_of(model).values()}
    if pattern in COUPLED:
        check_coupled(model, pattern, target, zeros)
        return
    for layer in layers_of(model).values():
        own = zeros[layer.module_name]
        if ":" in pattern:
            n, m = (int(number) for number in pattern.split(":"))
            per_group = own.reshape(-1, m).sum(1)
            assert torch.equal(per_group, torch.full_like(per_group, m - n))
            continue
        height, width = layer.pst_plans["default"].size
        blocks = own.reshape(own.shape[0] // height, height, own.shape[1] // width, width)
        whole = blocks.all(3).all(1)
        assert torch.equal(whole, blocks.any(3).any(1))
        assert int(whole.sum()) == int(target * whole.numel())


def check_coupled(model: nn.Module, pattern: str, target: float, zeros: dict[str, Tensor]) -> None:
    found = (find_heads(model) if "heads" in pattern else []) + (find_neurons(model) if "neurons" in pattern else [])
    seen = set()
    for groups in found:
        pruned = int(target * groups.num_groups)
        parts = groups.parts
        first = parts[0]
        lines = zeros[first.module].all(1 - first.axis).narrow(0, first.start, groups.num_groups * first.width)
        keep = ~lines.view(groups.num_groups, first.width).all(1)
        assert int((~keep).sum()) == pruned
        for module, mask in group_masks(groups, keep).items():
            assert torch.equal(zeros[module], ~mask), module
            seen.add(module)
    for module, own in zeros.items():
        assert module in seen or not own.any(), module


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *itertools.product([*MATRIX_PATTERNS, *COUPLED], ["bert"]),
        *itertools.product(COUPLED, ["gpt2", "llama"]),
        ("4x4", "gpt2"),  # whose weights are stored transposed
        *(
            pytest.param(pattern, name, marks=pytest.mark.slow)
            for pattern, name in itertools.product(MATRIX_PATTERNS, ["gpt2", "llama"])
            if (pattern, name) != ("4x4", "gpt2")
        ),
    ],
)
def test_trained_saved_loaded_and_merged(name: str, pattern: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    options = {} if ":" in pattern else {"target_sparsity": 0.5}
    model = get_peft_model(BASES[name](), PSTConfig(pattern=pattern, r=2, score_rank=2, **options))
    target = model.peft_config["default"].target_sparsity
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".pst_" in key and "C" in key[-10:]}
    train(model)
    assert all(not torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())
    check_groups(model, pattern, target)
    expected = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES[name](), tmp_path).eval()
    check_groups(loaded, pattern, target)
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
    report = report_model(model)
    assert not report.misses_target
    assert not report.lost_zeros
    merged = model.merge_and_unload()
    assert torch.equal(merged(input_ids=TOKENS).logits, expected)
    for row in report.layers:
        weight = merged.get_submodule(row.name).weight
        assert int((weight == 0).sum()) == row.promised


@pytest.mark.parametrize("pattern", ["2:4", "rows", "heads+neurons"])
def test_the_ramp_rises_group_by_group(pattern: str) -> None:
    options = {} if ":" in pattern else {"target_sparsity": 0.5}
    model = get_peft_model(tiny_bert(), PSTConfig(pattern=pattern, r=2, score_rank=2, **options))
    reached = [update_sparsity(model, step, 20) for step in range(21)]
    assert reached == sorted(reached)
    assert len(set(reached)) > 4
    assert reached[0] == 0


def test_coupled_scores_are_means_in_units_of_each_matrix() -> None:
    """The groups that go are those of the lowest mean |W| / rms(W0), worked out from the plain weights."""
    model = get_peft_model(tiny_bert(), PSTConfig(pattern="neurons", target_sparsity=0.5, r=2, score_rank=2))
    update_sparsity(model, 10, 10)
    layers = {layer.module_name: layer for layer in layers_of(model).values()}
    for index in (0, 1):
        stem = f"bert.encoder.layer.{index}"
        up = layers[f"{stem}.intermediate.dense"].get_dense_weight()
        down = layers[f"{stem}.output.dense"].get_dense_weight()
        scores = (up.abs() / up.pow(2).mean().sqrt()).sum(1) + (down.abs() / down.pow(2).mean().sqrt()).sum(0)
        dropped = scores.argsort()[: len(scores) // 2].sort().values
        mask = layers[f"{stem}.intermediate.dense"].get_mask("default")
        assert torch.equal((~mask[:, 0]).nonzero().squeeze(1), dropped)


@pytest.mark.parametrize("by", ["scores", "weights", "update"])
def test_pruning_once_drops_heads_and_leaves_what_holds_none_dense(by: str) -> None:
    model = get_peft_model(tiny_llama(), PSTConfig.dsee(pattern="heads", r=2, residual=5))
    train(model, steps=3)
    prune_once(model, 0.5, by=by)
    layers = {layer.module_name: layer for layer in layers_of(model).values()}
    for heads in find_heads(model):
        scores = torch.zeros(heads.num_groups)
        for part in heads.parts:
            layer = layers[part.module]
            update = layer.get_update("default").detach()
            base = layer.get_base_layer().weight.detach()
            ranked = {"scores": base + update, "weights": base, "update": update}[
                by
            ].abs() / base.square().mean().sqrt()
            for head in range(heads.num_groups):
                lines = slice(part.start + head * part.width, part.start + (head + 1) * part.width)
                scores[head] += (ranked[lines] if part.axis == 0 else ranked[:, lines]).sum()
        keep = scores > scores.min()  # two heads of keys and values, of which one goes
        for module, mask in group_masks(heads, keep).items():
            assert torch.equal(layers.pop(module).get_mask("default"), mask)
    assert layers  # the feed-forwards
    assert not any(layer.get_num_pruned("default") for layer in layers.values())


def test_a_matrix_in_two_places_is_refused() -> None:
    block = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "other": nn.Linear(12, 8)})
    named = [{"inputs": ["up"], "output": output} for output in ("down", "other")]
    config = PSTConfig(pattern="neurons", target_sparsity=0.5, projections={"neurons": named})
    with pytest.raises(
        ValueError, match=r"layers.0.up holds the neurons of layers.0 and the neurons of layers.0; a ma"
    ):
        get_peft_model(nn.ModuleDict({"layers": nn.ModuleList([block])}), config)


def test_coupled_groups_under_one_budget_are_held_once_they_reach_it() -> None:
    config = PSTConfig(
        pattern="heads+neurons", scope="global", target_sparsity=0.3, mask_interval=None, r=2, score_rank=2
    )
    model = get_peft_model(tiny_bert(), config)
    prune_once(model, 0.3)
    masks = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    train(model)
    assert all(torch.equal(layer.get_mask("default"), masks[name]) for name, layer in layers_of(model).items())
    assert not report_model(model).misses_target


def test_coupled_groups_start_pruned_and_at_once() -> None:
    config = PSTConfig(pattern="neurons", target_sparsity=0.5, initial_sparsity=0.25, r=2, score_rank=2)
    check_groups(get_peft_model(tiny_bert(), config), "neurons", 0.25)
    config = PSTConfig(pattern="heads+neurons", target_sparsity=0.5, mask_interval=None, r=2, score_rank=2)
    model = get_peft_model(tiny_bert(), config)
    prune_once(model, 0.5)
    check_groups(model, "heads+neurons", 0.5)
    masks = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    train(model)
    assert all(torch.equal(layer.get_mask("default"), masks[name]) for name, layer in layers_of(model).items())


def test_one_matrix_of_a_group_cannot_be_pruned_by_itself() -> None:
    model = get_peft_model(tiny_bert(), PSTConfig(pattern="neurons", target_sparsity=0.5))
    layer = next(iter(layers_of(model).values()))
    with pytest.raises(RuntimeError, match=r"couples matrices.*use update_sparsity"):
        layer.set_sparsity("default", 0.5)


def test_groups_that_are_adapted_in_part_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output.dense'\] are not adapted, but the rest of the neurons"):
        get_peft_model(tiny_bert(), PSTConfig(pattern="neurons", target_modules=["intermediate.dense"]))
    with pytest.raises(ValueError, match="None of the adapted layers holds heads"):
        get_peft_model(
            tiny_bert(), PSTConfig(pattern="heads", target_modules=["intermediate.dense", "layer.0.output.dense"])
        )
    with pytest.raises(ValueError, match="need one target sparsity, but sparsity_pattern gives"):
        get_peft_model(tiny_bert(), PSTConfig(pattern="neurons", sparsity_pattern={"intermediate.dense": 0.5}))
    with pytest.raises(ValueError, match="keep_zeros=True cannot be combined"):
        PSTConfig(pattern="neurons", keep_zeros=True)


def test_a_user_names_the_projections() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.rise, self.fall = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fall(torch.sigmoid(self.gate(x)) * self.rise(x))

    named = {"neurons": [{"inputs": ["gate", "rise"], "output": "fall"}]}
    config = PSTConfig(pattern="neurons", target_sparsity=0.5, projections=named, target_modules="all-linear", r=2)
    model = get_peft_model(nn.Sequential(Block(), Block()), config)
    update_sparsity(model, 10, 10)
    for layer in layers_of(model).values():
        assert layer.get_num_pruned("default") == 48
    with pytest.raises(ValueError, match=r"pattern='heads' does not prune"):
        PSTConfig(pattern="heads", projections=named)
    with pytest.raises(ValueError, match="pass a list of dicts such as"):
        PSTConfig(pattern="neurons", projections={"neurons": [{"inputs": "gate"}]})


def test_parts_of_a_fused_projection_are_ranked_apart() -> None:
    model = get_peft_model(tiny_gpt2(), PSTConfig(target_sparsity=0.7, parts={"c_attn": 3}, r=2, score_rank=2))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.pst_R["default"][:16] += 5  # of c_attn: the queries
    train(model)
    layers = {layer.module_name: layer for layer in layers_of(model).values()}
    attention = layers["transformer.h.0.attn.c_attn"]
    assert attention.pst_num_pruned["default"].shape == (3,)
    assert [int((part == 0).sum()) for part in attention.get_masked_weight().split(16)] == [179, 179, 179]
    assert layers["transformer.h.0.mlp.c_fc"].pst_num_pruned["default"].shape == ()
    with pytest.raises(ValueError, match=r"c_attn: 48 rows are not made of 5 equal parts"):
        get_peft_model(tiny_gpt2(), PSTConfig(parts={"c_attn": 5}))
    with pytest.warns(RuntimeWarning, match=r"parts keys did not match"):
        get_peft_model(tiny_gpt2(), PSTConfig(parts={"qkv": 3}))


def test_n_of_m_sets_the_target() -> None:
    assert PSTConfig(pattern="2:4").target_sparsity == 0.5
    assert PSTConfig(pattern="1:4").target_sparsity == 0.75
    assert PSTConfig().target_sparsity == PSTConfig(target_sparsity=None).target_sparsity == 0.9
    with pytest.raises(ValueError, match=r"target_sparsity=0.9 is not the 0.5 that pattern='2:4' comes to"):
        PSTConfig(pattern="2:4", target_sparsity=0.9)
    model = get_peft_model(tiny_bert(), PSTConfig(pattern="2:4", sparsity_pattern={".*attention.*": 0.0}, r=2))
    update_sparsity(model, 10, 10)
    zeros = {layer.module_name: layer.get_num_pruned("default") for layer in layers_of(model).values()}
    assert all((count == 0) == (".attention." in name) for name, count in zeros.items())


def test_a_size_that_does_not_fit_is_refused_with_the_layer() -> None:
    with pytest.raises(ValueError, match=r"Layer .*query: pattern '2:5' needs a number of columns that 5 divides"):
        get_peft_model(tiny_bert(), PSTConfig(pattern="2:5", target_sparsity=0.6))
    with pytest.raises(ValueError, match=r"Layer .*query: pattern '5x1' needs a number of rows that 5 divides"):
        get_peft_model(tiny_bert(), PSTConfig(pattern="5x1"))


def test_zeros_of_the_base_under_a_pattern() -> None:
    base = tiny_bert()
    with torch.no_grad():
        for name, parameter in base.bert.encoder.named_parameters():
            if parameter.ndim == 2 and "LayerNorm" not in name:
                parameter.view(-1, 4)[:, 1] = 0
    zeros = {name: parameter == 0 for name, parameter in base.named_parameters()}
    model = get_peft_model(base, PSTConfig(pattern="2:4", keep_zeros=True, r=2, score_rank=2))
    train(model)
    check_groups(model, "2:4", 0.5)
    merged = model.merge_and_unload()
    assert all((merged.get_parameter(name) == 0)[own].all() for name, own in zeros.items())
    with pytest.raises(ValueError, match=r"zeros of the base are no whole blocks of 4 x 4"):
        update_sparsity(get_peft_model(merged, PSTConfig(pattern="4x4", keep_zeros=True, r=2)), 1, 10)
    with pytest.raises(ValueError, match=r"the base has 2 zeros among 4 neighbours"):
        update_sparsity(get_peft_model(merged, PSTConfig(pattern="3:4", keep_zeros=True)), 1, 9)


@pytest.mark.parametrize("pattern", [pytest.param("2:4", marks=pytest.mark.slow), "neurons"])
def test_a_trainer_resumes_in_mid_ramp(pattern: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = [{"input_ids": row, "labels": label} for row, label in zip(TOKENS.repeat(8, 1), [0, 2] * 8, strict=True)]

    def trainer(folder: str) -> Trainer:
        options = {} if ":" in pattern else {"target_sparsity": 0.5}
        model = get_peft_model(tiny_bert(), PSTConfig(pattern=pattern, r=2, score_rank=2, **options))
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=10, save_steps=4, learning_rate=1e-2, report_to="none", use_cpu=True,
            disable_tqdm=True, per_device_train_batch_size=4, save_strategy="steps", logging_strategy="no",
        )  # fmt: skip
        return Trainer(model, args, train_dataset=data, callbacks=[PSTCallback()])

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, layer), other in zip(layers_of(whole.model).items(), layers_of(resumed.model).values(), strict=True):
        assert torch.equal(layer.get_masked_weight(), other.get_masked_weight()), name
    check_groups(resumed.model, pattern, 0.5)
