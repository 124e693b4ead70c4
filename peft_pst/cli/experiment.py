"""The demo's experiment: one encoder, the same documents and steps, dense fine-tuning beside PST."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .. import PSTCallback, PSTConfig, __version__, create_pst_optimizer
from ..model import pst_layers
from ..report import REPORT_NAME, SparsityReport, report_checkpoint, report_model
from . import reload_pruned
from .bbc_news import Document, Split
from .report import REPORT_FOLDER, write_report

BASE_MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Settings:
    """What is run. Learning rates were searched on a part of the training documents, for PST more than for dense.

    Attributes:
        target_sparsity: fraction of zeros in the pruned matrices, in [0, 1).
        seed: of head, adapter, dropout and the order of the documents; the split is always the same.
        max_steps: optimizer steps of each of the two runs.
        batch_size: documents a step.
        max_length: tokens that are read of each document, headline first.
        dense_lr: learning rate of the encoder in dense fine-tuning.
        dense_head_lr: learning rate of the new classifier beside it.
        pst_lr: learning rate of PST's weight update and scores.
        pst_head_lr: learning rate of the new classifier beside them.
    """

    target_sparsity: float = 0.9
    seed: int = 0
    max_steps: int = 120
    batch_size: int = 16
    max_length: int = 64
    dense_lr: float = 1e-4
    dense_head_lr: float = 1e-3
    pst_lr: float = 3e-3
    pst_head_lr: float = 1e-2


class Outcome(NamedTuple):
    """One training run: the model, the Trainer's log, the label given to each held-out document, and the time."""

    model: nn.Module
    log_history: list[dict[str, Any]]
    predicted: list[str]
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """The main job on one encoder and one data set.

    Attributes:
        settings: what is run.
        base: folder of the pretrained encoder.
        data: documents to train on and to hold out.
        folder: an existing folder to write results to.
    """

    settings: Settings
    base: Path
    data: Split
    folder: Path

    def run(self) -> dict[str, Any]:
        """Train twice, save, merge, reload in a new process; returns the results as plain JSON values."""
        dense = self.fine_tune_densely()
        pst = self.fine_tune_with_pst()
        report = self.merge(pst.model)
        layer = next(pst_layers(pst.model))
        mask = layer.get_mask("default")
        write_report(self.folder / REPORT_FOLDER, report, mask, layer.module_name, pst.log_history)
        reloaded = self.reload()
        truth = [document.label for document in self.data.held_out]
        return {
            "version": __version__,
            "base_model": BASE_MODEL,
            "settings": asdict(self.settings),
            "documents": {
                "train": len(self.data.train),
                "held_out": len(truth),
                "repeats_left_out": self.data.num_repeats,
            },
            "correct": {
                "dense": _count_equal(dense.predicted, truth),
                "pst": _count_equal(pst.predicted, truth),
                "reloaded": _count_equal(reloaded, truth),
            },
            "same_answers_after_reload": _count_equal(reloaded, pst.predicted),
            "total_parameters": report.total_parameters,
            "trained_parameters": {
                "dense": sum(parameter.numel() for parameter in dense.model.parameters()),
                "pst": report.trainable_parameters,
            },
            "pruned_matrices": len(report.layers),
            "weights": report.weights,
            "zeros": report.zeros,
            "bytes": {
                "checkpoint": sum(report.files.values()),
                "adapter": (self.folder / "adapter" / "adapter_model.safetensors").stat().st_size,
            },
            "seconds": {"dense": dense.seconds, "pst": pst.seconds},
        }

    # The two runs

    def fine_tune_densely(self) -> Outcome:
        """Train every weight of the encoder."""
        model = self._fresh_model()
        head = list(model.classifier.parameters())
        encoder = [p for p in model.parameters() if all(p is not other for other in head)]
        groups = [
            {"params": encoder, "lr": self.settings.dense_lr},
            {"params": head, "lr": self.settings.dense_head_lr},
        ]
        return self._fit(model, AdamW(groups, weight_decay=0.0), "1/3 dense fine-tuning", [])

    def fine_tune_with_pst(self) -> Outcome:
        """Train a PST adapter and the head, while the sparsity rises to its target; save the adapter."""
        config = PSTConfig(
            task_type="SEQ_CLS",
            target_sparsity=self.settings.target_sparsity,
            # So few steps are better spent on recovering than on waiting.
            warmup_ratio=0.0,
            cooldown_ratio=0.5,
        )
        model = get_peft_model(self._fresh_model(), config)
        optimizer = create_pst_optimizer(model, AdamW, lr=self.settings.pst_lr, head_lr=self.settings.pst_head_lr)
        title = f"2/3 PST to {100 * self.settings.target_sparsity:g} % zeros"
        outcome = self._fit(model, optimizer, title, [PSTCallback()])
        model.save_pretrained(str(self.folder / "adapter"))
        return outcome

    def _fresh_model(self) -> Any:
        set_seed(self.settings.seed)
        names = dict(enumerate(self.data.labels))
        return AutoModelForSequenceClassification.from_pretrained(
            str(self.base),
            num_labels=len(names),
            id2label=names,
            label2id={name: index for index, name in names.items()},
            dtype=torch.float32,
        )

    def _fit(self, model: nn.Module, optimizer: Optimizer, title: str, callbacks: list[TrainerCallback]) -> Outcome:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                model=model,
                args=self._training_arguments(scratch),
                train_dataset=self._examples(self.data.train),
                data_collator=DataCollatorWithPadding(self._tokenizer),
                optimizers=(optimizer, None),
                callbacks=callbacks,
            )
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(Progress(title))
            trainer.train()
            logits: Any = trainer.predict(self._examples(self.data.held_out)).predictions
        predicted = [self.data.labels[index] for index in logits.argmax(axis=1)]
        return Outcome(model, trainer.state.log_history, predicted, time.perf_counter() - started)

    def _training_arguments(self, scratch: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir=scratch,
            max_steps=self.settings.max_steps,
            per_device_train_batch_size=self.settings.batch_size,
            per_device_eval_batch_size=reload_pruned.BATCH_SIZE,
            warmup_steps=self.settings.max_steps // 20,
            lr_scheduler_type="linear",
            logging_steps=max(1, self.settings.max_steps // 40),
            seed=self.settings.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,  # what the demo promises; sums still differ in their last digits with the number of threads
            dataloader_pin_memory=False,
            disable_tqdm=False,
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(str(self.base), model_max_length=self.settings.max_length)

    def _examples(self, documents: Sequence[Document]) -> Any:
        encoded = self._tokenizer([document.text for document in documents], truncation=True)["input_ids"]
        labels = [self.data.labels.index(document.label) for document in documents]
        return [{"input_ids": ids, "labels": label} for ids, label in zip(encoded, labels, strict=True)]

    # What is left in the folder

    def merge(self, trained: nn.Module) -> SparsityReport:
        """Merge the saved adapter into a fresh base, save the pruned model, and count the zeros in its file."""
        merged = PeftModel.from_pretrained(self._fresh_model(), str(self.folder / "adapter")).merge_and_unload()
        pruned = self.folder / "pruned-model"
        merged.save_pretrained(str(pruned))
        self._tokenizer.save_pretrained(str(pruned))
        report_model(trained).save(pruned / REPORT_NAME)
        return replace(report_checkpoint(pruned), source=pruned.name)

    def reload(self) -> list[str]:
        """Label the held-out documents with the pruned model, in a new process that cannot import this package."""
        script, documents = self.folder / "reload_pruned.py", self.folder / "held_out.jsonl"
        shutil.copyfile(reload_pruned.__file__, script)
        lines = [json.dumps(document._asdict()) for document in self.data.held_out]
        documents.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, str(script), str(self.folder / "pruned-model"), str(documents)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
        return json.loads(finished.stdout)["predicted"]


def _count_equal(some: Sequence[str], others: Sequence[str]) -> int:
    return sum(one == other for one, other in zip(some, others, strict=True))


class Progress(ProgressCallback):
    """The Trainer's bar with a title, and with loss and sparsity on it instead of in lines of their own."""

    training_bar: Any
    prediction_bar: Any

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.training_bar.set_description(self.title)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix({key: f"{logs[key]:.3f}" for key in ("loss", "sparsity") if key in logs})

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_prediction_step(*args, **kwargs)
        self.prediction_bar.set_description("    held-out articles", refresh=False)
        self.prediction_bar.leave = False
