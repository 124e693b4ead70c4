"""The README and the pages of docs/ are true: their code runs, their options, commands and links exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import peft_pst
from peft_pst import PSTConfig
from peft_pst.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[tuple[str, str]]:
    """The ```python blocks of a page, each with where it stands; "```python no-run" says that one is not to run."""
    text = page.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}", block[1]) for block in blocks]


def option_table() -> str:
    """The README's table, from the configuration itself."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(PSTConfig):
        if field.name in inherited:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        rows.append(f"| `{field.name}` | `{default!r}` | {field.metadata['help']} |")
    return "\n".join(rows)


def test_option_table_is_the_configuration():
    assert option_table() in README


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """What the README takes for granted: a base model, training arguments and data."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)

    class Fresh(dict):
        # Each snippet starts from an unadapted model of its own.
        def __missing__(self, name):
            if name == "base":
                torch.manual_seed(0)
                return BertForSequenceClassification(config)
            raise KeyError(name)

    ids = torch.randint(0, 50, (16, 6))
    examples = [{"input_ids": row, "labels": int(row[0] > 25)} for row in ids]
    batch = {"input_ids": ids, "labels": (ids[:, 0] > 25).long()}
    args = TrainingArguments("runs", max_steps=6, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
    return Fresh(args=args, train_set=examples, batches=[batch] * 6)


def run_snippets(page, surroundings):
    """The snippets of a page, from its top to its end, in one folder and with the names made so far."""
    for place, snippet in snippets(page):
        exec(compile(snippet, place, "exec"), surroundings)


def test_every_snippet_of_the_readme_runs(surroundings):
    assert len(snippets(PAGES[0])) >= 5
    run_snippets(PAGES[0], surroundings)
    pruned = BertForSequenceClassification.from_pretrained("pruned")
    for name, parameter in pruned.named_parameters():
        if name.endswith("query.weight"):
            assert int((parameter == 0).sum()) == int(parameter.numel() * 0.9)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_every_snippet_of_the_docs_runs(page, surroundings):
    run_snippets(page, surroundings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_commands_exist():
    for command in re.findall(r"^peft-pst (\w+)", README, re.MULTILINE):
        assert command in COMMANDS


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\s*make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", [name for name in peft_pst.__all__ if name != "__version__"])
def test_public_names_have_a_docstring_and_a_changelog_line(name):
    assert getattr(peft_pst, name).__doc__
    assert f"`{name}`" in (ROOT / "CHANGELOG.md").read_text()
