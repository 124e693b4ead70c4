"""The options of `peft-pst train`: what data, what model, how to prune; the rest are `TrainingArguments`."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from ..config import PSTConfig
from ..distillation import check_settings
from .errors import UserError
from .glue import GLUE_TASKS
from .parser import OneLineParser
from .pst_options import add_pst_options
from .trainer_bounds import check_bounds

Task = Literal["seq_cls", "causal_lm"]
Problem = Literal["single_label_classification", "regression"]


@dataclass
class ModelOptions:
    """Which model to start from."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Name on the hub, or folder, of the pretrained model."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Name or folder of the tokenizer, where it is not the model's own."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the hub."})
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the frozen weights; auto keeps the one they are stored in."}
    )


@dataclass
class DataOptions:
    """What to learn: a GLUE task, local files, or a data set on the hub."""

    _argument_group_name = "data"

    task: Task = field(
        default="seq_cls",
        metadata={"help": "Classification and regression of texts (seq_cls), or language modelling (causal_lm)."},
    )
    task_name: str | None = field(
        default=None,
        metadata={
            "help": "A GLUE task; read from the hub, or from --train_file in the format of GLUE's own files. One of "
            + ", ".join(GLUE_TASKS)
            + "."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "CSV, TSV (read without quoting) or JSONL file; .txt too for causal_lm."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(
        default=None, metadata={"help": "The same for prediction; labels are used when there are any."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the text; guessed when left open."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column with the second text of a pair; guessed with --text_column left open."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column with the label; guessed when left open."})
    problem: Problem | None = field(
        default=None,
        metadata={"help": "By default regression when all labels are numbers and not all of them are whole."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens a text is cut to (128 by default), or tokens a block for causal_lm (1024)."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples or blocks only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only."})

    def __post_init__(self) -> None:
        for name in ("max_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; leave it out for no limit.")


@dataclass
class RunOptions:
    """How this command runs, beyond the Trainer's own options."""

    _argument_group_name = "pruning run"

    preset: Literal["paper", "dsee"] | None = field(
        default=None,
        metadata={
            "help": (
                "Start from the paper's whole setting, or from DSEE's, which prunes at once at half of the steps when "
                "--target_sparsity is given; the options below change it."
            )
        },
    )
    score_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the scores A, B, R, C; --learning_rate when left open."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of head and biases; --learning_rate when left open."}
    )
    best_at_target: bool = field(
        default=False,
        metadata={"help": "With --load_best_model_at_end, choose among checkpoints at the target sparsity only."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into an --output_dir that is not empty."})

    def __post_init__(self) -> None:
        for name in ("score_learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number of at least 0.")


@dataclass
class DistillationOptions:
    """A dense model to learn from beside the data."""

    _argument_group_name = "distillation"

    teacher: str | None = field(
        default=None,
        metadata={
            "help": (
                "A dense model that was fine-tuned before, to learn from while pruning: its folder or name on the hub, "
                "or the folder of a PEFT adapter."
            )
        },
    )
    teacher_weight: float = field(default=0.5, metadata={"help": "The teacher's part of the training loss, in [0, 1]."})
    temperature: float = field(
        default=2.0, metadata={"help": "Above 0; higher makes the teacher's smaller probabilities count for more."}
    )

    def __post_init__(self) -> None:
        check_settings(self.teacher_weight, self.temperature)
        for name in ("teacher_weight", "temperature"):
            value = getattr(self, name)
            if self.teacher is None and value != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value} needs a teacher; pass --teacher FOLDER_OR_NAME or leave it out.")


@dataclass
class TrainerOptions(TrainingArguments):
    """`TrainingArguments` under a heading of their own in --help."""

    _argument_group_name = "Trainer (transformers.TrainingArguments)"

    # The Trainer's own default, 5e-5, is for all weights at once; a low-rank update learns next to nothing by it.
    learning_rate: float = field(
        default=None,  # type: ignore[assignment]  # a number once the options are read
        metadata={"help": "Learning rate of the weight update; 2e-3 when left open, and 5e-4 with --preset paper."},
    )


@dataclass(frozen=True)
class TrainOptions:
    """Everything that the user asked for."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    training: TrainingArguments
    pst: PSTConfig
    distillation: DistillationOptions = field(default_factory=DistillationOptions)

    @property
    def output_dir(self) -> Path:
        """Where the adapter goes; the Trainer has a default for it."""
        return Path(str(self.training.output_dir))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each option under one spelling (dashes work too), and no default where that is nothing."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(OneLineParser, HfArgumentParser):
    """Options from dataclasses, complaints in one line."""


def parse(argv: Sequence[str]) -> TrainOptions:
    """Read the command line of `train`.

    Raises:
        UserError: for an unknown option, or a value that an option does not take.
    """
    ours: list[Any] = [ModelOptions, DataOptions, RunOptions, DistillationOptions]
    parser: Any = _Parser(
        ours,
        prog="peft-pst train",
        usage="peft-pst train --model_name_or_path MODEL --task_name sst2 --output_dir FOLDER [options]",
        description="Fine-tune and prune a model; write the adapter, its metrics and its report to --output_dir.",
        formatter_class=_Help,
    )
    destinations = add_pst_options(parser)
    # After the options that are ours, so that --help ends with the long list and does not begin with it.
    parser.dataclass_types.append(TrainerOptions)
    parser._add_dataclass_arguments(TrainerOptions)
    optimizer = parser._option_string_actions["--optim"]
    optimizer.type, optimizer.choices, optimizer.metavar = _optimizer_name, None, "NAME"
    try:
        parsed = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True, look_for_args_file=False)
    except (ImportError, OSError, ValueError) as error:  # what the Trainer's options refuse
        raise UserError(error) from error
    model, data, run, distillation, training, *namespaces, unknown = parsed
    if unknown:
        parser.refuse(unknown[0])
    if training.learning_rate is None:
        training.learning_rate = 5e-4 if run.preset == "paper" else 2e-3
    check_bounds(training)
    given = {destinations[name]: value for namespace in namespaces for name, value in vars(namespace).items()}
    return TrainOptions(model, data, run, training, _pst_config(run.preset, given), distillation)


def _optimizer_name(text: str) -> str:
    """One of the Trainer's optimizers, of which there are too many to list them all."""
    names = [str(name.value) for name in OptimizerNames]
    if text in names:
        return text
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.6) or ["adamw_torch", "adafactor", "sgd"]
    raise argparse.ArgumentTypeError(f"{text!r} is none of the {len(names)} optimizers; try {' or '.join(near)}")


def _pst_config(preset: str | None, given: dict[str, Any]) -> PSTConfig:
    start: Any = {None: PSTConfig, "paper": PSTConfig.paper, "dsee": PSTConfig.dsee}[preset]
    try:
        return start(**given)
    except ValueError as error:
        raise UserError(error) from error
