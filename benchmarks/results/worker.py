"""The process of one run: reads what to do from standard input, writes the result file.

python -m benchmarks.results.worker <<< '{"run": {...}, "data": null, "output": "folder"}'
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
import transformers

from peft_pst import __version__
from peft_pst.cli.console import plain_warnings, quiet_transformers

from .runs import Run, write_json
from .train import execute


def main() -> None:
    """Do what the lines on standard input say."""
    task = json.load(sys.stdin)
    run = Run.from_dict(task["run"])
    torch.set_num_threads(run.threads)
    datasets.disable_progress_bars()
    with plain_warnings(), quiet_transformers(bars=False):
        data = None if task["data"] is None else Path(task["data"])
        result = execute(run, data, Path(task["output"]) / "teachers")
    versions = {"peft_pst": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["peft"] = version("peft")
    content = {"key": run.key, "run": run.to_dict(), "result": result, "versions": versions}
    write_json(Path(task["output"]) / run.file_name, content)


if __name__ == "__main__":
    main()
