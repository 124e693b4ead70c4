"""From an adapter folder to a model: the base and the adapter together, or one line that says what is wrong."""

from __future__ import annotations

import copy
import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..config import PSTConfig, PSTPeftType
from .console import quiet_transformers
from .errors import UserError, said_in_one_line

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

Shapes = dict[str, tuple[int, ...]]


def load_adapted_model(
    adapter: str | Path,
    base_model: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    any_method: bool = False,
) -> PeftModel:
    """Load the base model of an adapter, and the adapter on top of it, in evaluation mode on the CPU.

    The base's class follows from the adapter's `task_type`, else from the class it was trained on, else from the
    base's own `architectures`. The head takes as many labels as the adapter saved. Whether a PST adapter fits is
    checked on a model without data, before any weight of the base is read.

    Args:
        adapter: folder with `adapter_config.json` and `adapter_model.safetensors`.
        base_model: folder or hub name of the base; by default what the adapter's configuration names.
        dtype: floating dtype of the base's weights; "auto" keeps the one they are stored in.
        any_method: take adapters of PEFT's other methods too.

    Returns:
        The adapted model, its adapter named "default" and active.

    Raises:
        UserError: if the folder holds no such adapter, the base is not named, missing or of other shapes, or a file
            is damaged.
    """
    adapter = Path(adapter)
    config = read_adapter_config(adapter, any_method=any_method)
    saved = read_shapes(adapter / SAFETENSORS_WEIGHTS_NAME)
    base_name = _base_name(adapter, config, base_model)
    with said_in_one_line(f"base model {base_name!r} could not be loaded"):
        base_config = AutoConfig.from_pretrained(base_name, revision=config.revision)
        model_class = _model_class(adapter, config, base_config)
        _adopt_num_labels(model_class, base_config, saved)
    if isinstance(config, PSTConfig):
        _check_fit(_skeleton(model_class, base_config), adapter, saved, base_name)
    base = _load_base(model_class, base_config, base_name, dtype, config.revision, saved)
    with said_in_one_line(f"adapter {str(adapter)!r} could not be loaded on {base_name!r}"), quiet_transformers():
        return PeftModel.from_pretrained(base, str(adapter), torch_device="cpu").eval()


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter, of whatever method."""
    return (Path(folder) / CONFIG_NAME).is_file()


def read_adapter_config(adapter: str | Path, *, any_method: bool = False) -> Any:
    """The configuration of a saved adapter: a `PSTConfig`, or that of another method where any will do.

    Raises:
        UserError: if the folder is missing, holds no adapter or one of another method, or the file is damaged.
    """
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise UserError(f"adapter {str(adapter)!r} is not a folder; pass the folder that save_pretrained() wrote.")
    if not is_adapter(adapter):
        raise UserError(f"{str(adapter)!r} is not an adapter folder: it has no {CONFIG_NAME}{_nested(adapter)}.")
    with said_in_one_line(f"{str(adapter / CONFIG_NAME)!r} could not be read"):
        fields = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
        peft_type = fields.get("peft_type") if isinstance(fields, dict) else None
    if peft_type != PSTPeftType.PST.value and not any_method:
        raise UserError(f"{str(adapter)!r} holds an adapter of type {peft_type}; this command reads PST adapters only.")
    with said_in_one_line(f"{str(adapter / CONFIG_NAME)!r} is not a valid configuration"):
        return PeftConfig.from_pretrained(str(adapter))


def read_shapes(file: Path) -> Shapes:
    """Shapes of the tensors of a safetensors file, from its header alone.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not file.is_file():
        raise UserError(
            f"{str(file.parent)!r} has no {file.name}; the weights must be in safetensors, never in pickle."
        )
    with said_in_one_line(f"{str(file)!r} is damaged"), safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _nested(folder: Path) -> str:
    found = sorted(child.name for child in folder.iterdir() if is_adapter(child))
    return f"; adapters inside it: {', '.join(found)}" if found else ""


def _base_name(adapter: Path, config: PeftConfig, base_model: str | None) -> str:
    name = base_model or config.base_model_name_or_path
    if not name:
        raise UserError(f"adapter {str(adapter)!r} does not name its base model; pass --base_model FOLDER_OR_NAME.")
    if is_missing_folder(name):
        raise UserError(f"base model {name!r} is not a folder; pass --base_model FOLDER_OR_NAME.")
    return name


def is_missing_folder(name: str) -> bool:
    """Whether a model's name can only be meant as a path, and there is no such folder.

    A name on the hub has at most one slash; for anything else, asking the hub would give a misleading answer.

    Example:
        >>> is_missing_folder("./absent"), is_missing_folder("google-bert/bert-base-uncased")
        (True, False)
    """
    is_path = name.startswith(".") or os.path.isabs(name) or name.count("/") > 1
    return is_path and not Path(name).is_dir()


def _model_class(adapter: Path, config: PeftConfig, base_config: PretrainedConfig) -> type[PreTrainedModel]:
    """The concrete class of the base model."""
    if config.task_type is not None:
        auto_class = AUTO_CLASSES.get(config.task_type)
        if auto_class is None:
            raise UserError(f"task_type={config.task_type!r} of {str(adapter)!r} is none of {', '.join(AUTO_CLASSES)}.")
        return _resolve(auto_class, base_config)
    if config.auto_mapping is not None:
        library, name = config.auto_mapping["parent_library"], config.auto_mapping["base_model_class"]
        # The configuration comes from outside, so it must not decide which modules are imported.
        if library.split(".")[0] != "transformers":
            raise UserError(
                f"adapter {str(adapter)!r} belongs to {library}.{name}, which is no transformers model; "
                "load it in Python with PeftModel.from_pretrained()."
            )
        return getattr(importlib.import_module(library), name)
    if base_config.architectures:
        return getattr(transformers, base_config.architectures[0])
    return _resolve("AutoModel", base_config)


def _resolve(auto_class: str, base_config: PretrainedConfig) -> type[PreTrainedModel]:
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(base_config) not in mapping:
        raise UserError(f"{auto_class} knows no model of type {base_config.model_type!r}.")
    found = mapping[type(base_config)]
    return found[0] if isinstance(found, tuple) else found


def _skeleton(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without data, for its names and shapes."""
    with torch.device("meta"):
        return model_class(config)


def _adopt_num_labels(model_class: type[PreTrainedModel], config: PretrainedConfig, saved: Shapes) -> None:
    """Give the base as many labels as the saved head has.

    The head's tensors are those whose shape changes with the number of labels, whatever the model calls them.
    """
    probe = copy.deepcopy(config)
    shapes = []
    for probe.num_labels in (2, 3):
        shapes.append({name: tensor.shape for name, tensor in _skeleton(model_class, probe).state_dict().items()})
    of_two, of_three = shapes
    for name in of_two:
        shape = saved.get(f"base_model.model.{name}")
        if of_two[name] != of_three[name] and shape is not None and config.num_labels != shape[0]:
            config.num_labels = shape[0]


def _check_fit(skeleton: PreTrainedModel, adapter: Path, saved: Shapes, base_name: str) -> None:
    """Compare every tensor of the adapter with the one that its configuration makes on this base."""
    said = said_in_one_line(f"adapter {str(adapter)!r} does not fit base model {base_name!r}")
    with said, quiet_transformers(), torch.device("meta"):
        config = read_adapter_config(adapter)
        config.base_model_name_or_path = skeleton.name_or_path
        adapted = get_peft_model(skeleton, config)
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = sorted(expected.keys() - saved.keys())
    extra = sorted(name for name in saved.keys() - expected.keys() if ".pst_" in name)
    differing = [name for name in expected if name in saved and saved[name] != expected[name]]
    if differing:
        name = differing[0]
        problem = f"{name} is {saved[name]} in the adapter and would be {expected[name]} on the base"
    elif missing:
        problem = f"{missing[0]} is not in the adapter"
    elif extra:
        problem = f"{extra[0]} has no place on the base"
    else:
        return
    count = len(differing) + len(missing) + len(extra)
    raise UserError(
        f"adapter {str(adapter)!r} does not fit base model {base_name!r}: {problem} ({count} tensors differ); pass the "
        "base it was trained on with --base_model."
    )


def _load_base(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    name: str,
    dtype: str | torch.dtype,
    revision: str | None,
    saved: Shapes,
) -> PreTrainedModel:
    """The base with its weights; a head of another size is left to the adapter, which brings its own."""
    with said_in_one_line(f"base model {name!r} could not be loaded"), quiet_transformers():
        loaded: Any = model_class.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            revision=revision or "main",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    base, info = loaded
    # A list of names, or of (name, stored shape, expected shape).
    misfits = sorted({item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]})
    foreign = [key for key in misfits if f"base_model.model.{key}" not in saved]
    if foreign:
        raise UserError(f"base model {name!r}: the stored {foreign[0]} does not have the shape its config.json says.")
    missing = sorted(key for key in info["missing_keys"] if f"base_model.model.{key}" not in saved)
    if missing:
        warnings.warn(
            f"Neither base model {name!r} nor the adapter holds {', '.join(missing)}: random values take their place, "
            "as they did in training; add them to modules_to_save to get the trained model back.",
            stacklevel=3,
        )
    return base
