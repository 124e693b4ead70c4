"""What the commands print: from one process only where several train together, and warnings without source lines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from accelerate import PartialState


def say(*lines: str) -> None:
    """Print lines on the main process."""
    if PartialState().is_main_process:
        print(*lines, sep="\n", flush=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show a warning as what it says, without the line of code; leave out what libraries tell each other's authors."""

    def one_line(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"warning: {message}\n"

    before, warnings.formatwarning = warnings.formatwarning, one_line
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        warnings.formatwarning = before


@contextmanager
def quiet_transformers(*, bars: bool = True) -> Iterator[None]:
    """Keep transformers from calling a head untrained that is about to be trained, or that the adapter brings.

    Args:
        bars: whether transformers may show its progress bars, such as those of loading and saving.
    """
    logging = transformers.logging
    verbosity, hides_bars = logging.get_verbosity(), not bars and logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if hides_bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # on an interface that PEFT uses
            yield
    finally:
        logging.set_verbosity(verbosity)
        if hides_bars:
            logging.enable_progress_bar()
