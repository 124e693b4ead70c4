"""Runs in fresh processes, several at a time: finished ones are skipped, and a crash stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from .runs import Run, read_result

REPOSITORY = Path(__file__).resolve().parents[2]
_LINES_OF_A_CRASH = 15


def launch(runs: Sequence[Run], folder: Path, data: Path | None, jobs: int) -> list[Run]:
    """Run what has no result yet, with a bar over runs and a line for each that ends.

    Args:
        runs: what to run; a run that occurs twice runs once.
        folder: where results lie.
        data: folder of local data files, or None for the hub.
        jobs: processes at a time.

    Returns:
        The runs that crashed.
    """
    unique = list({run.key: run for run in runs}.values())
    waiting = [run for run in unique if read_result(folder, run) is None]
    failed: list[Run] = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(unique), initial=len(unique) - len(waiting), unit="run", smoothing=0) as bar,
    ):
        futures: dict[Future[str | None], Run] = {pool.submit(_run_one, run, folder, data): run for run in waiting}
        for future in as_completed(futures):
            run, error = futures[future], future.result()
            if error is not None:
                failed.append(run)
            bar.write(_line(run, folder) if error is None else f"FAILED  {run.file_name}\n{error}")
            bar.update()
    return failed


def _run_one(run: Run, folder: Path, data: Path | None) -> str | None:
    """None when all went well, else the end of what the process said."""
    where = None if data is None else str(data.resolve())
    order = {"run": run.to_dict(), "data": where, "output": str(folder.resolve())}
    threads = str(run.threads)
    finished = subprocess.run(
        [sys.executable, "-m", f"{__package__}.worker"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it, products on a GPU need not repeat exactly
        },
    )
    if finished.returncode == 0:
        return None
    lines = finished.stderr.strip().splitlines()[-_LINES_OF_A_CRASH:]
    return "\n".join([f"        exit status {finished.returncode}", *(f"        {line}" for line in lines)])


def _line(run: Run, folder: Path) -> str:
    result = read_result(folder, run)
    assert result is not None  # the worker wrote it before it ended well
    rates = ", ".join(f"{name} {rate:g}" for name, rate in run.rates.items())
    return (
        f"{run.task} {run.method} at {run.sparsity:g}, seed {run.seed}, {rates}: {result['main_score']} "
        f"{result['scores'][result['main_score']]:.4f} in {result['wall_seconds']:.0f} s"
    )
