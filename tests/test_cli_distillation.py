"""`peft-pst train --teacher`: from the command line to a run that learns from it, and every mistake it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_cli_train import make_trainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

import peft_pst.cli
from peft_pst.cli.options import DistillationOptions

pytestmark = pytest.mark.usefixtures("no_pictures")

WORDS = {"good": "pos", "great": "pos", "fine": "pos", "bad": "neg", "dull": "neg", "poor": "neg"}


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    file = tmp_path / "reviews.csv"
    lines = [f"the {noun} was {word},{label}" for noun in ("film", "plot", "cast") for word, label in WORDS.items()]
    file.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return str(file)


def train(model: str, output: Path, *arguments: str) -> int:
    quick = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--use_cpu"]
    required = ["--model_name_or_path", model, "--output_dir", str(output), "--r", "2", "--score_rank", "2"]
    return peft_pst.cli.main(["train", *required, *quick, *arguments])


def save_classifier(base: str, folder: Path, **changes: object) -> str:
    """A plain teacher with its tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(base, initializer_range=0.5, **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def save_lora(base: str, folder: Path, num_labels: int = 2) -> str:
    """An adapter as PEFT saves it: without a tokenizer, and without the number of labels."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    config = LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def rename_token(folder: Path, old: str, new: str) -> None:
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    assert f'"{old}"' in text
    file.write_text(text.replace(f'"{old}"', f'"{new}"'), encoding="utf-8")


def test_run_with_a_plain_teacher(bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_classifier(bert, tmp_path / "teacher")
    given = ["--train_file", reviews, "--validation_file", reviews]
    assert train(bert, tmp_path / "alone", *given) == 0
    assert train(bert, tmp_path / "out", *given, "--teacher", teacher, "--teacher_weight", "0.25") == 0
    assert f"Teacher   {teacher}, 0.25 of the loss at temperature 2" in capsys.readouterr().out
    alone, taught = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "out"))
    assert alone.keys() == taught.keys()  # nothing of the teacher is saved
    assert any(not torch.equal(alone[name], taught[name]) for name in alone)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| teacher | {teacher} |\n| teacher_weight | 0.25 |\n| temperature | 2 |" in card
    assert "teacher" not in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")


def test_the_adapter_that_is_named_teaches(bert: str, reviews: str, tmp_path: Path) -> None:
    folder = save_lora(bert, tmp_path / "lora")
    weights = ["--teacher_weight", "1", "--temperature", "3"]
    trainer = make_trainer(bert, reviews, tmp_path, "--teacher", folder, *weights)
    expected = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), folder).eval()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        assert torch.equal(trainer.teacher(**batch).logits, expected(**batch).logits)
    assert (trainer.teacher_weight, trainer.teacher_temperature) == (1.0, 3.0)
    assert not trainer.model_accepts_loss_kwargs
    assert sum(1 for parameter in trainer.teacher.parameters()) < sum(1 for parameter in trainer.model.parameters())


def test_teacher_that_this_package_trained(bert: str, reviews: str, tmp_path: Path) -> None:
    dense = ["--train_file", reviews, "--target_sparsity", "0"]
    assert train(bert, tmp_path / "dense", *dense) == 0
    assert train(bert, tmp_path / "out", "--train_file", reviews, "--teacher", str(tmp_path / "dense")) == 0
    labels = tmp_path / "dense" / "labels.json"
    labels.write_text(json.dumps({**json.loads(labels.read_text()), "labels": ["pos", "neg"]}))
    with pytest.raises(peft_pst.cli.errors.UserError, match=r"orders the labels \['pos', 'neg'\] and the model"):
        make_trainer(bert, reviews, tmp_path / "again", "--teacher", str(tmp_path / "dense"))


def test_classifier_without_pad_token(gpt2: str, reviews: str, tmp_path: Path) -> None:
    teacher = save_classifier(gpt2, tmp_path / "teacher")
    assert train(gpt2, tmp_path / "out", "--train_file", reviews, "--teacher", teacher) == 0


def test_regression(bert: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.tsv"
    file.write_text("text\tscore\ngood\t0.5\nbad\t1.5\nfine\t2.5\n", encoding="utf-8")
    teacher = save_classifier(bert, tmp_path / "teacher", num_labels=1)
    assert train(bert, tmp_path / "out", "--train_file", str(file), "--teacher", teacher) == 0


def test_language_model(gpt2: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the film was very good\n" * 40, encoding="utf-8")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gpt2)).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "teacher")
    given = ["--task", "causal_lm", "--train_file", str(text), "--max_length", "16"]
    assert train(gpt2, tmp_path / "out", *given, "--teacher", str(tmp_path / "teacher")) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# Mistakes


def refused(capsys: pytest.CaptureFixture[str], bert: str, output: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert train(bert, output, *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    assert not output.exists()
    return said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "./absent"], "--teacher ./absent is not a folder."),
        (
            ["--teacher", "{bert}"],
            "holds no classifier.bias, classifier.weight; pass a model that was fine-tuned as Bert",
        ),
        (["--teacher", "{bert}", "--teacher_weight", "2"], "teacher_weight=2.0 is outside [0, 1]"),
        (["--teacher", "{bert}", "--temperature", "0"], "temperature=0.0 must be a finite number above 0"),
        (["--teacher_weight", "0.9"], "teacher_weight=0.9 needs a teacher; pass --teacher FOLDER_OR_NAME"),
        (["--temperature", "3"], "temperature=3.0 needs a teacher"),
    ],
)
def test_mistakes(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [argument.replace("{bert}", bert) for argument in arguments]
    assert message in refused(capsys, bert, tmp_path / "out", "--train_file", reviews, *filled)


def test_teacher_with_another_number_of_labels(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_classifier(bert, tmp_path / "plain", num_labels=3)
    lora = save_lora(bert, tmp_path / "lora", num_labels=3)
    for teacher in (plain, lora):
        error = refused(capsys, bert, tmp_path / "out", "--train_file", reviews, "--teacher", teacher)
        assert f"--teacher {teacher}: The teacher gives num_labels=3 and the model num_labels=2" in error


def test_teacher_that_reads_other_tokens(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_classifier(bert, tmp_path / "teacher")
    rename_token(tmp_path / "teacher", "film", "movie")
    error = refused(capsys, bert, tmp_path / "out", "--train_file", reviews, "--teacher", teacher)
    assert "reads other tokens: 'film' is 7 to the model and unknown to the teacher; pass one with the same" in error


def test_teacher_that_reads_fewer_tokens(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_classifier(bert, tmp_path / "teacher", max_position_embeddings=16)
    error = refused(capsys, bert, tmp_path / "out", "--train_file", reviews, "--teacher", teacher)
    assert "can read 16 tokens only; pass --max_length 16 or less." in error
    assert train(bert, tmp_path / "out", "--train_file", reviews, "--teacher", teacher, "--max_length", "16") == 0


def test_adapter_for_another_task(gpt2: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).save_pretrained(tmp_path / "lm")
    error = refused(capsys, gpt2, tmp_path / "out", "--train_file", reviews, "--teacher", str(tmp_path / "lm"))
    assert "gives logits of a vocabulary of 23 and the model num_labels=2" in error


def test_tokenizer_of_an_adapter_is_its_own_or_its_bases(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = save_lora(bert, tmp_path / "lora")
    make_trainer(bert, reviews, tmp_path / "first", "--teacher", lora)
    AutoTokenizer.from_pretrained(bert).save_pretrained(lora)
    rename_token(tmp_path / "lora", "was", "were")
    error = refused(capsys, bert, tmp_path / "out", "--train_file", reviews, "--teacher", lora)
    assert "reads other tokens: 'was' is" in error


def test_help_has_a_group_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peft_pst.cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert shown.index("distillation:") < shown.index("--teacher TEACHER") < shown.index("Trainer (transformers.")
    assert DistillationOptions().teacher is None
