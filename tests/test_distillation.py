"""Distillation: the loss against a slow one, and its place in a real Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import BERT
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_pst import DistillationMixin, DistillationTrainer, PSTCallback, PSTConfig, distillation_loss, get_sparsity
from peft_pst.distillation import predicts_next_token

GPT2 = {"vocab_size": 40, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}


def classifier(seed: int, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    settings = {"num_labels": 3, "initializer_range": 0.5, **changes}
    return BertForSequenceClassification(BertConfig(**{**BERT, **settings}))


def language_model(seed: int, **changes: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, **changes}, initializer_range=0.5, attn_pdrop=0.0, resid_pdrop=0.0))


def without_dropout(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def sentences(number: int, labels: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 40, (number, 6), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row[0] % labels} for row in ids]


def blocks(number: int) -> list[dict[str, Tensor]]:
    """Texts of unequal length, padded; what is padding has no label, and one first label counts for nothing."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for index in range(number):
        ids = torch.randint(0, 40, (6,), generator=generator)
        length = 2 + index % 5
        mask = (torch.arange(6) < length).long()
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return examples


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(str(folder), **{**settings, **quiet, "max_grad_norm": 0.0, **options})


def batch_of(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def slow_loss(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """One prediction, (classes,), in plain Python and float64."""

    def softmax(logits: Tensor) -> list[float]:
        powers = [math.exp(z / temperature) for z in logits.tolist()]
        return [power / sum(powers) for power in powers]

    pairs = zip(softmax(teacher), softmax(student), strict=True)
    return temperature**2 * sum(p * (math.log(p) - math.log(q)) for p, q in pairs)


# The loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_is_the_mean_over_what_counts(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 4, 5, generator=generator) for _ in range(2))
    keep = torch.tensor([[True, False, True, True], [False, False, True, False]])
    each = [slow_loss(student[i, j], teacher[i, j], temperature) for i, j in keep.nonzero().tolist()]
    found = distillation_loss(student, teacher, temperature, keep)
    assert found.item() == pytest.approx(sum(each) / 4, rel=1e-5)
    assert distillation_loss(student, teacher, temperature, keep, 7).item() == pytest.approx(sum(each) / 7, rel=1e-5)
    everything = [slow_loss(s, t, temperature) for s, t in zip(student.view(-1, 5), teacher.view(-1, 5), strict=True)]
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(sum(everything) / 8, rel=1e-5)


def test_gradient_goes_to_the_student_alone_and_not_through_what_is_left_out() -> None:
    student = torch.randn(2, 3).requires_grad_()
    teacher = torch.randn(2, 3).requires_grad_()
    with torch.no_grad():
        student[1, 0] = teacher[1, 1] = math.nan
    distillation_loss(student, teacher, 2.0, torch.tensor([True, False])).backward()
    assert teacher.grad is None
    assert student.grad is not None
    # d/ds of T^2 KL(softmax(t / T) || softmax(s / T)) is T (q - p).
    difference = torch.softmax(student[0].detach() / 2, -1) - torch.softmax(teacher[0].detach() / 2, -1)
    torch.testing.assert_close(student.grad, torch.stack([2 * difference, torch.zeros(3)]))


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = distillation_loss(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, distillation_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature={temperature} must be a finite number above 0"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_logits_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"teacher's logits are \(1, 3\) and the model's \(1, 2\)"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 3))


# In the Trainer


def losses(
    trainer: DistillationTrainer, batch: dict[str, Tensor], num_items: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The Trainer's own loss and the mixture, on one batch in training mode."""
    trainer.model.train()
    own = Trainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=num_items)
    return own, trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification(tmp_path: Path, smoothing: float) -> None:
    student, teacher = without_dropout(classifier(0)), classifier(1)
    options = arguments(tmp_path, label_smoothing_factor=smoothing)
    trainer = DistillationTrainer(student, options, teacher=teacher, teacher_weight=0.3, temperature=3.0)
    batch = batch_of(sentences(4, 3))
    own, mixed = losses(trainer, batch)
    with torch.no_grad():
        logits = [model.eval()(input_ids=batch["input_ids"]).logits for model in (student, teacher)]
    distance = sum(slow_loss(s, t, 3.0) for s, t in zip(*logits, strict=True)) / 4
    assert mixed.item() == pytest.approx(0.7 * own.item() + 0.3 * distance, rel=1e-5)


@pytest.mark.parametrize("num_items", [None, torch.tensor(17)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_model_listens_where_there_is_a_next_label(
    tmp_path: Path, num_items: Tensor | None, smoothing: float
) -> None:
    student, teacher = without_dropout(language_model(0)), language_model(1)
    trainer = DistillationTrainer(student, arguments(tmp_path, label_smoothing_factor=smoothing), teacher=teacher)
    batch = batch_of(blocks(4))
    own, mixed = losses(trainer, batch, num_items)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        s, t = (model.eval()(**inputs).logits for model in (student, teacher))
    each = [
        slow_loss(s[row, position], t[row, position], 2.0)
        for row in range(4)
        for position in range(5)
        if batch["labels"][row, position + 1] != -100
    ]
    assert 4 < len(each) < 20
    distance = sum(each) / (len(each) if num_items is None else 17)
    assert mixed.item() == pytest.approx(0.5 * own.item() + 0.5 * distance, rel=1e-5)


def test_shifted_labels_of_a_collator_are_taken_as_they_are(tmp_path: Path) -> None:
    student, teacher = without_dropout(language_model(0)), language_model(1)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, teacher_weight=1.0)
    batch = batch_of(blocks(4))
    shifted = torch.full((4, 6), -100)
    shifted[2, 0] = shifted[3, 1] = 5  # where texts are packed, the last token of one does not predict the next
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        s, t = (model.eval()(**inputs).logits for model in (student, teacher))
    distance = (slow_loss(s[2, 0], t[2, 0], 2.0) + slow_loss(s[3, 1], t[3, 1], 2.0)) / 2
    assert losses(trainer, {**batch, "shift_labels": shifted})[1].item() == pytest.approx(distance, rel=1e-5)


def test_masked_language_model_is_not_shifted(tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(BertForMaskedLM(BertConfig(**BERT, initializer_range=0.5)))
    student, teacher = without_dropout(models[0]), models[1]
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, teacher_weight=1.0)
    batch = batch_of(blocks(4))
    with torch.no_grad():
        s, t = (
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for model in models
        )
    counted = (batch["labels"] != -100).nonzero().tolist()
    distance = sum(slow_loss(s[i, j], t[i, j], 2.0) for i, j in counted) / len(counted)
    assert losses(trainer, batch)[1].item() == pytest.approx(distance, rel=1e-5)


def test_regression_is_the_squared_distance(tmp_path: Path) -> None:
    student, teacher = without_dropout(classifier(0, num_labels=1)), classifier(1, num_labels=1)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, teacher_weight=0.25)
    batch = batch_of(sentences(4, 3))
    batch["labels"] = batch["labels"].float()
    own, mixed = losses(trainer, batch)
    with torch.no_grad():
        s, t = (model.eval()(input_ids=batch["input_ids"]).logits for model in (student, teacher))
    distance = sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)) / 4
    assert mixed.item() == pytest.approx(0.75 * own.item() + 0.25 * distance, rel=1e-5)


def test_several_labels_at_once_are_choices_of_their_own(tmp_path: Path) -> None:
    many = {"problem_type": "multi_label_classification"}
    student, teacher = without_dropout(classifier(0, **many)), classifier(1, **many)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, teacher_weight=1.0)
    batch = batch_of(sentences(2, 3))
    batch["labels"] = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    with torch.no_grad():
        s, t = (model.eval()(input_ids=batch["input_ids"]).logits.flatten() for model in (student, teacher))
    zero = torch.tensor(0.0)
    each = [slow_loss(torch.stack([zero, a]), torch.stack([zero, b]), 2.0) for a, b in zip(s, t, strict=True)]
    assert losses(trainer, batch)[1].item() == pytest.approx(sum(each) / 6, rel=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_accumulation_equals_one_big_batch(tmp_path: Path, kind: str) -> None:
    make, data = (classifier, sentences(8, 3)) if kind == "classifier" else (language_model, blocks(8))
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        options = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            train_sampling_strategy="sequential",
        )
        trainer = DistillationTrainer(without_dropout(make(0)), options, train_dataset=data, teacher=make(1))
        if kind == "language model":
            trainer._loss_shifts_labels = True  # as for every class whose name ends in ForCausalLM
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    start = make(0).state_dict()
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights[0].items())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("average", "scale"), [(True, 3), (False, 1)])
def test_scale_across_processes_is_the_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: bool, scale: int
) -> None:
    student = without_dropout(language_model(0))
    options = arguments(tmp_path, average_tokens_across_devices=average)
    trainer = DistillationTrainer(student, options, teacher=language_model(1), teacher_weight=0.5)
    batch = batch_of(blocks(4))
    items = torch.tensor(30)
    own, mixed = losses(trainer, batch, items)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    own_of_three, mixed_of_three = losses(trainer, batch, items)
    torch.testing.assert_close(own_of_three, scale * own)
    torch.testing.assert_close(mixed_of_three, scale * mixed)


def test_evaluation_reports_the_own_loss(tmp_path: Path) -> None:
    student, data = classifier(0), sentences(8, 3)
    trainer = DistillationTrainer(student, arguments(tmp_path), eval_dataset=data, teacher=classifier(1))
    plain = Trainer(student, arguments(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_weight_zero_trains_as_a_plain_trainer(tmp_path: Path) -> None:
    def train(trainer_class: Any, **teacher: Any) -> dict[str, Tensor]:
        options = arguments(tmp_path, max_steps=3)
        trainer = trainer_class(without_dropout(classifier(0)), options, train_dataset=sentences(16, 3), **teacher)
        trainer.train()
        return trainer.model.state_dict()

    plain = train(Trainer)
    distilled = train(DistillationTrainer, teacher=classifier(1), teacher_weight=0.0)
    assert [name for name in plain if not torch.equal(plain[name], distilled[name])] == []


class Watched(nn.Module):
    """Notes how a teacher is called."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.calls = teacher, []

    def forward(self, **inputs: Tensor) -> Any:
        autocast = torch.is_autocast_enabled("cpu")
        self.calls.append((self.teacher.training, torch.is_grad_enabled(), autocast, sorted(inputs)))
        return self.teacher(**inputs)


@pytest.mark.parametrize("bf16", [False, True])
def test_teacher_is_asked_as_in_evaluation_under_the_autocast_of_the_student(tmp_path: Path, bf16: bool) -> None:
    watched = Watched(classifier(1).train())
    options = arguments(tmp_path, max_steps=2, bf16=bf16)
    trainer = DistillationTrainer(classifier(0), options, train_dataset=sentences(8, 3), teacher=watched)
    before = {name: tensor.clone() for name, tensor in watched.state_dict().items()}
    trainer.train()
    assert watched.calls == [(False, False, bf16, ["input_ids"])] * 2
    assert all(parameter.grad is None for parameter in watched.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in watched.state_dict().items())


STUDENTS = {
    "classifier": (classifier, sentences(32, 3), "SEQ_CLS", {}),
    "regression": (classifier, sentences(32, 3), "SEQ_CLS", {"num_labels": 1}),
    "language model": (language_model, blocks(32), "CAUSAL_LM", {}),
}


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [
        ("classifier", True),
        ("language model", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("classifier", False), ("language model", True), ("regression", False), ("regression", True)]
        ),
    ],
)
def test_pruned_student_comes_near_its_teacher(tmp_path: Path, kind: str, adapted: bool) -> None:
    make, data, task, changes = STUDENTS[kind]
    if kind == "regression":
        data = [{**example, "labels": example["labels"].float()} for example in data]
    student = get_peft_model(
        without_dropout(make(0, **changes)), PSTConfig(task_type=task, target_sparsity=0.5, r=4, bias="all")
    )
    teacher: nn.Module = make(1, **changes)
    if adapted:
        teacher = get_peft_model(
            teacher, LoraConfig(task_type=task, target_modules="all-linear", init_lora_weights=False)
        )
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=40, learning_rate=2e-2, per_device_train_batch_size=8),
        train_dataset=data,
        callbacks=[PSTCallback()],
        teacher=teacher,
        teacher_weight=1.0,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert get_sparsity(student) == pytest.approx(0.5, abs=1e-2)
    assert sum(logged[-5:]) < 0.8 * sum(logged[:5])


def test_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(*args, **kwargs)
            return 2 * loss, outputs

    class DistilledOwn(DistillationMixin, Own):
        pass

    student, batch = without_dropout(classifier(0)), batch_of(sentences(4, 3))
    trainer = DistilledOwn(student, arguments(tmp_path), teacher=classifier(1), teacher_weight=0.0)
    own, doubled = losses(trainer, batch)
    torch.testing.assert_close(doubled, 2 * own)
    trainer.model.train()
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    assert outputs.logits.shape == (4, 3)
    torch.testing.assert_close(loss, doubled)


def test_trainer_that_makes_the_logits_anew_without_a_gradient(tmp_path: Path) -> None:
    class Fused(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss, _ = super().compute_loss(model, dict(inputs), *args, **kwargs)
            with torch.no_grad():
                return loss, model(**inputs)

    class DistilledFused(DistillationMixin, Fused):
        pass

    trainer = DistilledFused(classifier(0), arguments(tmp_path), teacher=classifier(1))
    trainer.model.train()
    with pytest.raises(ValueError, match=r"DistilledFused computes the model's logits without a gradient"):
        trainer.compute_loss(trainer.model, batch_of(sentences(4, 3)))


# What is refused


def refused(tmp_path: Path, student: Any, teacher: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, **options)
    return str(caught.value)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_weight_out_of_range(tmp_path: Path, weight: float) -> None:
    message = refused(tmp_path, classifier(0), classifier(1), teacher_weight=weight)
    assert f"teacher_weight={weight} is outside [0, 1]" in message


def test_temperature_of_the_trainer(tmp_path: Path) -> None:
    assert "temperature=0 must be" in refused(tmp_path, classifier(0), classifier(1), temperature=0)


def test_teacher_that_is_the_student(tmp_path: Path) -> None:
    base = classifier(0)
    teacher = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    assert "The teacher is the model that trains" in refused(tmp_path, base, base)
    assert "load it from its checkpoint by itself" in refused(tmp_path, base, teacher)


def gpt2_classifier() -> PreTrainedModel:
    return GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3))


@pytest.mark.parametrize(
    ("student", "teacher", "problem"),
    [
        (lambda: classifier(0), lambda: classifier(1, num_labels=2), "gives num_labels=2 and the model num_labels=3"),
        (
            lambda: language_model(0),
            lambda: language_model(1, vocab_size=41),
            "gives logits of a vocabulary of 41 and the model logits of a vocabulary of 40",
        ),
        (gpt2_classifier, lambda: language_model(1), "gives logits of a vocabulary of 40 and the model num_labels=3"),
    ],
)
def test_teacher_with_other_outputs(tmp_path: Path, student: Any, teacher: Any, problem: str) -> None:
    assert problem in refused(tmp_path, student(), teacher())
    adapted = get_peft_model(student(), PSTConfig())
    assert problem in refused(tmp_path, adapted, get_peft_model(teacher(), LoraConfig(target_modules="all-linear")))


def test_labels_in_another_order(tmp_path: Path) -> None:
    student, teacher = (
        classifier(0, id2label=dict(enumerate(names)), num_labels=2) for names in (("neg", "pos"), ("POS", "NEG"))
    )
    assert "orders the labels ['pos', 'neg'] and the model ['neg', 'pos']" in refused(tmp_path, student, teacher)
    DistillationTrainer(student, arguments(tmp_path), teacher=classifier(1, num_labels=2))  # LABEL_0 may be anything


def test_logits_that_only_show_to_differ(tmp_path: Path) -> None:
    # A teacher that is no model of transformers has no configuration to compare.
    trainer = DistillationTrainer(classifier(0), arguments(tmp_path), teacher=Watched(classifier(1, num_labels=2)))
    with pytest.raises(ValueError, match=r"teacher's logits are \(4, 2\) and the model's \(4, 3\)"):
        losses(trainer, batch_of(sentences(4, 3)))


def test_inputs_without_labels_and_outputs_without_logits(tmp_path: Path) -> None:
    trainer = DistillationTrainer(classifier(0), arguments(tmp_path), teacher=classifier(1))
    batch = batch_of(sentences(4, 3))
    with pytest.raises(ValueError, match=r"'logits', but tuple has none"):
        losses(trainer, {**batch, "return_dict": False})
    del batch["labels"]
    trainer.model.train()
    with pytest.raises(ValueError, match=r"needs 'labels' in the inputs, to know what counts; got \['input_ids'\]"):
        trainer.compute_loss(trainer.model, batch)


def test_data_parallel(tmp_path: Path) -> None:
    options = arguments(tmp_path)
    options._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process; start it with torchrun or accelerate launch"):
        DistillationTrainer(classifier(0), options, teacher=classifier(1))


def test_which_models_predict_the_next_token() -> None:
    assert predicts_next_token(get_peft_model(language_model(0), PSTConfig(task_type="CAUSAL_LM")))
    assert not predicts_next_token(classifier(0))
    assert not predicts_next_token(nn.Linear(2, 2))
