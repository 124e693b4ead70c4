"""Parameter groups: every trainable tensor in exactly one group, at its own rate."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_pst import PSTConfig, create_pst_optimizer, parameter_groups


def tiny_model(**options: object) -> PeftModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    base = BertForSequenceClassification(BertConfig(vocab_size=40, **shape))
    return get_peft_model(base, PSTConfig(task_type="SEQ_CLS", **options))


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def test_groups_rates_and_decay() -> None:
    model = tiny_model(bias="all")
    groups = parameter_groups(model, lr=1e-3, score_lr=1e-2, head_lr=1e-4, weight_decay=0.1)
    table = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert table == {
        "weight_update": (1e-3, 0.1),
        "scores": (1e-2, 0.0),
        "head": (1e-4, 0.1),
        "head_no_decay": (1e-4, 0.0),
    }
    members = {group["name"]: names_of(model, group["params"]) for group in groups}
    assert {name.split(".")[-2] for name in members["weight_update"]} == {
        "pst_U",
        "pst_V",
        "pst_embedding_U",
        "pst_embedding_V",
    }
    assert {name.split(".")[-2] for name in members["scores"]} == {"pst_A", "pst_B", "pst_R", "pst_C"}
    assert members["head"] == {"base_model.model.classifier.modules_to_save.default.weight"}
    assert all(name.endswith("bias") for name in members["head_no_decay"])
    assert "base_model.model.classifier.modules_to_save.default.bias" in members["head_no_decay"]


@pytest.mark.parametrize("bias", ["none", "pst_only", "all"])
def test_every_trainable_tensor_once(bias: str) -> None:
    model = tiny_model(bias=bias)
    grouped = [parameter for group in parameter_groups(model, lr=1e-3) for parameter in group["params"]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(trainable)
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in trainable}


def test_one_rate_serves_all_unless_told_otherwise() -> None:
    assert {group["lr"] for group in parameter_groups(tiny_model(), lr=3e-3)} == {3e-3}
    rates = {group["name"]: group["lr"] for group in parameter_groups(tiny_model(), lr=3e-3, score_lr=0.0)}
    assert rates == {"weight_update": 3e-3, "scores": 0.0, "head": 3e-3, "head_no_decay": 3e-3}


def test_empty_groups_are_left_out() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), PSTConfig(target_modules=["0"], r=0))
    assert [group["name"] for group in parameter_groups(model, lr=1e-3)] == ["scores"]


def test_norms_are_not_decayed() -> None:
    base = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model = get_peft_model(base, PSTConfig(target_modules=["linear"], modules_to_save=["norm"]))
    groups = {
        group["name"]: names_of(model, group["params"]) for group in parameter_groups(model, lr=1, weight_decay=1)
    }
    assert "head" not in groups
    assert {name.rsplit(".", 1)[1] for name in groups["head_no_decay"]} == {"weight", "bias"}


def test_the_inactive_adapter_is_left_out() -> None:
    model = tiny_model()
    model.add_adapter("other", PSTConfig(task_type="SEQ_CLS"))
    names = names_of(model, [p for group in parameter_groups(model, lr=1) for p in group["params"]])
    assert {name.split(".")[-1] for name in names if "pst_" in name} == {"default"}


def test_the_optimizer_steps_every_group_at_its_rate() -> None:
    model = tiny_model()
    optimizer = create_pst_optimizer(
        model, torch.optim.SGD, lr=1e-2, score_lr=1e-1, head_lr=0.0, momentum=0.0, weight_decay=0.0
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
            continue
        is_head, is_update = "classifier" in name, name.split(".")[-2][-2:] in ("_U", "_V")
        rate = 0.0 if is_head else 1e-2 if is_update else 1e-1
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["lr", "score_lr", "head_lr"])
def test_negative_rates_are_refused(name: str) -> None:
    rates = {"lr": 1e-3, name: -1e-3}
    with pytest.raises(ValueError, match=rf"^{name}=-0\.001 is negative; pass a learning rate of at least 0\.$"):
        parameter_groups(tiny_model(), **rates)


def test_a_model_in_which_nothing_trains_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Nothing in the model trains; make it with get_peft_model"):
        create_pst_optimizer(model, torch.optim.AdamW, lr=1e-3)
