"""Which checkpoint of a killed run to go on from."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

_ZIPPED = (".pt", ".pth", ".bin")  # as torch.save writes them, with the index at the end


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint of a `Trainer` that was written to its end.

    The Trainer writes into the final folder, and takes the last one there is: a run that is killed while it saves
    cannot go on from it by itself. Pass what this returns to `train(resume_from_checkpoint=...)`; the unfinished folder
    may stay, and is written anew when the run gets there.

    Args:
        folder: the Trainer's `output_dir`, which need not exist.

    Returns:
        The folder of the checkpoint, or None if there is none. Unfinished ones that were passed over are warned of.

    Example:
        >>> last_whole_checkpoint("no such folder") is None
        True
    """
    if not Path(folder).is_dir():
        return None
    checkpoints = [Path(name) for name in sort_checkpoints(str(folder))]
    for checkpoint in reversed(checkpoints):
        problem = _problem(checkpoint)
        if problem is None:
            return str(checkpoint)
        warnings.warn(f"{checkpoint} was not written to its end and is passed over: {problem}.", stacklevel=2)
    return None


def _problem(checkpoint: Path) -> str | None:
    """What shows that a checkpoint is unfinished; None if nothing does."""
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".safetensors" and not _is_safetensors(file):
            return f"{file.name} is damaged"
        if file.suffix == ".json" and not _is_json(file):
            return f"{file.name} is damaged"
        if file.suffix in _ZIPPED and not zipfile.is_zipfile(file):
            return f"{file.name} is damaged"
    content = json.loads(state.read_text(encoding="utf-8"))
    step = content.get("global_step") if isinstance(content, dict) else None
    return None if checkpoint.name == f"{PREFIX_CHECKPOINT_DIR}-{step}" else f"{TRAINER_STATE_NAME} is of step {step}"


def _is_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
