"""One model in the forms that compete in `peft-pst bench`: dense, with its adapter, with sparse kernels, shrunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from ..inference import InferenceReport, dense_again, sparse_inference
from .console import quiet_transformers
from .errors import UserError, said_in_one_line
from .loading import is_adapter, is_missing_folder, load_adapted_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A form of the model.

    Attributes:
        name: such as "sparse float32".
        model: in evaluation mode.
        is_dense: whether it takes no advantage of zeros, so that it is one of the choices to beat.
        is_chosen: whether `choose` has to be called for each number of rows.
    """

    name: str
    model: Any
    is_dense: bool
    is_chosen: bool = False

    def choose(self, sample: Mapping[str, Any]) -> InferenceReport | None:
        """Let sparse kernels compete anew for this batch; None where the model has none."""
        return sparse_inference(dense_again(self.model), sample) if self.is_chosen else None


def load_variants(path: Path, base_model: str | None, shrunk: Path | None, device: str) -> list[Variant]:
    """All forms of a model, each with weights of its own.

    Args:
        path: folder of a PST adapter, or of a merged checkpoint.
        base_model: folder or hub name of the adapter's base, if it has moved.
        shrunk: folder of the same model with what is zero removed, if there is one.
        device: such as "cpu" or "cuda".

    Raises:
        UserError: if a folder holds no such model, or the model neither classifies nor continues texts.
    """
    load = _loader(path, base_model)
    first = load(torch.float32)
    _check_reads_tokens(first, path)
    variants = [Variant("float32", first, is_dense=True)]
    if device == "cpu":
        variants.append(Variant("packed float32", _packed(load(torch.float32)), is_dense=True))
    variants.append(Variant("bfloat16", load(torch.bfloat16), is_dense=True))
    if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        variants.append(Variant("packed bfloat16", _packed(load(torch.bfloat16)), is_dense=True))
    if is_adapter(path):
        # Not one of the choices to beat: it is the same model before it is merged.
        variants.append(Variant("adapter float32", load_adapted_model(path, base_model).float(), is_dense=False))
    for name, dtype in DTYPES.items():
        variants.append(Variant(f"sparse {name}", load(dtype), is_dense=False, is_chosen=True))
    if shrunk is not None:
        small = _loader(shrunk, None)
        variants += [Variant(f"shrunk {name}", small(dtype), is_dense=False) for name, dtype in DTYPES.items()]
        if device == "cpu":
            variants.append(Variant("shrunk packed float32", _packed(small(torch.float32)), is_dense=False))
    for variant in variants:
        variant.model.to(device)
    return variants


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model continues a text token by token."""
    return model.can_generate() and not model.config.is_encoder_decoder


def _loader(path: Path, base_model: str | None) -> Callable[[torch.dtype], Any]:
    if is_adapter(path):
        return lambda dtype: _merged(load_adapted_model(path, base_model)).to(dtype).eval()
    if base_model is not None:
        raise UserError(f"--base_model {base_model!r} is for adapters, but {str(path)!r} holds none.")
    return lambda dtype: _load_checkpoint(str(path), dtype)


def _merged(model: PeftModel) -> Any:
    return model.merge_and_unload()


def _load_checkpoint(path: str, dtype: torch.dtype) -> Any:
    if is_missing_folder(path):
        raise UserError(f"{path!r} is not a folder; pass the folder of an adapter or of a merged checkpoint.")
    with said_in_one_line(f"{path!r} could not be loaded"), quiet_transformers(bars=False):
        config = AutoConfig.from_pretrained(path)
        names = config.architectures or ["AutoModel"]
        return getattr(transformers, names[0]).from_pretrained(path, dtype=dtype).eval()


def _packed(model: Any) -> Any:
    """All linear layers in oneDNN's layout, zeros or not; as it is where oneDNN takes none of them."""
    try:
        sparse_inference(model, kernel="onednn", min_sparsity=0)
    except ValueError as error:
        raise UserError(f"a packed model could not be made: {error}") from error
    return model


def _check_reads_tokens(model: Any, path: Path) -> None:
    config = model.config
    if config.is_encoder_decoder or getattr(config.get_text_config(), "vocab_size", None) is None:
        raise UserError(
            f"{str(path)!r} holds a {type(model).__name__}; this command measures models that read tokens and have no "
            "decoder beside an encoder. In Python, sparse_inference() takes any model."
        )
