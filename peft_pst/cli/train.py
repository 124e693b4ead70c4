"""`peft-pst train`: fine-tune and prune a model, and write the adapter with its metrics and its report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import is_liger_kernel_available

from ..model import pst_layers
from ..report import SparsityReport, report_model
from ..resuming import last_whole_checkpoint
from .adapter import add_adapter
from .classification import prepare_classification
from .console import plain_warnings, say
from .data import check_source
from .errors import UserError, require
from .hub import check_hub, hub_errors
from .job import Job
from .labels import Labels
from .language import prepare_language_modelling
from .metrics import perplexity, predicted
from .options import DistillationOptions, TrainOptions, parse
from .replace import check_writable, no_folder_left_on_error
from .report import REPORT_FOLDER, print_text, write_report
from .trainer import DistillingPSTTrainer, PSTTrainer

PREDICTIONS_NAME = "test_predictions.tsv"


def run(argv: list[str]) -> None:
    """Train as the command line says; see `peft-pst train --help`.

    Raises:
        UserError: for a mistake in the input, before anything is trained or written.
    """
    with plain_warnings():
        _run(parse(argv))


def _run(options: TrainOptions) -> None:
    for module in ("datasets", "sklearn.metrics", "scipy.stats", "matplotlib"):
        require(module, "cli")
    if options.training.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel true needs liger-kernel 0.3 or later; run: pip install liger-kernel")
    checkpoint = _check_output(options)
    check_hub(options.training)
    check_source(options.data)
    options.pst.task_type = "SEQ_CLS" if options.data.task == "seq_cls" else "CAUSAL_LM"
    options.pst.revision = options.model.model_revision  # or merging would take another revision of the base
    prepare = prepare_classification if options.data.task == "seq_cls" else prepare_language_modelling
    job = prepare(options)
    _check_evaluation(options, job)
    model = add_adapter(job.base, options.pst)
    trainer = _make_trainer(model, job, options)
    say(*_introduction(model, job, options))
    if options.run.overwrite and not checkpoint and trainer.is_world_process_zero():
        _remove_old_checkpoints(options.output_dir)
    _train(trainer, job, checkpoint)
    _evaluate(trainer, job)
    _predict(trainer, job, options.output_dir)
    trainer.create_model_card()
    report = _write_report(trainer, options.output_dir)
    if trainer.is_world_process_zero():
        print_text("\n" + report.to_table())
        say("", *_farewell(options.output_dir))
    if options.training.push_to_hub:
        folder = options.output_dir
        with hub_errors(
            f"the adapter is in {folder}, but could not be pushed", f"push it with `hf upload NAME {folder}`"
        ):
            trainer.push_to_hub(commit_message="End of training")


# Before training


def _check_output(options: TrainOptions) -> str | None:
    """The checkpoint to resume from, if any; refuses to write over anything that is not said to be overwritten."""
    folder = options.output_dir
    check_writable(folder, "output_dir")
    resume = options.training.resume_from_checkpoint
    if resume is not None:
        return _find_checkpoint(folder, resume)
    if folder.is_dir() and any(folder.iterdir()) and not options.run.overwrite:
        raise UserError(
            f"--output_dir {folder} is not empty; pass another folder, --overwrite to write into it, or "
            "--resume_from_checkpoint true to go on with the run in it."
        )
    return None


def _find_checkpoint(folder: Path, resume: str) -> str | None:
    if resume.lower() in ("false", "no"):
        return None
    if resume.lower() in ("true", "yes", "last"):
        last = last_whole_checkpoint(folder)
        if last is None:
            raise UserError(
                f"--resume_from_checkpoint {resume}: {folder} holds no whole checkpoint; leave the option out."
            )
        return last
    for name in (CONFIG_NAME, TRAINER_STATE_NAME):
        if not (Path(resume) / name).is_file():
            raise UserError(f"--resume_from_checkpoint {resume} is not a checkpoint of an adapter: it has no {name}.")
    return resume


def _check_evaluation(options: TrainOptions, job: Job) -> None:
    strategy = IntervalStrategy(options.training.eval_strategy)
    if strategy is not IntervalStrategy.NO and job.validation is None:
        raise UserError(
            f"--eval_strategy {strategy.value} needs data to evaluate on; pass --validation_file or a data set with a "
            "split 'validation'."
        )
    metric = options.training.metric_for_best_model
    names = ["loss", *job.metric_names]
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise UserError(f"--metric_for_best_model {metric} is none of what evaluation reports: {', '.join(names)}.")


def _make_trainer(model: PeftModel, job: Job, options: TrainOptions) -> PSTTrainer:
    if job.labels is None:
        options.training.prediction_loss_only = True  # the logits of a vocabulary would fill the memory
    if options.training.device.type == "cpu":
        options.training.dataloader_pin_memory = False  # torch would warn at every evaluation
    trainer_class: type[PSTTrainer] = PSTTrainer
    further: dict[str, Any] = {}
    if job.teacher is not None:
        trainer_class, further = DistillingPSTTrainer, {"teacher": job.teacher, "distillation": options.distillation}
    try:
        with no_folder_left_on_error(options.output_dir):  # the Trainer makes it at once
            trainer = trainer_class(
                run=options.run,
                labels=job.labels,
                model=model,
                args=options.training,
                train_dataset=job.train,
                eval_dataset=job.validation,
                data_collator=job.collator,
                processing_class=job.base.tokenizer,
                compute_metrics=job.compute_metrics,
                **further,
            )
            trainer.check_optimizer()
            return trainer
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(error) from error


def _introduction(model: PeftModel, job: Job, options: TrainOptions) -> list[str]:
    trainable, total = model.get_nb_trainable_parameters()
    config = options.pst
    return [
        f"Model     {options.model.model_name_or_path}, {total - trainable:,} parameters",
        *job.facts,
        f"Adapter   {sum(1 for _ in pst_layers(model))} matrices, {trainable:,} parameters train",
        f"Sparsity  from {config.initial_sparsity:g} to {config.target_sparsity:g}"
        + (" (others by sparsity_pattern)" if config.sparsity_pattern else ""),
        *_teaching(options.distillation),
        "",
    ]


def _teaching(options: DistillationOptions) -> list[str]:
    if options.teacher is None:
        return []
    weight, temperature = f"{options.teacher_weight:.4g}", f"{options.temperature:g}"
    return [f"Teacher   {options.teacher}, {weight} of the loss at temperature {temperature}"]


def _remove_old_checkpoints(folder: Path) -> None:
    """Those of the run that is overwritten; --resume_from_checkpoint must never take them for ours."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


# Training and after


def _train(trainer: PSTTrainer, job: Job, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model(_internal_call=True)  # without a push, which comes when the report is there too
    trainer.save_state()
    _record(trainer, "train", {**metrics, "train_samples": len(job.train)})


def _evaluate(trainer: PSTTrainer, job: Job) -> None:
    if job.validation is None:
        return
    metrics = trainer.evaluate()
    if job.labels is None:
        metrics["eval_perplexity"] = perplexity(metrics["eval_loss"])
    _record(trainer, "eval", {**metrics, "eval_samples": len(job.validation)})


def _predict(trainer: PSTTrainer, job: Job, folder: Path) -> None:
    if job.test is None:
        return
    assert job.labels is not None  # there is no test split for language modelling
    output = trainer.predict(job.test)
    if output.label_ids is not None:
        _record(trainer, "test", {**(output.metrics or {}), "test_samples": len(job.test)})
    if trainer.is_world_process_zero():
        _write_predictions(folder / PREDICTIONS_NAME, predicted(output.predictions), job.labels)


def _record(trainer: PSTTrainer, split: str, metrics: dict[str, Any]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def _write_predictions(path: Path, predictions: np.ndarray, labels: Labels) -> None:
    """A table as GLUE takes them: the number of the row, from 0, and the label or the number."""
    rows = (labels.names[value] if labels.names else f"{value:.4f}" for value in predictions)
    lines = ["index\tprediction", *(f"{index}\t{row}" for index, row in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_report(trainer: PSTTrainer, adapter: Path) -> SparsityReport:
    """The same files that `peft-pst report` writes, from the model in memory."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    first = next(pst_layers(model))
    report, mask = report_model(model), first.get_mask("default")  # on all processes, which hold a shard each
    if trainer.is_world_process_zero():
        files = {name: (adapter / name).stat().st_size for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)}
        report = replace(report, source=str(adapter), files=files)
        write_report(adapter / REPORT_FOLDER, report, mask, first.module_name, trainer.state.log_history)
    return report


def _farewell(folder: Path) -> Sequence[str]:
    return (
        f"In {folder}: the adapter, README.md with the lines that load it, all_results.json, and {REPORT_FOLDER}/ with "
        "report.json and pictures.",
        f"For a plain checkpoint: peft-pst merge {folder} {folder}-merged",
    )
