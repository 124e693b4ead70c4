"""Two processes that train together, for tests: gloo on the CPU, started and ended by the test itself."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

RANKS = 2

# Children of a server that has imported everything start at once; fresh interpreters would take ten seconds each.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["transformers.trainer", "torch.distributed.fsdp", "tiny_models", "peft_pst.cli.train"]
)


def on_two_ranks(work: Callable[..., Any], *arguments: object) -> list[Any]:
    """What `work(*arguments)` returns on each of two processes that share a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(RANKS, mp_context=processes) as pool:
        ranks = [pool.submit(_run, rank, port, work, arguments) for rank in range(RANKS)]
        return [pickle.loads(rank.result(timeout=600)) for rank in ranks]


def _run(rank: int, port: int, work: Callable[..., Any], arguments: tuple[object, ...]) -> bytes:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    with group():
        # Bytes, because torch would hand over tensors as descriptors that die with this process.
        return pickle.dumps(work(*arguments))


@contextmanager
def group() -> Iterator[None]:
    """A rank that fails must not leave the other waiting for ever."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    try:
        yield
    finally:
        dist.destroy_process_group()
