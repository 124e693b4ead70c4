"""One option of the command line for each field of `PSTConfig`, made from the field itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import typing
from typing import Any, Literal

from peft.config import PeftConfig
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..config import PSTConfig

# `torchrun` and `accelerate launch` take --r for a short form of an option of their own.
_ALIASES = {"r": "pst_r"}


def pst_fields() -> list[dataclasses.Field]:
    """The fields of `PSTConfig` that are its own, without those that PEFT and this package manage."""
    managed = {field.name for field in dataclasses.fields(PeftConfig)} | {"format_version"}
    return [field for field in dataclasses.fields(PSTConfig) if field.name not in managed]


def add_pst_options(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Add one option for each field of `PSTConfig`; returns {name in the parsed namespace: field}.

    Options that the user leaves out are absent from the namespace, so that a preset or a default can fill them in. A
    field that `TrainingArguments` has too gets the prefix `pst_`.
    """
    taken = {field.name for field in dataclasses.fields(TrainingArguments)}
    types = typing.get_type_hints(PSTConfig)
    group = parser.add_argument_group("PST (the fields of PSTConfig)")
    destinations = {}
    for field_ in pst_fields():
        name = f"pst_{field_.name}" if field_.name in taken else field_.name
        group.add_argument(
            *dict.fromkeys(f"--{form}" for form in _forms(name)),
            dest=name,
            help=_help(field_),
            default=argparse.SUPPRESS,
            **_reader(types[field_.name]),
        )
        destinations[name] = field_.name
    return destinations


def _forms(name: str) -> list[str]:
    names = [name, *([_ALIASES[name]] if name in _ALIASES else [])]
    return [form for own in names for form in (own, own.replace("_", "-"))]


def _help(field_: dataclasses.Field) -> str:
    is_left_open = field_.default is dataclasses.MISSING or field_.default is None
    text = field_.metadata["help"] + ("" if is_left_open else f" (default: {field_.default})")
    return text.replace("%", "%%")  # argparse formats it


def _reader(type_: Any) -> dict[str, Any]:
    """What argparse must know to read a value of a field's type."""
    options = set(typing.get_args(type_)) or {type_}
    if typing.get_origin(type_) is Literal:
        return {"choices": typing.get_args(type_)}
    if typing.get_origin(type_) is dict:
        return {"type": _by_module, "metavar": "JSON"}
    if list[int] in options:
        return {"type": int, "nargs": "+", "metavar": "N"}
    if list[str] in options:
        return {"type": str, "nargs": "+", "metavar": "NAME"} | ({"action": _NamesOrPattern} if str in options else {})
    if type_ is str:
        return {"type": str}
    if type_ is bool:
        return {"type": string_to_bool, "nargs": "?", "const": True}
    if bool in options:
        return {"type": _bool_or_name}
    if type(None) in options:
        return {"type": _count_or_none, "metavar": "N|none"}
    return {"type": next(kind for kind in (str, int, float) if kind in options)}


def _by_module(text: str) -> dict[str, Any]:
    """Values by module: a JSON object whose keys are names or regular expressions."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"output.dense": 0.5}}')
    for key in value:
        _check_pattern(key)
    return value


def _check_pattern(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}; write \\ before a sign that stands for itself"
        ) from error


def _bool_or_name(text: str) -> bool | str:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text


def _count_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


class _NamesOrPattern(argparse.Action):
    """Several values are names; a single one is a name, a regular expression, or all-linear."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        single = values[0] if len(values) == 1 else ""
        # PEFT matches a string in full and the names of a list as suffixes; "query" is meant as the latter.
        is_pattern = single == "all-linear" or re.search(r"[^\w.]", single)
        try:
            _check_pattern(single)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        setattr(namespace, self.dest, single if is_pattern else values)
