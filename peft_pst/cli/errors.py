"""What the command line says about a user's mistake."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from safetensors import SafetensorError

# What transformers, safetensors and the JSON reader raise for files that are missing, damaged or of another kind.
_LOADING_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


class UserError(Exception):
    """A mistake in the input, said in one line: the thing, the value, the bound and the remedy."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


_PATIENCE = 30.0  # seconds in which a launcher ends the other processes, once one has failed


def say_mistake(line: str) -> None:
    """Print a line on standard error; of several processes with the same mistake, one for each machine.

    Launchers such as torchrun end all processes as soon as one has failed. The others wait for that, so that a mistake
    of all is said once, and one that this process alone met is said after all.
    """
    from accelerate.utils import get_int_from_env

    if get_int_from_env(["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"], 0):
        time.sleep(_PATIENCE)
    print(line, file=sys.stderr)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise UserError(f"this needs the package {error.name!r}; run: pip install 'peft-pst[{extra}]'") from error


@contextmanager
def said_in_one_line(what: str) -> Iterator[None]:
    """Turn what libraries raise while loading into a `UserError`: what could not be done, and the first line of why."""
    try:
        yield
    except _LOADING_ERRORS as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{what}: {first}") from error
