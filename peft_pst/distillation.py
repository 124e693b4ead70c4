"""Distillation from a dense model while pruning: the loss, and the `Trainer` that adds it to its own.

Source: Hinton et al. 2015 (arXiv 1503.02531); with pruning, Sanh et al. 2020 (movement pruning, arXiv 2005.07683).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_IGNORED = -100  # the label of what no loss of transformers counts
if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin is put before
else:
    _Trainer = object


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    keep: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """How far the student's predictions are from the teacher's, averaged over the predictions that count:

        T^2 * KL(softmax(teacher / T) || softmax(student / T))

    The factor T^2 keeps the gradient's size when T changes, so that a weight in a sum of losses keeps its meaning.

    Args:
        student_logits: (..., classes), any floating dtype; computed in float32.
        teacher_logits: the same shape. No gradient flows into them.
        temperature: above 0; higher makes the smaller probabilities count for more.
        keep: (...), True where a prediction counts; None for all. Elsewhere even a NaN does no harm.
        num_items: what the sum is divided by; None for the number of predictions that count. A Trainer that
            accumulates gradients gives the number in all of its micro-batches.

    Returns:
        A scalar in float32, at least 0; NaN, as the mean of nothing, if no prediction counts and `num_items` is None.

    Raises:
        ValueError: if the shapes differ or the temperature is not a finite number above 0.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0], [5.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> distillation_loss(student, teacher, temperature=2.0, keep=torch.tensor([True, False]))
        tensor(0.4438)
        >>> p = torch.tensor([1.0, math.e]) / (1 + math.e)
        >>> 4 * (p * (p / 0.5).log()).sum()
        tensor(0.4438)
    """
    _check_temperature(temperature)
    _check_shapes(student_logits, teacher_logits)
    student, teacher = _counted(student_logits, keep), _counted(teacher_logits.detach(), keep)
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    count = student.shape[:-1].numel() if num_items is None else num_items
    return temperature**2 * divergence / count


class DistillationMixin(_Trainer):
    """Distillation for subclasses of `Trainer` whose `compute_loss` returns the logits that its loss was made of.

    Put it first: `class SparseTrainer(DistillationMixin, MyTrainer): ...`. See `DistillationTrainer` for what it does
    and for its arguments; all others go to the trainer behind it. Where that trainer makes the logits anew without a
    gradient, as TRL's `SFTTrainer` does, the first step ends in a `ValueError`: nothing would be learned from them.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module, teacher_weight: float = 0.5, temperature: float = 2.0, **kwargs: Any
    ) -> None:
        check_settings(teacher_weight, temperature)
        super().__init__(*args, **kwargs)
        student: Any = self.accelerator.unwrap_model(self.model)
        check_teacher(student, teacher)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Distillation does not run under torch.nn.DataParallel, which the Trainer takes for {self.args.n_gpu} "
                "GPUs in one process; start it with torchrun or accelerate launch, or show it one GPU."
            )
        self.teacher_weight, self.teacher_temperature = teacher_weight, temperature
        self.teacher = _placed(teacher, self.args.device).eval()
        self._labels_are_shifted = predicts_next_token(student)
        if not self._labels_are_shifted:
            # Most other models accept the number of items in a batch and do not use it. The Trainer takes them by their
            # word, and their own loss, but not the teacher's, would grow with the accumulation steps.
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own loss; while training, mixed with the distance to the teacher."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None:
            raise ValueError(f"Distillation needs 'labels' in the inputs, to know what counts; got {sorted(inputs)}.")
        asked = dict(inputs)  # label smoothing takes the labels out
        own, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        distance = self._distance(model, asked, outputs, num_items_in_batch)
        loss = (1 - self.teacher_weight) * own + self.teacher_weight * distance
        return (loss, outputs) if return_outputs else loss

    def _distance(
        self, model: nn.Module, inputs: dict[str, Any], outputs: Any, num_items: Tensor | int | None
    ) -> Tensor:
        """The teacher's loss, divided and scaled as the Trainer's own."""
        student_logits = _logits(outputs)
        if not student_logits.requires_grad:
            raise ValueError(
                f"{type(self).__name__} computes the model's logits without a gradient, so nothing can be learned from "
                "the teacher; use DistillationTrainer."
            )
        teacher_logits = self._ask_teacher(inputs).to(student_logits.device)
        _check_shapes(student_logits, teacher_logits)
        config = getattr(self.accelerator.unwrap_model(model), "config", None)
        problem = getattr(config, "problem_type", None)
        if problem == "regression" or student_logits.shape[-1] == 1:
            distance = _squared_distance(student_logits, teacher_logits, num_items)
        elif problem == "multi_label_classification":
            # Each label is a choice between the logits 0 and z.
            student_pairs, teacher_pairs = (F.pad(z[..., None], (1, 0)) for z in (student_logits, teacher_logits))
            distance = distillation_loss(student_pairs, teacher_pairs, self.teacher_temperature, num_items=num_items)
        else:
            keep = _kept(inputs, student_logits, shifted=self._labels_are_shifted)
            distance = distillation_loss(student_logits, teacher_logits, self.teacher_temperature, keep, num_items)
        return distance * self._scale_across_devices(num_items)

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any]) -> Tensor:
        config = getattr(self.teacher, "config", None)
        if not getattr(config, "is_encoder_decoder", False):  # where the decoder may read the labels
            inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        with self.accelerator.autocast():
            return _logits(self.teacher(**inputs))

    def _scale_across_devices(self, num_items: Tensor | int | None) -> int:
        """What `Trainer.compute_loss` multiplies its own loss by: the gradients of all processes are averaged later."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()


class DistillationTrainer(DistillationMixin, Trainer):
    """A `Trainer` whose model also learns from a dense model that was fine-tuned before. While training, the loss is

        (1 - teacher_weight) * own loss + teacher_weight * distillation_loss(student, teacher, temperature)

    The own loss is what the Trainer computes, label smoothing included. For language models the teacher is heard where
    there is a label (not -100), for regression the distance is the mean squared error, and for several labels at once
    each one is a choice of its own. The logged training loss is the mixture; evaluation reports the own loss.

    The teacher lies beside the model on the same device, in full in every process, and is not saved with checkpoints.

    Args:
        *args, **kwargs: as for `Trainer`.
        teacher: the dense model, plain or adapted, with the same labels or vocabulary, and reading the same inputs. It
            must be loaded by itself: adapters of PEFT are put into the model they are given.
        teacher_weight: the teacher's part of the loss, in [0, 1].
        temperature: of `distillation_loss`, above 0.

    Raises:
        ValueError: for a number out of its range, a teacher that gives other outputs than the model or shares
            parameters with it, or torch.nn.DataParallel.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(config), PSTConfig(task_type="SEQ_CLS"))
        >>> teacher = BertForSequenceClassification(config)  # fine-tuned before with the same data
        >>> args = TrainingArguments(report_to="none", use_cpu=True)
        >>> trainer = DistillationTrainer(model, args, teacher=teacher)  # and data, callbacks=[PSTCallback()]
    """


def check_settings(teacher_weight: float, temperature: float) -> None:
    """Refuse a weight outside [0, 1] or a temperature that is not a finite number above 0.

    Raises:
        ValueError: naming the value and its bounds.
    """
    if not 0 <= teacher_weight <= 1:
        raise ValueError(f"teacher_weight={teacher_weight} is outside [0, 1]; 0.5 gives the teacher half of the loss.")
    _check_temperature(temperature)


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that the student cannot learn from.

    Raises:
        ValueError: if the two share parameters, give different outputs, or name their labels in different orders.
    """
    if not set(student.parameters()).isdisjoint(teacher.parameters()):
        raise ValueError(
            "The teacher is the model that trains, or shares parameters with it; load it from its checkpoint by itself "
            "(PEFT puts adapters into the very model that they are given)."
        )
    taught, learned = _describe_outputs(teacher), _describe_outputs(student)
    if taught and learned and taught != learned:
        raise ValueError(f"The teacher gives {taught} and the model {learned}; pass a teacher that gives the same.")
    taught_names, learned_names = _label_names(teacher), _label_names(student)
    if taught_names != learned_names and sorted(taught_names) == sorted(learned_names):
        raise ValueError(
            f"The teacher orders the labels {taught_names} and the model {learned_names}; make them equal."
        )


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a model's loss compares the logits at each position with the label of the next.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> predicts_next_token(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)))
        True
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    by_class = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return by_class or LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a finite number above 0; 1 leaves the logits as they are.")


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"The teacher's logits are {tuple(teacher_logits.shape)} and the model's {tuple(student_logits.shape)}; "
            "pass a teacher with the same labels or vocabulary."
        )


def _describe_outputs(model: Any) -> str | None:
    """What a transformers model predicts, to be compared and read; None for other modules."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embeddings is not None:
        return f"logits of a vocabulary of {embeddings.weight.shape[0]}"
    return f"num_labels={config.num_labels}"


def _label_names(model: Any) -> list[str]:
    """Labels in the order of the logits, in lower case; transformers' LABEL_0, LABEL_1, ... where no one named them."""
    id2label: dict[Any, Any] = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(id2label[index]).lower() for index in sorted(id2label)]


def _placed(teacher: nn.Module, device: torch.device) -> nn.Module:
    """On the device, unless it was spread over several or quantised, which does not move."""
    fixed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
    return teacher if fixed else teacher.to(device)


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise ValueError(
            f"Distillation needs models that return 'logits', but {type(outputs).__name__} has none; leave out "
            "use_liger_kernel and return_dict=False."
        )
    return logits


def _kept(inputs: dict[str, Any], logits: Tensor, *, shifted: bool) -> Tensor:
    """True where the own loss compares the logits with a label; the shape of the logits without the classes."""
    labels = inputs["labels"]
    if shifted:
        given = inputs.get("shift_labels")
        labels = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:] if given is None else given
    return (labels != _IGNORED).reshape(logits.shape[:-1]).to(logits.device)


def _counted(logits: Tensor, keep: Tensor | None) -> Tensor:
    return logits if keep is None else logits[keep]


def _squared_distance(student: Tensor, teacher: Tensor, num_items: Tensor | int | None) -> Tensor:
    total = F.mse_loss(student.float(), teacher.float(), reduction="sum")
    return total / (student.numel() if num_items is None else num_items)
