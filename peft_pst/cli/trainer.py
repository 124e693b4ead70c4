"""The Trainer with what PST adds to it: the schedule, its own learning rates, labels and card beside the adapter."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..callback import PSTCallback
from ..distillation import DistillationMixin
from ..optimizer import create_pst_optimizer
from .errors import UserError
from .labels import Labels
from .model_card import write_model_card
from .options import DistillationOptions, RunOptions


class PSTTrainer(Trainer):
    """A `Trainer` for a model with a PST adapter.

    Args:
        run: learning rates of scores and head, and how the best checkpoint is chosen.
        labels: what a classifier predicts, saved with every checkpoint; None for language modelling.
        **kwargs: as for `Trainer`.
    """

    def __init__(self, *, run: RunOptions, labels: Labels | None, **kwargs: Any) -> None:
        self.run_options = run
        self.labels = labels
        callback = PSTCallback(best_at_target=run.best_at_target)
        super().__init__(callbacks=[callback], **kwargs)
        if labels:
            # Many classifiers accept the number of items in a batch and do not use it. The Trainer takes them by their
            # word, and their loss and gradients would grow with accumulation steps and processes.
            self.model_accepts_loss_kwargs = False
        # The Trainer calls its reporting integrations first, but they are to see the sparsity that ours logs. The first
        # of all decides at which steps to log and to save, which ours has to know.
        callbacks = self.callback_handler.callbacks
        callbacks.insert(1, callbacks.pop(callbacks.index(callback)))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer that `--optim` names, over PST's parameter groups."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if _takes_groups(optimizer_class, kwargs):
                kwargs.pop("lr", None)
                self.optimizer = create_pst_optimizer(
                    trained,
                    optimizer_class,
                    lr=self.args.learning_rate,
                    score_lr=self.run_options.score_learning_rate,
                    head_lr=self.run_options.head_learning_rate,
                    weight_decay=self.args.weight_decay,
                    **kwargs,
                )
            elif self.run_options.score_learning_rate is not None or self.run_options.head_learning_rate is not None:
                name = OptimizerNames(self.args.optim).value
                raise UserError(
                    f"--optim {name} groups the parameters itself, so --score_learning_rate and --head_learning_rate "
                    "cannot be kept; leave them out or choose another optimizer."
                )
        return super().create_optimizer(model)

    def check_optimizer(self) -> None:
        """Make the optimizer and the schedule of its learning rate once, before anything depends on them.

        Raises:
            UserError: if one of them cannot be made, be it for a missing package or for what its options say.
        """
        try:
            self.create_optimizer_and_scheduler(num_training_steps=1)
        except (ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
            optimizer, schedule = (
                OptimizerNames(self.args.optim).value,
                SchedulerType(self.args.lr_scheduler_type).value,
            )
            raise UserError(
                f"--optim {optimizer} with --lr_scheduler_type {schedule} and the options of both: {error}"
            ) from error
        self.optimizer = self.lr_scheduler = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, the tokenizer, the labels, and the Trainer's options as JSON."""
        super().save_model(output_dir, _internal_call)
        folder = Path(str(output_dir or self.args.output_dir))
        if not self.args.should_save:
            return
        # The Trainer pickles its options, which nothing reads and no one should have to trust.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        if self.labels:
            self.labels.save(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card that says how to load the adapter; the Trainer calls this when it pushes to the hub."""
        if self.is_world_process_zero():
            model, folder = self.accelerator.unwrap_model(self.model), Path(str(self.args.output_dir))
            write_model_card(model, folder, self.labels, self.further_settings())

    def further_settings(self) -> dict[str, object]:
        """What the card says of this run's settings beside the adapter's."""
        return {}


class DistillingPSTTrainer(DistillationMixin, PSTTrainer):
    """A `PSTTrainer` that also learns from a dense model.

    Args:
        distillation: how much, and the name of the teacher.
        **kwargs: as for `PSTTrainer`, and the `teacher` itself.
    """

    def __init__(self, *, distillation: DistillationOptions, **kwargs: Any) -> None:
        self.distillation = distillation
        super().__init__(teacher_weight=distillation.teacher_weight, temperature=distillation.temperature, **kwargs)

    def further_settings(self) -> dict[str, object]:
        """The teacher, its part of the loss, and the temperature."""
        return vars(self.distillation)


def _takes_groups(optimizer_class: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an optimizer is a plain class over parameter groups; GaLore, LOMO and Muon choose for themselves."""
    chooses = {"params", "model", "optimizer_dict"} & kwargs.keys()
    return inspect.isclass(optimizer_class) and issubclass(optimizer_class, Optimizer) and not chooses
