"""`peft-pst train` from the command line to the files it writes, and every mistake it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from sklearn.metrics import matthews_corrcoef
from tiny_checkpoints import WORDS, save_masked_bert
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import peft_pst.cli
from peft_pst import PSTCallback, PSTConfig
from peft_pst.cli.classification import prepare_classification
from peft_pst.cli.data import read_text_data
from peft_pst.cli.errors import UserError
from peft_pst.cli.labels import Labels
from peft_pst.cli.language import prepare_language_modelling
from peft_pst.cli.options import DataOptions, parse
from peft_pst.cli.pst_options import pst_fields
from peft_pst.cli.train import _make_trainer, add_adapter
from peft_pst.masking import num_pruned

pytestmark = pytest.mark.usefixtures("no_pictures")

GOOD, BAD = ("good", "great", "fine"), ("bad", "dull", "poor")
ROWS = [(f"the {noun} was {word}", word in GOOD) for noun in ("film", "plot", "cast") for word in (*GOOD, *BAD)]

# With these, PST's warm-up is --pst_warmup_ratio on the command line.
without_a_warmup_ratio_of_the_trainers = pytest.mark.skipif(
    "warmup_ratio" in {field.name for field in dataclasses.fields(TrainingArguments)},
    reason="transformers 5.14 and older have a warmup_ratio of their own",
)


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_masked_bert(tmp_path_factory.mktemp("masked-bert"))


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """A CSV file of two labels, with a comma inside quotes."""
    lines = ["text,label", *(f'"{text}, very","{"pos" if good else "neg"}"' for text, good in ROWS)]
    file = tmp_path / "reviews.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def train(model: str, output: Path, *arguments: str) -> int:
    quick = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--use_cpu"]
    small = ["--r", "2", "--score_rank", "2"]
    required = ["--model_name_or_path", model, "--output_dir", str(output)]
    return peft_pst.cli.main(["train", *required, *quick, *small, *arguments])


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def logits(adapter: Path, texts: list[str], **kwargs: int) -> torch.Tensor:
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


# What a run leaves behind


def test_classification_from_csv(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with pictures
    output = tmp_path / "out"
    assert train(bert, output, "--train_file", reviews, "--validation_file", reviews, "--learning_rate", "0.05") == 0
    assert Labels.load(output) == Labels("single_label_classification", ("neg", "pos"))

    # The adapter on disk gives the accuracy that the run reported, computed here by other means.
    predictions = logits(output, [f"{text}, very" for text, _ in ROWS]).argmax(1).tolist()
    right = sum(prediction == good for prediction, (_, good) in zip(predictions, ROWS, strict=True))
    assert read_json(output / "all_results.json")["eval_accuracy"] == pytest.approx(right / len(ROWS))

    report = read_json(output / "report" / "report.json")
    assert report["zeros"] == sum(num_pruned(math.prod(layer["shape"]), 0.9) for layer in report["layers"])
    assert len(report["layers"]) == 12
    assert {file.name for file in (output / "report").iterdir()} == {
        "report.json",
        "layer_sparsity.png",
        "kept_weights.png",
        "training.png",
    }
    assert read_json(output / "trainer_state.json")["log_history"][-1]["sparsity"] == round(report["sparsity"], 6)
    assert [file.suffix for file in output.iterdir() if file.suffix in (".bin", ".pt", ".pkl")] == []
    printed = capsys.readouterr().out
    assert f"peft-pst merge {output} {output}-merged" in printed
    assert "2 labels: neg, pos" in printed


def test_model_card_says_how_to_load(bert: str, reviews: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--train_file", reviews, "--validation_file", reviews, "--model_revision", "v1"]
    assert train(bert, output, *arguments) == 0
    assert read_json(output / "adapter_config.json")["revision"] == "v1"
    card = (output / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert code.startswith("import peft_pst\n")
    namespace: dict = {}
    exec(code.replace('"out"', repr(str(output))), namespace)
    assert namespace["model"].peft_config["default"].peft_type == "PST"
    assert f"base_model: {bert}" in card
    assert "eval_accuracy" in card
    sparsity = read_json(output / "report" / "report.json")["sparsity"]
    assert f"{sparsity:.2%} of the weights in 12 matrices" in card


def test_three_labels_with_predictions(bert: str, tmp_path: Path) -> None:
    colours = ("red", "green", "blue")
    rows = [{"sentence": f"the film is {colour}", "class": colour, "year": 1990} for colour in colours * 4]
    train_file, test_file = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    test_file.write_text("".join(json.dumps({"sentence": row["sentence"]}) + "\n" for row in rows), encoding="utf-8")
    output = tmp_path / "out"
    assert train(bert, output, "--train_file", str(train_file), "--test_file", str(test_file)) == 0
    names = sorted(colours)
    assert Labels.load(output) == Labels("single_label_classification", tuple(names))
    expected = [names[i] for i in logits(output, [row["sentence"] for row in rows], num_labels=3).argmax(1)]
    lines = (output / "test_predictions.tsv").read_text(encoding="utf-8").splitlines()
    assert lines == ["index\tprediction", *(f"{index}\t{name}" for index, name in enumerate(expected))]
    assert not (output / "test_results.json").exists()


def test_cola_has_no_header_and_is_scored_by_matthews(bert: str, tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    # A quotation mark that is never closed: GLUE's files are read without quoting.
    file.write_text("".join(f'gj04\t{int(good)}\t\t"{text}\n' for text, good in ROWS), encoding="utf-8")
    output = tmp_path / "out"
    assert train(bert, output, "--task_name", "cola", "--train_file", str(file), "--validation_file", str(file)) == 0
    assert Labels.load(output) == Labels("single_label_classification", ("unacceptable", "acceptable"))
    predictions = logits(output, [f'"{text}' for text, _ in ROWS]).argmax(1).tolist()
    results = read_json(output / "eval_results.json")
    assert results["eval_samples"] == len(ROWS)
    assert results["eval_matthews_correlation"] == pytest.approx(matthews_corrcoef([g for _, g in ROWS], predictions))


def test_glue_files_with_names_as_labels(bert: str, tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    lines = [f"{i}\t{text}\ta film\t{'not_' * bad}entailment" for i, (text, bad) in enumerate(ROWS)]
    lines.append("18\tan incomplete row")  # QQP has some
    file.write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n", encoding="utf-8")
    data = read_text_data(DataOptions(task_name="rte", train_file=str(file)))
    assert data.labels.names == ("entailment", "not_entailment")
    assert data.train.labels == [int(bad) for _, bad in ROWS]
    assert data.train.pairs == ["a film"] * len(ROWS)
    assert data.notes == [f"{file}: 1 incomplete rows were left out."]


def test_stsb_without_a_header(tmp_path: Path) -> None:
    file = tmp_path / "sts-test.csv"  # GLUE's name for it, though there are tabs in it
    file.write_text("news\tMSR\t2012\t1\t2.500\ta, b\tc\n", encoding="utf-8")
    data = read_text_data(DataOptions(task_name="stsb", train_file=str(file)))
    assert (data.train.texts, data.train.pairs, data.train.labels) == (["a, b"], ["c"], [2.5])


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["unacceptable", "acceptable"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})

    def split(labels: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"sentence": ["a"] * len(labels), "label": labels}, features=features)

    asked = []

    def load_dataset(*arguments: str | None) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict(train=split([1, 0]), validation=split([1]), test=split([-1, -1]))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for options in (DataOptions(task_name="cola"), DataOptions(dataset_name="me/mine", dataset_config_name="small")):
        data = read_text_data(options)
        assert data.validation is not None
        assert data.test is not None
        assert data.train.labels is not None
        assert [data.labels.names[i] for i in data.train.labels] == ["acceptable", "unacceptable"]
        assert [data.labels.names[i] for i in data.validation.labels or []] == ["acceptable"]
        assert data.test.labels is None  # withheld
    assert asked == [("nyu-mll/glue", "cola"), ("me/mine", "small")]


def test_regression_is_recognised(bert: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    lines = [f"{text}\tthe film was good\t{4.5 if good else 1.0:.3f}" for text, good in ROWS]
    file.write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n", encoding="utf-8")
    output = tmp_path / "out"
    assert train(bert, output, "--train_file", str(file), "--validation_file", str(file)) == 0
    assert Labels.load(output) == Labels("regression")
    assert {"eval_pearson", "eval_spearman"} <= read_json(output / "eval_results.json").keys()
    assert load_file(output / "adapter_model.safetensors")["base_model.model.classifier.weight"].shape[0] == 1


def test_language_model_from_text(gpt2: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS) for _ in range(20)) + "\n", encoding="utf-8")
    output = tmp_path / "out"
    arguments = ["--task", "causal_lm", "--train_file", str(text), "--validation_file", str(text), "--max_length", "16"]
    assert train(gpt2, output, *arguments) == 0
    results = read_json(output / "all_results.json")
    assert results["train_samples"] == 20 * len(WORDS) // 16
    model = AutoPeftModelForCausalLM.from_pretrained(output).eval()
    ids = AutoTokenizer.from_pretrained(output)(text.read_text(encoding="utf-8"))["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert results["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_documents_are_separated(gpt2: str, tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text('{"body": "the film"}\n{"body": ""}\n{"body": "a plot was dull"}\n', encoding="utf-8")
    required = ["--model_name_or_path", gpt2, "--output_dir", str(tmp_path)]
    options = parse([*required, "--task", "causal_lm", "--train_file", str(file), "--max_length", "2"])
    job = prepare_language_modelling(options)
    words = [job.base.tokenizer.decode(ids) for ids in job.train["input_ids"]]
    assert words == ["the film", "[EOS] a", "plot was", "dull [EOS]"]
    assert job.train["labels"] == job.train["input_ids"]


def test_classifier_without_pad_token(gpt2: str, reviews: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train(gpt2, output, "--train_file", reviews, "--validation_file", reviews) == 0
    assert AutoTokenizer.from_pretrained(output).pad_token == "[EOS]"
    texts = [f"{text}, very" for text, _ in ROWS]
    right = sum(p == good for p, (_, good) in zip(logits(output, texts).argmax(1).tolist(), ROWS, strict=True))
    assert read_json(output / "all_results.json")["eval_accuracy"] == pytest.approx(right / len(ROWS))


def test_selected_layers(bert: str, reviews: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    chosen = ["--layers_to_transform", "1", "--layers_pattern", "layer", "--exclude_modules", "attention.self.key"]
    ranks = ["--rank_pattern", '{"output.dense": 4, "1.attention.self.query": 3}', "--modules_to_save", "pooler"]
    assert train(bert, output, "--train_file", reviews, *chosen, *ranks) == 0
    state = load_file(output / "adapter_model.safetensors")
    ranks_saved = {name.split("layer.")[1]: u.shape[1] for name, u in state.items() if name.endswith("pst_U")}
    assert ranks_saved == {
        "1.attention.self.query.pst_U": 3,
        "1.attention.self.value.pst_U": 2,
        "1.attention.output.dense.pst_U": 4,
        "1.intermediate.dense.pst_U": 2,
        "1.output.dense.pst_U": 4,
    }
    assert "base_model.model.bert.pooler.dense.weight" in state


def test_modules_that_start_at_random_are_saved(masked_bert: str, reviews: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train(masked_bert, output, "--train_file", reviews) == 0
    assert "base_model.model.bert.pooler.dense.weight" in load_file(output / "adapter_model.safetensors")
    torch.manual_seed(1)
    first = logits(output, ["the film was good"])
    torch.manual_seed(2)  # the base would start another pooler
    assert torch.equal(first, logits(output, ["the film was good"]))


def test_resumed_run_ends_where_an_uninterrupted_one_does(bert: str, reviews: str, tmp_path: Path) -> None:
    arguments = ["--train_file", reviews, "--save_steps", "3", "--max_steps", "6"]
    assert train(bert, tmp_path / "whole", *arguments) == 0
    assert Labels.load(tmp_path / "whole" / "checkpoint-3") is not None
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "broken" / "checkpoint-3")
    assert train(bert, tmp_path / "broken", *arguments, "--resume_from_checkpoint", "true") == 0
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_overwriting_removes_the_old_checkpoints(bert: str, reviews: str, tmp_path: Path) -> None:
    stale = tmp_path / "out" / "checkpoint-1000"
    stale.mkdir(parents=True)
    assert train(bert, tmp_path / "out", "--train_file", reviews, "--overwrite") == 0
    assert not stale.exists()


# The Trainer


def make_trainer(bert: str, reviews: str, tmp_path: Path, *arguments: str):
    required = ["--model_name_or_path", bert, "--train_file", reviews, "--output_dir", str(tmp_path / "out")]
    options = parse([*required, "--use_cpu", "--disable_tqdm", "true", *arguments])
    options.pst.task_type = "SEQ_CLS"
    job = prepare_classification(options)
    return _make_trainer(add_adapter(job.base, options.pst), job, options)


def test_learning_rates(bert: str, reviews: str, tmp_path: Path) -> None:
    rates = ["--learning_rate", "0.003", "--score_learning_rate", "0.01", "--head_learning_rate", "0.001"]
    adam = ["--adam_beta1", "0.5", "--weight_decay", "0.1", "--optim", "adamw_torch"]
    trainer = make_trainer(bert, reviews, tmp_path, *rates, *adam)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weight_update": 0.003,
        "scores": 0.01,
        "head": 0.001,
        "head_no_decay": 0.001,
    }
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weight_update": 0.1,
        "scores": 0.0,
        "head": 0.1,
        "head_no_decay": 0.0,
    }
    assert all(group["betas"][0] == 0.5 for group in groups.values())
    trained = {parameter for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert {parameter for group in groups.values() for parameter in group["params"]} == trained


def test_optimizer_that_chooses_its_own_parameters(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(bert, reviews, tmp_path, "--score_learning_rate", "0.01")
    chosen = [{"params": [parameter]} for parameter in trainer.model.parameters() if parameter.requires_grad][:1]
    choice = (torch.optim.SGD, {"params": chosen, "lr": 0.1})  # as GaLore's is handed over
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *_: (choice[0], dict(choice[1])))
    with pytest.raises(UserError, match=r"--optim adamw_torch(_fused)? groups the parameters itself"):
        trainer.create_optimizer()
    trainer.run_options.score_learning_rate = None
    assert trainer.create_optimizer().param_groups[0]["params"] == chosen[0]["params"]


def test_accumulation_leaves_the_loss_as_it_is(bert: str, reviews: str, tmp_path: Path) -> None:
    # With a new head on two labels the loss starts at log 2; times the accumulation steps it would be far from it.
    arguments = ["--max_steps", "1", "--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "2"]
    trainer = make_trainer(bert, reviews, tmp_path, *arguments)
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=0.1)


def test_reporting_integrations_see_the_sparsity(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Integration(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            seen.append("sparsity" in logs)

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [Integration])
    trainer = make_trainer(
        bert, reviews, tmp_path, "--max_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"
    )
    trainer.train()
    assert seen == [True, True, True]
    assert sum(isinstance(callback, PSTCallback) for callback in trainer.callback_handler.callbacks) == 1


# Options


@without_a_warmup_ratio_of_the_trainers
def test_pst_options_come_from_the_config() -> None:
    required = ["--model_name_or_path", "m", "--output_dir", "o"]
    assert parse(required).pst == PSTConfig()
    given = {
        "target_sparsity": 0.7,
        "initial_sparsity": 0.1,
        "pattern": "2x4",
        "scope": "global",
        "min_kept": 0.02,
        "parts": {"c_attn": 3},
        "projections": {},
        "keep_zeros": True,
        "r": 4,
        "score_rank": 0,
        "structured": True,
        "embedding_r": 4,
        "embedding_modules": ["word_embeddings"],
        "residual": 16,
        "residual_positions": "magnitude",
        "beta": 2.0,
        "alpha2": 0.5,
        "warmup_ratio": 0.2,
        "cooldown_ratio": 0.2,
        "total_steps": 10,
        "mask_interval": None,
        "init_weights": "fan_in",
        "target_modules": ["query", "value"],
        "exclude_modules": ["attention.output.dense"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["layer"],
        "modules_to_save": ["pooler"],
        "bias": "pst_only",
        "fan_in_fan_out": False,
        "sparsity_pattern": {"query": 0.5},
        "rank_pattern": {"query": 2},
        "residual_pattern": {"value": 0},
        "score_rank_pattern": {},
    }
    arguments = []
    for name, value in given.items():
        is_list = isinstance(value, list)
        texts = (
            [str(item) for item in value] if is_list else [json.dumps(value) if isinstance(value, dict) else str(value)]
        )
        arguments += [f"--{name}", *texts]
    assert parse(required + arguments).pst == PSTConfig(**given)
    assert {field.name for field in pst_fields()} == given.keys() | {"alpha1"}


def test_the_rank_has_a_name_that_launchers_leave_alone() -> None:
    required = ["--model_name_or_path", "m", "--output_dir", "o"]
    assert parse([*required, "--pst_r", "3"]).pst.r == parse([*required, "--pst-r", "3"]).pst.r == 3


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ([], 2e-3),
        (["--preset", "dsee"], 2e-3),
        (["--preset", "paper"], 5e-4),
        (["--preset", "paper", "--learning_rate", "0.002"], 2e-3),
        (["--learning-rate", "5e-5"], 5e-5),
    ],
    ids=str,
)
def test_the_learning_rate_fits_what_is_trained(arguments: list[str], rate: float) -> None:
    assert parse(["--model_name_or_path", "m", "--output_dir", "o", *arguments]).training.learning_rate == rate


@pytest.mark.parametrize(("text", "expected"), [("4", 4), ("none", None)])
def test_mask_interval_is_a_number_or_none(text: str, expected: int | None) -> None:
    options = parse(["--model_name_or_path", "m", "--output_dir", "o", "--mask_interval", text])
    assert options.pst.mask_interval == expected


def test_pattern_and_projections_are_read() -> None:
    named = '{"neurons": [{"inputs": ["up"], "output": "down"}]}'
    required = ["--model_name_or_path", "m", "--output_dir", "o"]
    options = parse([*required, "--pattern", "neurons", "--projections", named, "--target_sparsity", "0.5"])
    assert (options.pst.pattern, options.pst.target_sparsity) == ("neurons", 0.5)
    assert options.pst.projections == {"neurons": [{"inputs": ["up"], "output": "down"}]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["query"], {"query"}),
        (["attention.self.query"], {"attention.self.query"}),
        (["all-linear"], "all-linear"),
        ([r".*\.(query|key)"], r".*\.(query|key)"),
    ],
)
def test_single_target_is_a_name_or_a_pattern(values: list[str], expected: set[str] | str) -> None:
    options = parse(["--model_name_or_path", "m", "--output_dir", "o", "--target_modules", *values])
    assert options.pst.target_modules == expected


def test_dsee_is_a_preset() -> None:
    given = ["--model_name_or_path", "m", "--output_dir", "o", "--preset", "dsee", "--target_sparsity", "0.5"]
    assert parse([*given, "--residual_positions", "random"]).pst == PSTConfig.dsee(
        target_sparsity=0.5, residual_positions="random"
    )


def test_preset_is_the_papers_and_can_be_changed() -> None:
    required = ["--model_name_or_path", "m", "--output_dir", "o", "--preset", "paper"]
    assert parse(required).pst == PSTConfig.paper()
    assert parse([*required, "--target_sparsity", "0.5"]).pst == PSTConfig.paper(target_sparsity=0.5)


@without_a_warmup_ratio_of_the_trainers
def test_field_of_a_taken_name_gets_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = dataclasses.make_dataclass("Taken", [("beta", float)])
    monkeypatch.setattr("peft_pst.cli.pst_options.TrainingArguments", taken)
    options = parse(["--model_name_or_path", "m", "--output_dir", "o", "--pst_beta", "3"])
    assert options.pst == PSTConfig(beta=3.0)


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        peft_pst.cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [field.name for field in dataclasses.fields(PSTConfig) if f"--{field.name} " not in text] == [
        field.name for field in dataclasses.fields(PSTConfig) if field not in pst_fields()
    ]
    assert "--learning_rate " in text


# Mistakes: one line, status 2, and nothing written


def refused(capsys: pytest.CaptureFixture[str], status: int, output: Path) -> str:
    """The message of a refused run."""
    assert status == 2
    assert not output.exists()
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert error.rstrip().endswith(lines[0])
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no training data; pass --task_name, --train_file or --dataset_name"),
        (["--train_file", "absent.csv"], "--train_file absent.csv: there is no such file"),
        (["--train_file", "{csv}", "--validation_file", "absent.csv"], "--validation_file absent.csv: there is no"),
        (["--validation_file", "{csv}", "--task_name", "sst2"], "--validation_file needs --train_file beside it"),
        (["--train_file", "{csv}", "--dataset_name", "x"], "--dataset_name excludes --train_file"),
        (["--task_name", "sst3"], "--task_name sst3 is none of cola, sst2,"),
        (["--train_file", "{csv}", "--text_column", "txt"], "has no column 'txt'; it has 'text', 'label'. Pass --text"),
        (["--train_file", "{csv}", "--label_column", "y"], "has no column 'y'; it has 'text', 'label'. Pass --label"),
        (["--train_file", "{csv}", "--target_sparsity", "1.5"], "target_sparsity=1.5 is outside [0, 1)"),
        (["--train_file", "{csv}", "--r", "-1"], "r=-1 is not a rank"),
        (["--train_file", "{csv}", "--r", "many"], "--pst-r: invalid int value: 'many'"),
        (["--train_file", "{csv}", "--sparsity_pattern", "90%"], "'90%' is not JSON"),
        (
            ["--train_file", "{csv}", "--target_sparcity", "0.5"],
            "did you mean --target_sparsity?",
        ),
        (
            ["--train_file", "{csv}", "--target_modules", "qwery"],
            "--target_modules qwery leaves no layer to adapt; the blocks of the model hold attention.output.dense, ",
        ),
        (
            ["--train_file", "{csv}", "--target_modules", "query", "qwery"],
            "'qwery' matches no layer",
        ),
        (["--train_file", "{csv}", "--rank_pattern", '{"sel.kei": 5}'], "adapted layers; try key."),
        (
            ["--train_file", "{csv}", "--modules_to_save", "zzz"],
            "; try bert.pooler or bert.pooler.dense or classifier.",
        ),
        (["--train_file", "{csv}", "--exclude_modules", ".*"], "--exclude_modules .* leaves no layer to adapt; the"),
        (["--train_file", "{csv}", "--exclude_modules", "quary"], "'quary' is no module of the model; try query."),
        (["--train_file", "{csv}", "--exclude_modules", "qu.*"], "--exclude_modules 'qu.*' matches no module by its"),
        (["--train_file", "{csv}", "--modules_to_save", "poler"], "'poler' is no module of the model; try pooler."),
        (
            ["--train_file", "{csv}", "--sparsity_pattern", '{"quary": 0.5}'],
            "--sparsity_pattern: 'quary' matches none of",
        ),
        (
            ["--train_file", "{csv}", "--sparsity_pattern", '{"query": 0.5, "zzz": 0.5}'],
            "--sparsity_pattern: 'zzz' match",
        ),
        (["--train_file", "{csv}", "--rank_pattern", '{"zzz": 5}'], "--rank_pattern: 'zzz' matches none of the 12"),
        (["--train_file", "{csv}", "--score_rank_pattern", '{"zzz": 5}'], "--score_rank_pattern: 'zzz' matches none"),
        (
            ["--train_file", "{csv}", "--target_modules", "key", "--rank_pattern", '{"query": 5}'],  # not adapted
            "--rank_pattern: 'query' matches none of the 2 adapted layers; try attention.self.key.",
        ),
        (
            ["--train_file", "{csv}", "--layers_to_transform", "9"],
            "--layers_to_transform 9: the model has 2 blocks, co",
        ),
        (
            ["--train_file", "{csv}", "--layers_to_transform", "1", "2"],
            "--layers_to_transform 2: the model has 2 blocks",
        ),
        (
            ["--train_file", "{csv}", "--layers_to_transform", "0", "--layers_pattern", "blok"],
            "--layers_pattern blok finds no blocks in the model; it has layer.",
        ),
        (["--train_file", "{csv}", "--problem", "regression"], "row 1: label 'pos' is not a finite number"),
        (["--train_file", "{csv}", "--max_length", "33"], "--max_length 33 is more than the 32 tokens"),
        (["--train_file", "{csv}", "--max_length", "0"], "max_length=0 is below 1"),
        (["--train_file", "{csv}", "--eval_strategy", "steps"], "--eval_strategy steps needs data to evaluate on"),
        (["--train_file", "{csv}", "--score_learning_rate", "-1"], "score_learning_rate=-1.0 must be a finite number"),
        (["--train_file", "{csv}", "--head_learning_rate", "nan"], "head_learning_rate=nan must be a finite number"),
        (["--train_file", "{csv}", "--learning_rate", "-1"], "--learning_rate -1.0 must be a finite number of at"),
        (["--train_file", "{csv}", "--learning_rate", "nan"], "--learning_rate nan must be a finite number of at"),
        (["--train_file", "{csv}", "--adam_beta2", "1"], "--adam_beta2 1.0 must be in [0, 1); the default is 0.999"),
        (
            ["--train_file", "{csv}", "--per_device_train_batch_size", "0"],
            "batch_size 0 must be at least 1; the default",
        ),
        (
            ["--train_file", "{csv}", "--gradient_accumulation_steps", "0"],
            "steps 0 must be at least 1; the default is 1",
        ),
        (["--train_file", "{csv}", "--max_steps", "0"], "--max_steps 0 must be at least 1, or -1 to go by --num_train"),
        (
            ["--train_file", "{csv}", "--num_train_epochs", "0"],
            "--num_train_epochs 0.0 must be a finite number above 0",
        ),
        (
            ["--train_file", "{csv}", "--save_steps", "0"],
            "--save_steps 0.0 must be a number of steps above 0, or below 1 a share of all (the options --save_",
        ),
        (["--train_file", "{csv}", "--save_steps", "-5"], "--save_steps -5.0 must be a number of steps above 0"),
        (["--train_file", "{csv}", "--eval_steps", "0"], "--eval_steps 0.0 must be a number of steps above 0"),
        (["--train_file", "{csv}", "--logging_steps", "-1"], "--logging_steps -1.0 must be a number of steps above 0"),
        (["--train_file", "{csv}", "--accelerator_config", "absent.json"], "No such file or directory: 'absent.json'"),
        (
            ["--train_file", "{csv}", "--optim", "adamw_tourch"],
            "'adamw_tourch' is none of the {optimizers} optimizers; try adamw_torch or ",
        ),
        (
            ["--train_file", "{csv}", "--optim", "zzz"],
            "try adamw_torch or adafactor or sgd; see peft-pst train --help.",
        ),
        (
            ["--train_file", "{csv}", "--lr_scheduler_kwargs", '{"zzz": 1}'],
            "with --lr_scheduler_type linear and the options of both: get_linear_schedule_with_warmup() got an",
        ),
        (
            ["--train_file", "{csv}", "--validation_file", "{csv}", "--metric_for_best_model", "f1"],
            "--metric_for_best_model f1 is none of what evaluation reports: loss, accuracy.",
        ),
        (["--train_file", "{csv}", "--target_modules", "que[ry"], "'que[ry' is not a regular expression: unterminated"),
        (["--train_file", "{csv}", "--exclude_modules", "("], "'(' is not a regular expression: missing )"),
        (["--train_file", "{csv}", "--rank_pattern", '{"a(": 5}'], "'a(' is not a regular expression: missing )"),
        (
            ["--train_file", "{csv}", "--resume_from_checkpoint", "true"],
            "holds no whole checkpoint; leave the option out",
        ),
        (["--train_file", "{csv}", "--resume_from_checkpoint", "{folder}"], "is not a checkpoint of an adapter"),
        (["--train_file", "{csv}", "--model_name_or_path", "{folder}"], "could not be loaded:"),
        (
            ["--train_file", "{csv}", "--model_name_or_path", "./absent"],
            "_path ./absent is not a folder",
        ),
        (["--train_file", "{csv}", "--verbosity", "9"], "--verbosity is not an option; see peft-pst train --help"),
        (
            ["--train_file", "{csv}", "--load_best_model_at_end", "true", "--eval_steps", "2"],
            "--load_best_model_at_end",
        ),
        (["--train_file", "{csv}", "--task", "causal_lm", "--test_file", "{csv}"], "--test_file is for seq_cls"),
        (["--train_file", "{csv}", "--task_name", "mrpc"], "has no column 'sentence1'; it has 'text', 'label'"),
        (["--task_name", "sst2", "--task", "causal_lm"], "--task_name is for seq_cls"),
        (
            ["--train_file", "{csv}", "--task_name", "stsb", "--problem", "regression"],
            "has 2 columns; without a header line it needs genre, filename,",
        ),
        (["--train_file", "{csv}", "--task_name", "stsb", "--problem", "single_label_classification"], "contradicts"),
    ],
)
def test_mistakes(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [argument.replace("{csv}", reviews).replace("{folder}", str(tmp_path)) for argument in arguments]
    output = tmp_path / "out"
    message = message.replace("{optimizers}", str(len(OptimizerNames)))
    assert message in refused(capsys, train(bert, output, *filled), output)


def test_integration_that_is_not_installed(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    output = tmp_path / "out"
    status = train(bert, output, "--train_file", reviews, "--report_to", "wandb")
    assert "requires wandb to be installed. Run `pip install wandb`" in refused(capsys, status, output)


def test_kernels_that_are_not_installed(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peft_pst.cli.train.is_liger_kernel_available", lambda: False)
    output = tmp_path / "out"
    said = refused(capsys, train(bert, output, "--train_file", reviews, "--use_liger_kernel", "true"), output)
    assert "--use_liger_kernel true needs liger-kernel 0.3 or later; run: pip install liger-kernel" in said


def test_a_hub_that_cannot_be_reached(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output, push = tmp_path / "out", ["--push_to_hub", "true", "--hub_token", "hf_none"]
    said = refused(capsys, train(bert, output, "--train_file", reviews, *push), output)
    assert "--push_to_hub true: the hub does not take it (" in said
    assert "offline mode is enabled" in said
    assert "pass --hub_token or mend the connection, or leave the option out." in said


def test_a_hub_that_fails_after_training(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("gone\nwith details")

    monkeypatch.setattr("peft_pst.cli.hub.HfApi.whoami", lambda *_, **__: {})
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_: None)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", fail)
    output = tmp_path / "out"
    assert train(bert, output, "--train_file", reviews, "--push_to_hub", "true", "--save_strategy", "no") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"but could not be pushed (gone); push it with `hf upload NAME {output}`.")
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("local_rank", "waits"), [("0", 0), ("1", 1)])
def test_other_processes_leave_the_first_word_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, waits: int
) -> None:
    slept: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("peft_pst.cli.errors.time.sleep", slept.append)
    assert peft_pst.cli.main(["train", "--absent"]) == 2
    assert len(slept) == waits
    assert "error:" in capsys.readouterr().err  # and what one process alone has met is said after all


def launched(model: str, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`train` on two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "peft_pst"]
    required = ["train", "--model_name_or_path", model, "--output_dir", str(output), "--use_cpu"]
    return subprocess.run([*launch, *required, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_a_launched_run_writes_once_and_has_every_zero(bert: str, reviews: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--train_file", reviews, "--validation_file", reviews, "--max_steps", "6", "--learning_rate", "0.05"]
    finished = launched(bert, output, *options, "--per_device_train_batch_size", "2", "--pst_r", "2")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(f"peft-pst merge {output} {output}-merged") == 1
    report = read_json(output / "report" / "report.json")
    assert report["zeros"] == sum(num_pruned(math.prod(layer["shape"]), 0.9) for layer in report["layers"])
    history = read_json(output / "trainer_state.json")["log_history"]
    assert history[-1]["sparsity"] == round(report["sparsity"], 6)
    predictions = logits(output, [f"{text}, very" for text, _ in ROWS]).argmax(1).tolist()
    right = sum(prediction == good for prediction, (_, good) in zip(predictions, ROWS, strict=True))
    assert read_json(output / "all_results.json")["eval_accuracy"] == pytest.approx(right / len(ROWS))


@pytest.mark.slow
def test_a_mistake_of_several_processes_is_said_once(bert: str, tmp_path: Path) -> None:
    finished = launched(bert, tmp_path / "out", "--train_file", "absent.csv")
    assert finished.returncode != 0
    assert finished.stderr.count("--train_file absent.csv: there is no such file") == 1
    assert "peft_pst/cli" not in finished.stderr  # no traceback of ours


def test_mistake_that_shows_late_leaves_no_folder(
    bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = ["--train_file", reviews, "--lr_scheduler_kwargs", '{"zzz": 1}']
    assert "unexpected keyword argument 'zzz'" in refused(
        capsys, train(bert, tmp_path / "new" / "out", *late), tmp_path / "new"
    )
    (tmp_path / "old").mkdir()
    assert train(bert, tmp_path / "old", *late) == 2
    assert (tmp_path / "old").is_dir()


@pytest.mark.parametrize("name", ["pearson", "eval_spearman", "eval_loss"])
def test_metrics_that_a_best_model_can_be_chosen_by(bert: str, tmp_path: Path, name: str) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("text\tscore\ngood\t0.5\nbad\t1.5\nfine\t2.5\n", encoding="utf-8")
    best = ["--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3", "--load_best_model_at_end", "true"]
    files = ["--train_file", str(file), "--validation_file", str(file)]
    assert train(bert, tmp_path / "out", *files, *best, "--metric_for_best_model", name) == 0
    assert read_json(tmp_path / "out" / "trainer_state.json")["best_metric"] is not None


@pytest.mark.parametrize(
    ("train_text", "validation_text", "message"),
    [
        (
            "text,label\na,x\nb,y\n",
            "text,label\na,x\nb,z\n",
            "validation.csv, row 2: label 'z' is none of 'x', 'y'",
        ),
        ("text,label\na,x\nb,\n", "", "train.csv, row 2: the label is missing"),
        ("text,label\na,x\nb,x\n", "", "train.csv: all labels are 'x'"),
        ("text,label\na,0.5\nb,1.5\nc,high\n", "", "train.csv, row 3: label 'high' is not a number, although most"),
        ("text,label\na,x\nb,y,z\n", "", "train.csv, row 2: 3 fields, but there are 2 columns"),
        ("text,text,label\na,b,x\n", "", "train.csv has more than one column 'text'"),
        ("text,label\n", "", "train.csv holds no rows"),
        ("", "", "train.csv holds no rows"),
    ],
)
def test_unusable_files(
    bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], train_text: str, validation_text: str, message: str
) -> None:
    arguments = []
    files = {"train": train_text, "validation": validation_text} if validation_text else {"train": train_text}
    for split, text in files.items():
        file = tmp_path / f"{split}.csv"
        file.write_text(text, encoding="utf-8")
        arguments += [f"--{split}_file", str(file)]
    output = tmp_path / "out"
    assert message in refused(capsys, train(bert, output, *arguments), output)


def test_unusable_jsonl(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "train.jsonl", tmp_path / "out"
    for text, message in (
        ('{"text": "a", "label": 0}\n{"text": 5, "label": 1}\n', "row 2: 'text' is 5, not a text"),
        ('{"text": "a", "label": 0}\n{"label": 1}\n', "row 2: 'text' is None, not a text"),
        ('{"text": "a", "label": 0}\nnonsense\n', "row 2 is not JSON"),
        ("[1]\n", "row 1 is not a JSON object"),
    ):
        file.write_text(text, encoding="utf-8")
        assert message in refused(capsys, train(bert, output, "--train_file", str(file)), output)


def test_text_that_is_not_utf8(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(b"text,label\ncaf\xe9,1\n")
    output = tmp_path / "out"
    assert "train.csv is not UTF-8" in refused(capsys, train(bert, output, "--train_file", str(file)), output)


def test_text_shorter_than_a_block(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "short.txt", tmp_path / "out"
    file.write_text("the film", encoding="utf-8")
    message = refused(capsys, train(gpt2, output, "--task", "causal_lm", "--train_file", str(file)), output)
    assert "short.txt has 2 tokens, fewer than one block of 32" in message


def test_model_without_tokenizer(bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bert, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    output = tmp_path / "out"
    status = train(str(tmp_path / "bare"), output, "--train_file", reviews)
    assert "has no tokenizer files; save the tokenizer beside the model" in refused(capsys, status, output)


def test_output_that_is_a_file(bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(bert, Path(reviews) / "inside", "--train_file", reviews) == 2
    assert "reviews.csv' is not a folder; name another folder with --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "report", "demo"])
def test_place_where_nothing_can_be_written(
    bert: str, reviews: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs a file system without new files that the superuser may write to")
    output = Path("/proc/peft-pst")
    status = {
        "train": lambda: train(bert, output, "--train_file", reviews),
        "report": lambda: peft_pst.cli.main(["report", bert, "--output", str(output)]),
        "demo": lambda: peft_pst.cli.main(["demo", "--output", str(output)]),
    }[command]()
    assert "/proc/peft-pst" in refused(capsys, status, output)


def test_folder_that_is_not_empty(bert: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert train(bert, tmp_path / "out", "--train_file", reviews) == 2
    assert "is not empty; pass another folder, --overwrite" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]
