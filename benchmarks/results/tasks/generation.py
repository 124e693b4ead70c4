"""E2E, WebNLG and DART: text from data, decoded by beam search and compared with all references of a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from ..generation.decode import beam_search
from ..generation.linearise import Example, read_dart, read_e2e, read_webnlg
from ..generation.text_metrics import score
from ..generation.tokens import encode_examples, padding_collator
from ..models import load_causal_model
from ..runs import Run
from .protocol import LoadedTask, Scores, shuffled, split_training


class _Source(NamedTuple):
    folder: str
    train: str
    test: str
    read: Callable[[str | Path], list[Example]]


TASKS = {
    "e2e": _Source("e2e", "trainset.csv", "testset_w_refs.csv", read_e2e),
    "webnlg": _Source("webnlg", "train.jsonl", "test.jsonl", read_webnlg),
    "dart": _Source("dart", "dart-v1.1.1-full-train.json", "dart-v1.1.1-full-test.json", read_dart),
}


def task_files(task: str, data: Path, *, with_validation: bool) -> list[Path]:
    """The training file, and the test file, which is what is scored.

    Args:
        task: name of the task.
        data: a folder that holds them itself, or in a folder of the task's name.
        with_validation: whether the second is wanted.

    Raises:
        FileNotFoundError: if one of them is missing.
    """
    source = TASKS[task]
    folder = data / source.folder if (data / source.folder).is_dir() else data
    files = [folder / source.train, *([folder / source.test] if with_validation else [])]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; pass --data FOLDER.")
    return files


def load(run: Run, data: Path | None) -> LoadedTask:
    """Read one task and a causal model. A search does not open the test file.

    Raises:
        ValueError: if no folder of files is given: these sets are read from their own files alone.
    """
    if data is None:
        raise ValueError(f"{run.task} is read from its own files; pass --data FOLDER.")
    searching = run.split == "held_out"
    files = task_files(run.task, data, with_validation=not searching)
    examples = TASKS[run.task].read(files[0])
    pool, held_out = split_training(len(examples), run)  # by sources, so that no source is on both sides
    scored = [examples[i] for i in held_out] if searching else TASKS[run.task].read(files[1])
    chosen = [scored[i] for i in shuffled(len(scored), run.training.shuffle_seed)[: run.training.eval_examples]]
    base = load_causal_model(run.model)
    rows = encode_examples([examples[i] for i in pool], base.tokenizer, run.training.max_length).rows

    def evaluate(model: nn.Module, arguments: TrainingArguments) -> Scores:
        sources = [example.source for example in chosen]
        texts = beam_search(
            model,
            base.tokenizer,
            sources,
            beams=run.training.beams,
            max_new_tokens=run.training.max_new_tokens,
            progress=False,
        )
        return score_groups(texts, chosen)

    collator: Any = padding_collator(base.tokenizer)
    return LoadedTask(base.model, "CAUSAL_LM", [], Dataset.from_list(rows), collator, evaluate, main_score="BLEU")


def score_groups(texts: Sequence[str], examples: Sequence[Example]) -> Scores:
    """All scores over all examples, and again over each group where there are several.

    Args:
        texts: what was generated for each example.
        examples: with their references.

    Returns:
        Scores by name; those of a group end in its name, such as "BLEU seen".
    """
    scores = score(texts, [example.references for example in examples])
    groups = sorted({example.group for example in examples})
    for group in groups if len(groups) > 1 else []:
        own = [i for i, example in enumerate(examples) if example.group == group]
        found = score([texts[i] for i in own], [examples[i].references for i in own])
        scores.update({f"{name} {group}": value for name, value in found.items()})
    return scores
