"""`peft-pst merge`: from an adapter to a pruned checkpoint that stock transformers load."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from ..folders import replaced_folder
from ..report import REPORT_NAME, SparsityReport, report_checkpoint, report_model
from .base import load_tokenizer
from .console import plain_warnings, say
from .errors import UserError
from .labels import Labels
from .loading import load_adapted_model, read_adapter_config
from .parser import OneLineParser
from .replace import check_checkpoint_folder
from .report import print_text

_DESCRIPTION = """\
Merge a PST adapter into its base model and write a plain checkpoint with exact zeros, tokenizer included. It loads
with stock from_pretrained(), without this package. The zeros are counted in the written file."""


def run(argv: list[str]) -> None:
    """Merge as the command line says; see `peft-pst merge --help`.

    Raises:
        UserError: for a mistake in the input; an existing output stays whole.
    """
    options = _parser().parse(argv)
    folders = [Path(options.adapter, *([name] if name else [])) for name in options.adapter_name or [None]]
    output = Path(options.output).resolve()
    base = options.base_model or read_adapter_config(folders[0]).base_model_name_or_path
    check_checkpoint_folder(output, options.overwrite, sources=[*folders, *([Path(base)] if base else [])])
    try:
        with plain_warnings(), replaced_folder(output) as folder:
            report = _write_merged(folders, folder, options)
            report = replace(report, source=options.output)
            report.save(folder / REPORT_NAME)
    except OSError as error:
        raise UserError(f"{options.output} could not be written: {error}") from error
    print_text(report.to_table())
    say("", f"The pruned checkpoint is in {options.output}; it loads with from_pretrained() of stock transformers.")


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="peft-pst merge", description=_DESCRIPTION)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write the checkpoint to")
    parser.add_argument(
        "--base_model", "--base-model", metavar="BASE", help="base model, folder or hub name, if it has moved"
    )
    parser.add_argument(
        "--adapter_name",
        "--adapter-name",
        metavar="NAME",
        action="append",
        help="merge the adapter in this folder inside ADAPTER; may be given several times to merge several",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision to write; auto is the base's own (default)",
    )
    parser.add_argument(
        "--safe_merge", "--safe-merge", action="store_true", help="refuse weights or scores that are not finite"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUTPUT holds")
    return parser


def _write_merged(adapters: list[Path], output: Path, options: argparse.Namespace) -> SparsityReport:
    """Merge into `output`, and report what the written file holds."""
    model = _load(adapters, options.base_model, options.dtype)
    tokenizer = _load_tokenizer(adapters[0], options.base_model)
    try:
        promise = report_model(model)
        merged: Any = model.merge_and_unload(
            progressbar=True, safe_merge=options.safe_merge, adapter_names=model.base_model.active_adapters
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(error) from error
    if options.dtype != "auto":
        merged = merged.to(getattr(torch, options.dtype))
    _complete_config(merged, tokenizer, Labels.load(adapters[0]))
    merged.save_pretrained(output)
    if tokenizer is None:
        warnings.warn("Neither the adapter nor the base has a tokenizer, so none was written.", stacklevel=2)
    else:
        tokenizer.save_pretrained(output)
    promise.save(output / REPORT_NAME)
    report = report_checkpoint(output)
    if report.lost_zeros:
        layer = report.lost_zeros[0]
        raise UserError(
            f"layer {layer.name} was written with {layer.zeros} zeros, but {layer.promised} were promised; nothing was "
            "kept. This is a defect of peft_pst, please report it."
        )
    return report


def _load(adapters: list[Path], base_model: str | None, dtype: str) -> Any:
    """The base as a `PeftModel` with all the adapters active, the first under the name "default"."""
    _check_heads(adapters)
    # Masks come from the base as it is stored: a wider precision is taken now, a narrower one after merging.
    model: Any = load_adapted_model(adapters[0], base_model, dtype="float32" if dtype == "float32" else "auto")
    for folder in adapters[1:]:
        try:
            model.load_adapter(str(folder), adapter_name=folder.name, torch_device="cpu")
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"adapter {str(folder)!r} does not go with {str(adapters[0])!r}: {error}") from error
    model.base_model.set_adapter(["default", *(folder.name for folder in adapters[1:])])
    return model


def _check_heads(adapters: list[Path]) -> None:
    """Masks and updates of several adapters combine; heads and other modules saved in full do not."""
    with_modules = [folder for folder in adapters if read_adapter_config(folder).modules_to_save]
    if len(adapters) > 1 and with_modules:
        modules = ", ".join(read_adapter_config(with_modules[0]).modules_to_save or [])
        raise UserError(
            f"adapter {str(with_modules[0])!r} brings modules of its own ({modules}), which cannot be merged with "
            "those of another; merge it alone."
        )


def _load_tokenizer(adapter: Path, base_model: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the adapter, else the base's, else None."""
    config = read_adapter_config(adapter)
    has_own = (adapter / TOKENIZER_CONFIG_FILE).is_file()
    source = adapter if has_own else base_model or config.base_model_name_or_path
    try:
        return load_tokenizer(str(source), config.revision or "main")
    except UserError:
        return None


def _complete_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, labels: Labels | None) -> None:
    """What training settled and the base's own configuration does not say: the labels, and what to pad with."""
    if labels is not None:
        labels.apply(model.config)
    text_config = model.config.get_text_config()
    if tokenizer is not None and getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = tokenizer.pad_token_id
