"""GLUE: the command line's own reading of data, labels and metrics, with a training set cut for the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from peft_pst import PSTConfig
from peft_pst.cli.classification import prepare_classification
from peft_pst.cli.options import DataOptions, ModelOptions, RunOptions, TrainOptions

from ..models import model_path
from ..runs import Run
from .protocol import LoadedTask, Scores, split_training

TASKS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "stsb": "STS-B",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}


def task_files(task: str, data: Path, *, with_validation: bool) -> list[Path]:
    """`train.tsv`, and the file to validate on, of a task of GLUE.

    Args:
        task: name of the task.
        data: a folder that holds them itself, or in `SST-2`, or in `glue/SST-2`.
        with_validation: whether the second is wanted.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks the second file.
    """
    candidates = [data / "glue" / TASKS[task], data / TASKS[task], data]
    folder = next((folder for folder in candidates if (folder / "train.tsv").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{data} has no {TASKS[task]}/train.tsv; pass --data FOLDER.")
    validation = folder / ("dev_matched.tsv" if task == "mnli" else "dev.tsv")
    if with_validation and not validation.is_file():
        raise FileNotFoundError(f"{validation} is missing; it is what {task} is scored on.")
    return [folder / "train.tsv", *([validation] if with_validation else [])]


def load(run: Run, data: Path | None) -> LoadedTask:
    """Read one task of GLUE and a model with a head for it. A search does not open the validation file."""
    searching = run.split == "held_out"
    files: list[str | None] = [None, None]
    if data is not None:
        files = [str(path) for path in task_files(run.task, data, with_validation=not searching)] + [None]
    job = prepare_classification(
        TrainOptions(
            ModelOptions(model_path(run.model)),
            DataOptions(
                task_name=run.task,
                train_file=files[0],
                validation_file=files[1],
                max_length=run.training.max_length,
            ),
            RunOptions(),
            TrainingArguments(report_to="none"),
            PSTConfig(),
        )
    )
    pool, held_out = split_training(len(job.train), run)
    scored = job.train.select(held_out) if searching else job.validation

    def evaluate(model: nn.Module, arguments: TrainingArguments) -> Scores:
        trainer: Any = Trainer(
            model=model, args=arguments, data_collator=job.collator, compute_metrics=job.compute_metrics
        )
        metrics = trainer.evaluate(scored)
        return {name: metrics[f"eval_{name}"] for name in job.metric_names}

    return LoadedTask(
        job.base.model,
        "SEQ_CLS",
        job.base.new_modules,
        job.train.select(pool),
        job.collator,
        evaluate,
        main_score=job.metric_names[0],
    )
