"""`PSTCallback`: drives the schedule in a `Trainer`. A thin wrapper over `update_sparsity`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .model import active_adapters, get_sparsity, update_sparsity
from .plan import LayerPlan
from .reference import complete_reference
from .sharding import whole


class PSTCallback(TrainerCallback):
    """Raise the sparsity along the schedule while a `Trainer` trains, and log it.

    The length of the schedule is the configuration's `total_steps`, or, when that is None, the Trainer's number of
    optimizer steps. Steps are finished optimizer steps, so gradient accumulation needs no care, and a run resumed
    from a checkpoint goes on at the sparsity it would have had. The sparsity is added to the Trainer's logs.

    Args:
        best_at_target: let `load_best_model_at_end` choose among checkpoints at the target sparsity only. Dense
            checkpoints nearly always score higher, so without it the best model may be one that is hardly pruned.

    Raises:
        ValueError: when training starts and the model has no active PST adapter, and at the next step that logs or
            saves, before it is saved, if a trained parameter is NaN or infinite.

    Example:
        >>> from transformers import TrainingArguments
        >>> callback = PSTCallback(best_at_target=True)  # Trainer(model, args, ..., callbacks=[callback]).train()
    """

    def __init__(self, best_at_target: bool = False) -> None:
        self.best_at_target = best_at_target

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.fsdp and (args.fsdp_plugin_args or {}).get("cpu_ram_efficient_loading"):
            raise ValueError(
                "fsdp_config['cpu_ram_efficient_loading']=True hands out parameters only, but the number of zeros of a "
                "PST adapter is a buffer, over which accelerate stumbles; set it to False."
            )
        complete_reference(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        for plan in _plans(model):
            _settle_length(plan, state.max_steps)
        before = get_sparsity(model)
        after = update_sparsity(model, state.global_step)
        if after < before:
            warnings.warn(
                f"The schedule starts anew at step {state.global_step}: sparsity falls from {before:.4f} to "
                f"{after:.4f}. To go on from a pruned adapter, set initial_sparsity={before:.4f} in its configuration, "
                "and total_steps to None, if the new run's length is to count.",
                stacklevel=2,
            )
        self._forget_best_below_target(state, model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        update_sparsity(kwargs["model"], state.global_step)
        self._forget_best_below_target(state, kwargs["model"])
        if control.should_save or control.should_log:  # when the Trainer waits for the device anyway
            _check_finite(kwargs["model"], state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        sparsity = round(get_sparsity(kwargs["model"]), 6)
        if logs is not None:
            logs["sparsity"] = sparsity
        if state.log_history:
            # The Trainer copies the logs into its history before any callback sees them.
            state.log_history[-1]["sparsity"] = sparsity

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Called before the Trainer compares the new metric with the best one.
        self._forget_best_below_target(state, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._forget_best_below_target(state, kwargs["model"])

    def _forget_best_below_target(self, state: TrainerState, model: nn.Module) -> None:
        if not self.best_at_target or state.best_global_step is None:
            return
        if any(state.best_global_step < _first_step_at_target(plan) for plan in _plans(model)):
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None


def _plans(model: nn.Module) -> list[LayerPlan]:
    """One plan for each active adapter; what is read from it here is the same for all of its layers."""
    return list({name: layer.pst_plans[name] for layer, name in active_adapters(model)}.values())


def _check_finite(model: nn.Module, step: int) -> None:
    """Keep what diverged out of the checkpoints, of which only the last few may be kept."""
    trained = {name: whole(p).detach() for name, p in model.named_parameters() if p.requires_grad}
    are_finite = torch.stack(
        [torch.isfinite(tensor).all() for tensor in trained.values()]
    ).tolist()  # one wait, not many
    broken = [name for name, is_finite in zip(trained, are_finite, strict=True) if not is_finite]
    if broken:
        raise ValueError(
            f"After step {step}, {len(broken)} of {len(trained)} trained tensors hold a NaN or an infinity, the first "
            f"being {broken[0]}. No checkpoint was written for this step; go on from the one before with a lower "
            "learning rate, or look for bad examples in the data."
        )


def _first_step_at_target(plan: LayerPlan) -> float:
    assert plan.config.total_steps is not None  # settled when training began
    return (1 - plan.config.cooldown_ratio) * plan.config.total_steps


def _settle_length(plan: LayerPlan, max_steps: int) -> None:
    if plan.config.total_steps is None or plan.status.length_from_trainer:
        plan.config.total_steps = max_steps
        plan.status.length_from_trainer = True
    if max_steps < _first_step_at_target(plan):
        warnings.warn(
            f"Training ends after {max_steps} steps, before the schedule of total_steps={plan.config.total_steps} "
            f"reaches target_sparsity={plan.config.target_sparsity}. To take the Trainer's length, set total_steps to "
            "None in the adapter's configuration; a saved adapter has the length it was trained with.",
            stacklevel=3,
        )
