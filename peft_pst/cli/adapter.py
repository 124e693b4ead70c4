"""Putting a new PST adapter on a base model, or saying in one line why it does not go."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import PSTConfig
from ..model import pst_layers
from ..targets import find_block_linears
from .base import Base
from .errors import UserError


def add_adapter(base: Base, config: PSTConfig) -> PeftModel:
    """Adapt a base model; the modules that start at random are trained and saved with the adapter.

    PEFT is content with one name that matches, and with none in some options. Here every name must mean something: a
    misspelt one would go unnoticed until the training is done.

    Raises:
        UserError: if the configuration names modules or blocks that the model does not have, or cannot be applied.
    """
    linears = find_block_linears(base.model)
    _check_excluded(config.exclude_modules, base.model, linears)
    _check_saved(config.modules_to_save or [], base.model)
    _check_blocks(config, base.model, linears)
    if base.new_modules:
        config.modules_to_save = [*(config.modules_to_save or []), *base.new_modules]
    targets: list[str] = sorted(config.target_modules) if isinstance(config.target_modules, set) else []
    selection = _selection(config)
    choice = f"the blocks of the model hold {', '.join(linears) or 'no linear layers'}."
    try:
        with warnings.catch_warnings():
            # It is an error here, below.
            warnings.filterwarnings("ignore", message=".* keys did not match any targeted module")
            model = get_peft_model(base.model, config)
    except NoMatchingPeftModuleError as error:
        raise UserError(f"{selection} leaves no layer to adapt; {choice}") from error
    except ValueError as error:
        raise UserError(error) from error
    adapted = [layer.module_name for layer in pst_layers(model)]
    for name in targets:
        if not _is_part_of(name, adapted):
            raise UserError(f"--target_modules: {name!r} matches no layer; {choice}")
    linears = [name for name in linears if _is_part_of(name, adapted)]
    for option in ("sparsity_pattern", "rank_pattern", "residual_pattern", "score_rank_pattern"):
        _check_pattern_keys(option, getattr(config, option), adapted, linears)
    return model


def _selection(config: PSTConfig) -> str:
    """The options that say which layers to adapt, as they were given."""
    given = []
    for option in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = getattr(config, option)
        if value is not None:
            values = sorted(value) if isinstance(value, set) else value if isinstance(value, list) else [value]
            given.append(f"--{option} {' '.join(map(str, values))}")
    return " with ".join(given) or "what is adapted by default"


def _is_part_of(suffix: str, names: Iterable[str]) -> bool:
    """Whether one of the names is, or ends in, this one; PEFT's rule for names in lists."""
    return any(f".{name}".endswith(f".{suffix}") for name in names)


def _check_excluded(excluded: set[str] | list[str] | str | None, model: nn.Module, linears: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(excluded, str):
        if not any(re.fullmatch(excluded, name) for name in names):
            raise UserError(f"--exclude_modules {excluded!r} matches no module by its whole name, such as {names[-1]}.")
        return
    for name in sorted(excluded or ()):
        if not _is_part_of(name, names):
            raise UserError(f"--exclude_modules: {name!r} is no module of the model; try {_nearest(name, linears)}.")


def _check_saved(saved: Sequence[str], model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules() if name]
    outside = [name for name in names if _holds_parameters(model.get_submodule(name)) and not _is_in_block(name)]
    for name in saved:
        if not _is_part_of(name, names):
            raise UserError(f"--modules_to_save: {name!r} is no module of the model; try {_nearest(name, outside)}.")


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _check_blocks(config: PSTConfig, model: nn.Module, linears: list[str]) -> None:
    """Refuse blocks that the model does not have; which it has is asked from the rule that PEFT selects by."""
    asked = config.layers_to_transform
    if asked is None:
        return

    def has(block: int) -> bool:
        probe = replace(
            config,
            target_modules=linears,
            exclude_modules=None,
            modules_to_save=None,
            layers_to_transform=[block],
        )
        return any(check_target_module_exists(probe, name) for name, _ in model.named_modules())

    longest = max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=0)
    blocks = [block for block in range(longest) if has(block)]
    if not blocks:
        lists = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        pattern = (
            f"--layers_pattern {' '.join(config.layers_pattern)}" if config.layers_pattern else "--layers_to_transform"
        )
        raise UserError(f"{pattern} finds no blocks in the model; it has {', '.join(sorted(lists)) or 'no lists'}.")
    for block in asked if isinstance(asked, list) else [asked]:
        if block not in blocks:
            raise UserError(f"--layers_to_transform {block}: the model has {len(blocks)} blocks, counted from 0.")


def _check_pattern_keys(option: str, pattern: Iterable[str], adapted: Sequence[str], linears: Sequence[str]) -> None:
    for key in pattern:
        if not any(get_pattern_key([key], name) == key for name in adapted):
            raise UserError(
                f"--{option}: {key!r} matches none of the {len(adapted)} adapted layers; try {_nearest(key, linears)}."
            )


def _nearest(name: str, names: Sequence[str], count: int = 3) -> str:
    """The endings of names that are most like its own, else the last names."""
    endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
    close = difflib.get_close_matches(name.rpartition(".")[2], endings, n=count, cutoff=0.65)
    return " or ".join(close or names[-count:])
