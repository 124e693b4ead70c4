"""One run from end to end: load, prepare, train, finish, count the zeros, score the plain model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments, set_seed

from peft_pst import DistillationMixin, num_pruned
from peft_pst.report import count_zeros

from .memory import PeakMemory
from .methods import METHODS
from .methods.masked import block_linears
from .methods.protocol import Goal, Prepared, Start
from .runs import Run, write_whole
from .tasks import LoadedTask, load_task
from .tasks.protocol import batch_order, num_steps

CALIBRATION_EXAMPLES = 128
EVAL_BATCH_SIZE = 64


class ResultsTrainer(Trainer):
    """A Trainer whose loss may have a further term."""

    def __init__(self, *, penalty: Callable[[], Tensor] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty
        # Many classifiers accept the number of items in a batch and do not use it.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, plus the penalty while training."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.penalty is None or not model.training:
            return found
        return (found[0] + self.penalty(), found[1]) if return_outputs else found + self.penalty()


class TaughtTrainer(DistillationMixin, ResultsTrainer):
    """The same, with a dense model to learn from."""


def execute(run: Run, data: Path | None, teachers: Path | None = None) -> dict[str, Any]:
    """Train and score one run.

    Args:
        run: what to do.
        data: folder of local data files, or None for the hub.
        teachers: folder that keeps the models which others learn from; None to keep none.

    Returns:
        JSON values: `scores` by name, and what they cost.

    Raises:
        RuntimeError: if the finished model does not have exactly the zeros that its sparsity promises.
    """
    if run.device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    teacher = None if run.teacher is None else load_teacher(run.teacher.run, data, teachers)
    task = _load(run, data)
    memory = PeakMemory(task.model, run.device)
    counter = ZeroCounter(task.model)
    prepared = _prepare(run, task)
    trained = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    _check_groups(prepared, trained)
    wall, processor = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(run, len(task.pool), scratch)
        loss = _train(run, task, prepared, arguments, teacher)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak, facts = memory.bytes(), prepared.facts()
        promised = None if prepared.promised is None else prepared.promised()
        plain = prepared.finish()
        zeros = counter.count(plain, run.sparsity, each=prepared.exact_matrices, promised=promised)
        scores = task.evaluate(plain, arguments)
    return {
        "scores": scores,
        "main_score": task.main_score,
        "highest_is_best": task.highest_is_best,
        "trained_parameters": trained,
        "steps": arguments.max_steps,
        "train_loss": loss,
        "zeros": zeros,
        "weights": counter.weights,
        "peak_memory_bytes": peak,
        "wall_seconds": wall,
        "cpu_seconds": processor,
        "facts": facts,
    }


def load_teacher(run: Run, data: Path | None, folder: Path | None) -> nn.Module:
    """The finished model of a run that stays dense: trained as that run is, and kept under its key for the next time.

    Args:
        run: the teacher's own.
        data: as in `execute`.
        folder: where models are kept; None to train anew.
    """
    task = _load(run, data)
    path = None if folder is None else folder / f"{run.key}.safetensors"
    if path is not None and path.is_file():
        load_model(task.model, path)
        return task.model
    prepared = _prepare(run, task)
    with tempfile.TemporaryDirectory() as scratch:
        _train(run, task, prepared, training_arguments(run, len(task.pool), scratch))
    plain = prepared.finish()
    if path is not None:
        write_whole(path, lambda beside: save_model(plain, str(beside)))
    return plain


def training_arguments(run: Run, pool_size: int, scratch: str) -> TrainingArguments:
    """The Trainer's options, the same for every method."""
    return TrainingArguments(
        output_dir=scratch,
        max_steps=num_steps(run, pool_size),
        per_device_train_batch_size=run.training.batch_size,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        train_sampling_strategy="sequential",  # the examples come in the order of `batch_order`
        warmup_steps=run.training.warmup_steps,
        lr_scheduler_type="linear",
        label_smoothing_factor=run.training.label_smoothing,
        bf16=run.training.precision == "bf16",
        use_cpu=run.device == "cpu",
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_pin_memory=run.device == "cuda",
        disable_tqdm=True,
    )


def _load(run: Run, data: Path | None) -> LoadedTask:
    set_seed(run.seed)
    task = load_task(run, data)
    task.model.to(run.device)
    if run.training.dropout is not None:
        _set_dropout(task.model, run.training.dropout)
    return task


def _prepare(run: Run, task: LoadedTask) -> Prepared:
    def calibration() -> Iterator[dict[str, Tensor]]:
        for index in range(min(CALIBRATION_EXAMPLES, len(task.pool))):
            batch = task.collator([task.pool[index]])
            yield {name: tensor.to(run.device) for name, tensor in batch.items()}

    head_modules = [*task.new_modules, *run.training.head_modules]
    start = Start(task.model, task.task_type, head_modules, calibration)
    method = METHODS[run.method]
    goal = Goal(
        run.sparsity,
        lr=run.rates.get("lr", 0.0),
        score_lr=run.rates.get("score_lr", 0.0),
        head_lr=run.training.head_lr,
        options={**method.defaults, **run.options},
    )
    set_seed(run.seed)
    return method.prepare(start, goal)


def _set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _check_groups(prepared: Prepared, trained: int) -> None:
    grouped = sum(parameter.numel() for group in prepared.groups for parameter in group["params"])
    if grouped != trained:
        raise RuntimeError(f"The optimizer has {grouped:,} parameters, but {trained:,} train.")


def _train(
    run: Run, task: LoadedTask, prepared: Prepared, arguments: TrainingArguments, teacher: nn.Module | None = None
) -> float:
    lengths = [len(ids) for ids in task.pool["input_ids"]] if run.training.group_by_length else None
    kind: Callable[..., Trainer] = ResultsTrainer
    if run.teacher is not None:
        assert teacher is not None  # `execute` loaded it
        kind = partial(
            TaughtTrainer, teacher=teacher, teacher_weight=run.teacher.weight, temperature=run.teacher.temperature
        )
    trainer = kind(
        penalty=prepared.penalty,
        model=prepared.model,
        args=arguments,
        train_dataset=task.pool.select(batch_order(len(task.pool), run, lengths)),
        data_collator=task.collator,
        optimizers=(AdamW(prepared.groups, weight_decay=0.0, fused=True), None),
        callbacks=prepared.callbacks,
    )
    return trainer.train().training_loss


class ZeroCounter:
    """Counts zeros of the matrices that are adapted, and holds them against what was promised.

    Args:
        model: the pretrained model; zeros that it has already are no fault of a method that keeps them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.natural = {name: count_zeros(layer.weight) for name, layer in _matrices(model).items()}
        self.sizes = {name: layer.weight.numel() for name, layer in _matrices(model).items()}
        self.weights = sum(self.sizes.values())

    def count(self, model: nn.Module, sparsity: float, *, each: bool, promised: Mapping[str, int] | None = None) -> int:
        """Zeros of all matrices of a plain model.

        Args:
            model: finished, with layers of the same names.
            sparsity: what was promised, of each matrix or of all together.
            each: which of the two.
            promised: zeros of each matrix, by name, where the sparsity does not say them.

        Raises:
            RuntimeError: if zeros are missing, or there are more than promised.
        """
        zeros = {name: count_zeros(model.get_submodule(name).weight) for name in self.sizes}  # type: ignore[arg-type]
        total = sum(zeros.values())
        if promised is not None:
            for name, found in zeros.items():
                _check_count(name, found, promised.get(name, 0), self.natural[name])
        elif each:
            for name, found in zeros.items():
                _check_count(name, found, num_pruned(self.sizes[name], sparsity), self.natural[name])
        else:
            _check_count("all matrices", total, num_pruned(self.weights, sparsity), sum(self.natural.values()))
        return total


def _matrices(model: nn.Module) -> dict[str, Any]:
    return dict(block_linears(model))


def _check_count(name: str, found: int, promised: int, natural: int) -> None:
    if not promised <= found <= promised + natural:
        raise RuntimeError(
            f"{name}: {found:,} zeros, but {promised:,} were promised (and {natural:,} were there from the start)."
        )
