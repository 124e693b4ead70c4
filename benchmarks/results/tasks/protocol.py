"""What a task hands to a run, and the order in which its examples are seen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..runs import Run

Scores = dict[str, float]


@dataclass(frozen=True)
class LoadedTask:
    """A model and its data, checked and tokenised.

    Attributes:
        model: the pretrained model, its head new.
        task_type: as PEFT calls it.
        new_modules: names of the modules that start at random, beyond the heads that PEFT knows.
        pool: the training examples of this run, a `datasets.Dataset` in the order of the fixed shuffle.
        collator: makes batches of them.
        evaluate: scores a plain model on what the run's split says.
        main_score: the name of the score that methods are compared by.
        highest_is_best: whether more of it is better.
    """

    model: Any
    task_type: str
    new_modules: list[str]
    pool: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    evaluate: Callable[[nn.Module, TrainingArguments], Scores]
    main_score: str
    highest_is_best: bool = True


def shuffled(size: int, seed: int) -> list[int]:
    """The numbers below `size` in an order that depends on the seed alone.

    Example:
        >>> sorted(shuffled(5, seed=0))
        [0, 1, 2, 3, 4]
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def split_training(size: int, run: Run) -> tuple[list[int], list[int]]:
    """The examples that a run trains on, and those of the training set that it holds out.

    Both come from one shuffle that no seed of a run changes: the first are trained on, the last held out.

    Args:
        size: of the training set.
        run: gives `held_out` and the training's `shuffle_seed` and `train_examples`.

    Raises:
        ValueError: if nothing is left to train on.
    """
    order = shuffled(size, run.training.shuffle_seed)
    if run.held_out >= size:
        raise ValueError(f"held_out={run.held_out} leaves none of {size} examples to train on; lower it.")
    rest = size - run.held_out
    return order[:rest][: run.training.train_examples], order[rest:]


def num_steps(run: Run, pool_size: int) -> int:
    """Optimizer steps of a run that trains on `pool_size` examples."""
    if run.training.steps is not None:
        return run.training.steps
    assert run.training.epochs is not None  # the settings have one of the two
    return math.ceil(run.training.epochs * pool_size / run.training.batch_size)


def batch_order(pool_size: int, run: Run, lengths: Sequence[int] | None = None) -> list[int]:
    """Which example of the pool is seen when: a new shuffle a pass, by the run's seed and nothing else.

    The order is the same for every method, whatever random numbers it draws. Given lengths, the examples of a pass are
    sorted by them after the shuffle and cut into batches, so that little is padded, and the batches are shuffled.

    Args:
        pool_size: number of training examples.
        run: gives seed, steps and batch size.
        lengths: tokens of each example of the pool; None for an order that does not look at them.

    Returns:
        `num_steps` times `batch_size` indices into the pool.
    """
    batch_size = run.training.batch_size
    wanted = num_steps(run, pool_size) * batch_size
    generator = torch.Generator().manual_seed(run.seed)
    order: list[int] = []
    while len(order) < wanted:
        examples = torch.randperm(pool_size, generator=generator)
        if lengths is not None:
            examples = _by_length(examples, torch.tensor(lengths), batch_size, generator)
        order += examples.tolist()
    return order[:wanted]


def _by_length(examples: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Examples of like length next to each other, batch by batch; what fills no batch comes last."""
    batches = examples[lengths[examples].argsort(stable=True)].split(batch_size)
    full = [batch for batch in batches if len(batch) == batch_size]
    shuffled_batches = [full[index] for index in torch.randperm(len(full), generator=generator).tolist()]
    return torch.cat([*shuffled_batches, *batches[len(full) :]])


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of what the files hold."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:12]
