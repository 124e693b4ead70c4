"""The dense model that a run learns from: loaded as the base is, and held against it before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.tokenization_auto import TOKENIZER_CONFIG_FILE

from ..distillation import check_teacher
from .base import Base, load_tokenizer, max_positions, settle_pad_token
from .console import quiet_transformers
from .errors import UserError, said_in_one_line
from .labels import Labels
from .loading import is_adapter, is_missing_folder, load_adapted_model, read_adapter_config
from .options import TrainOptions


def load_teacher(options: TrainOptions, base: Base, labels: Labels | None, length: int) -> nn.Module | None:
    """Load the model that `--teacher` names, plain or adapted.

    Args:
        options: the teacher's name; its weights get the dtype of the base's.
        base: what is going to be pruned, without an adapter.
        labels: what a classifier predicts; None for language modelling.
        length: tokens that texts are cut to.

    Returns:
        The teacher in evaluation mode, or None where none is named.

    Raises:
        UserError: if it cannot be loaded, has no trained head, reads other tokens or fewer, or predicts something else.
    """
    name = options.distillation.teacher
    if name is None:
        return None
    if is_missing_folder(name):
        raise UserError(f"--teacher {name} is not a folder.")
    _check_tokens(name, base)
    load = _load_adapted if is_adapter(name) else _load_plain
    teacher: Any = load(name, options.model.model_dtype, is_classifier=labels is not None)
    limit = max_positions(teacher.config, base.tokenizer)
    if limit is not None and length > limit:
        raise UserError(f"--teacher {name} can read {limit} tokens only; pass --max_length {limit} or less.")
    settle_pad_token(name, teacher, base.tokenizer)
    try:
        check_teacher(base.model, teacher)
    except ValueError as error:
        raise UserError(f"--teacher {name}: {error}") from error
    return teacher.eval()


def _check_tokens(name: str, base: Base) -> None:
    """Refuse a teacher to which the ids of the base's tokens mean something else."""
    source = name
    if is_adapter(name) and not (Path(name) / TOKENIZER_CONFIG_FILE).is_file():
        source = read_adapter_config(name, any_method=True).base_model_name_or_path or name
    theirs = load_tokenizer(source).get_vocab()
    for token, index in base.tokenizer.get_vocab().items():
        found = theirs.get(token)
        if found != index:
            raise UserError(
                f"--teacher {name} reads other tokens: {token!r} is {index} to the model and "
                f"{'unknown' if found is None else found} to the teacher; pass one with the same tokenizer."
            )


def _load_adapted(name: str, dtype: str, *, is_classifier: bool) -> nn.Module:
    """An adapter on its base, of the class that it was trained on, and with the labels that this package saved."""
    model: Any = load_adapted_model(name, dtype=dtype, any_method=True)
    labels = Labels.load(name) if is_classifier else None
    if labels is not None and labels.num_labels == model.config.num_labels:
        labels.apply(model.config)
    return model


def _load_plain(name: str, dtype: str, *, is_classifier: bool) -> nn.Module:
    auto_class: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    with said_in_one_line(f"teacher {name!r} could not be loaded"), quiet_transformers():
        model, info = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(
            f"--teacher {name} holds no {', '.join(sorted(info['missing_keys']))}; "
            f"pass a model that was fine-tuned as {type(model).__name__}."
        )
    return model
