"""The pretrained model that training starts from, its tokenizer, and the modules that it does not bring itself."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .console import quiet_transformers
from .errors import UserError, said_in_one_line
from .labels import Labels
from .loading import is_missing_folder
from .options import ModelOptions

# PEFT trains and saves modules of these names of its own accord when task_type is SEQ_CLS.
_HEADS_OF_PEFT = ("classifier", "score")


class Base(NamedTuple):
    """A base model, ready for an adapter.

    Attributes:
        model: the model, its labels set.
        tokenizer: with a pad token.
        new_modules: names of the modules that start at random, and so must be trained and saved in full, beyond those
            that PEFT takes care of.
        max_positions: tokens that the model can read.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: list[str]
    max_positions: int | None


def load_base(options: ModelOptions, labels: Labels | None) -> Base:
    """Load the base for classification or regression with these labels, or for language modelling with None.

    Raises:
        UserError: if the model or its tokenizer cannot be loaded, lacks tensors of its blocks, or cannot pad.
    """
    name = options.model_name_or_path
    if is_missing_folder(name):
        raise UserError(f"--model_name_or_path {name} is not a folder.")
    auto_class: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    with said_in_one_line(f"model {name!r} could not be loaded"):
        config = AutoConfig.from_pretrained(name, revision=_revision(options))
    tokenizer = load_tokenizer(options.tokenizer_name or name, _revision(options))
    with said_in_one_line(f"model {name!r} could not be loaded"), quiet_transformers():
        if labels is not None:
            labels.apply(config)
        model, info = auto_class.from_pretrained(
            name,
            config=config,
            revision=_revision(options),
            dtype=options.model_dtype,
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
    # A list of names, or of (name, stored shape, expected shape).
    misfits = {item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]}
    new_modules = _new_modules(name, model, set(info["missing_keys"]) | misfits)
    if labels is not None:
        new_modules = [module for module in new_modules if not module.endswith(_HEADS_OF_PEFT)]
    settle_pad_token(name, model, tokenizer)
    return Base(model, tokenizer, new_modules, max_positions(model.config, tokenizer))


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises:
        UserError: if there is none. Where its files are missing, transformers makes one that knows no words.
    """
    with said_in_one_line(f"the tokenizer of {name!r} could not be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"{name!r} has no tokenizer files; save the tokenizer beside the model.")
    return tokenizer


def settle_length(asked: int | None, default: int, base: Base) -> int:
    """The number of tokens to cut texts to: what was asked for, or the default as far as the model can read it.

    Raises:
        UserError: if more was asked for than the model can read.
    """
    limit = base.max_positions
    if asked is None:
        return default if limit is None else min(default, limit)
    if limit is not None and asked > limit:
        raise UserError(f"--max_length {asked} is more than the {limit} tokens that the model can read.")
    return asked


def _revision(options: ModelOptions) -> str:
    return options.model_revision or "main"


def _new_modules(name: str, model: PreTrainedModel, missing: set[str]) -> list[str]:
    """The outermost modules none of whose tensors were in the checkpoint.

    A base loaded again would start them at other random values, so an adapter without them would be worthless.
    """
    lost = sorted(key for key in missing if re.search(r"\.\d+\.", key))
    if lost:
        raise UserError(
            f"model {name!r} lacks {len(lost)} tensors of its blocks, the first being {lost[0]}; "
            "it was saved from another architecture than its config.json says."
        )
    tensors = set(model.state_dict())
    found = set()
    for key in missing:
        parts = key.split(".")[:-1]
        prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        whole = (p for p in prefixes if all(t in missing for t in tensors if t.startswith(f"{p}.")))
        found.add(next(whole, ".".join(parts)))
    return sorted(found)


def settle_pad_token(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 and Llama have no token to pad with; the end token serves, as nothing is read behind it.

    Raises:
        UserError: if the tokenizer has neither.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name!r} has neither a pad nor an end token; give it one and save it.")
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def max_positions(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that a model can read, or None where nothing limits it."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer that knows no limit says 10^30. Where it knows one (RoBERTa: 512 of 514), it is the exact one.
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and limit < 10**9]
    return min(limits, default=None)
