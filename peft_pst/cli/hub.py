"""Pushing to the hub: seen to be possible before any work, and no traceback where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from transformers import TrainingArguments

from .errors import UserError


def check_hub(training: TrainingArguments) -> None:
    """See that the hub answers and knows the user, if anything is to go there.

    Raises:
        UserError: if not.
    """
    if training.push_to_hub:
        remedy = "log in with `hf auth login`, pass --hub_token or mend the connection, or leave the option out"
        with hub_errors("--push_to_hub true: the hub does not take it", remedy):
            HfApi().whoami(token=training.hub_token)


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `UserError`: what could not be done, why, and what to do."""
    try:
        yield
    except Exception as error:  # of an HTTP client that is another one from version to version
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what} ({why}); {remedy}.") from error
