"""`peft-pst bench`: latency and throughput of a model's dense, masked, sparse and shrunk forms on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..json_file import write_json
from ..plots import plot_latency
from .console import plain_warnings
from .errors import UserError, require
from .latency import Measurement, measure, processor_name
from .parser import OneLineParser
from .replace import check_writable
from .report import print_text
from .variants import load_variants

DESCRIPTION = """\
Measure what the zeros of a model buy on this machine: the model dense (float32, bfloat16, each also packed for this
processor), with its adapter not merged, with sparse kernels where they are faster, and shrunk if such a folder is
given. All take turns in one run; the best dense choice is the baseline. Prints a table and says whether sparsity pays;
writes bench.json, bench.md and bench.png."""

BENCH_FOLDER = "bench"


def run(arguments: Sequence[str]) -> None:
    """Measure as the command line says; raises `UserError` before anything is measured or written."""
    options = _parser().parse(arguments)
    require("matplotlib", "cli")
    path, shrunk = Path(options.path), Path(options.shrunk) if options.shrunk else None
    for folder in filter(None, (path, shrunk)):
        if not folder.is_dir():
            raise UserError(f"{str(folder)!r} is not a folder; pass that of an adapter or of a checkpoint.")
    output = Path(options.output or path / BENCH_FOLDER)
    check_writable(output, "output")
    if options.threads:
        torch.set_num_threads(options.threads)
    with plain_warnings():
        variants = load_variants(path, options.base_model, shrunk, options.device)
        settings = [(batch, tokens) for batch in options.batch_size for tokens in options.tokens]
        measured = [
            measurement
            for batch, tokens in tqdm(settings, desc="measuring", unit="setting", leave=False, disable=None)
            for measurement in measure(variants, batch, tokens, options.repeats, options.device)
        ]
    result = {
        "model": options.path,
        "machine": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "measurements": [measurement.to_dict() for measurement in measured],
    }
    print_text(json.dumps(result, indent=2) if options.json else _text(measured, result))
    try:
        _write(output, result, measured)
    except OSError as error:
        raise UserError(f"cannot write to {str(output)!r}: {error.strerror}; name a folder with --output.") from error
    print(f"\nWritten to {output}: bench.json, bench.md, bench.png", file=sys.stderr)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="peft-pst bench", description=DESCRIPTION)
    parser.add_argument("path", metavar="PATH", help="folder of an adapter, or of a merged checkpoint")
    parser.add_argument(
        "--base_model", "--base-model", metavar="BASE", help="base model of the adapter, folder or name"
    )
    parser.add_argument("--shrunk", metavar="FOLDER", help="folder of the same model, shrunk")
    parser.add_argument(
        "--batch_size",
        "--batch-size",
        metavar="N",
        type=_positive,
        nargs="+",
        default=[1],
        help="sequences in a batch; several are measured one after the other (default: 1)",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=_positive, nargs="+", default=[128], help="tokens a sequence (default: 128)"
    )
    parser.add_argument("--repeats", metavar="N", type=_positive, default=11, help="rounds (default: 11)")
    parser.add_argument("--threads", metavar="N", type=_positive, help="threads of torch (default: its own choice)")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument(
        "--output", metavar="DIR", help=f"where to write (default: the folder `{BENCH_FOLDER}` inside PATH)"
    )
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON instead of the tables")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "number of 1 or more"  # what argparse calls the type


def _threads(result: dict[str, Any]) -> str:
    return "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"


def _text(measured: Sequence[Measurement], result: dict[str, Any]) -> str:
    head = f"{result['model']} on {_threads(result)} of {result['machine']}"
    tables = [f"{measurement.to_table()}\n\n{measurement.verdict()}" for measurement in measured]
    return "\n\n".join([head, *tables, _NOTE])


_NOTE = """\
difference: of the outputs from those of float32, over the largest of these. packed: in oneDNN's layout, as torch's
compiler packs it. sparse: each pruned layer by what was measured fastest at this number of rows, zeros or not."""


def _write(output: Path, result: dict[str, Any], measured: Sequence[Measurement]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "bench.json", result)
    tables = "\n\n".join(f"{measurement.to_markdown()}\n\n{measurement.verdict()}" for measurement in measured)
    (output / "bench.md").write_text(tables + "\n", encoding="utf-8")
    bars = {
        measurement.title: [(row.variant, 1e3 * row.seconds, row.is_dense) for row in measurement.rows]
        for measurement in measured
    }
    plot_latency(bars, output / "bench.png", subtitle=f"{_threads(result)} of {result['machine']}")
