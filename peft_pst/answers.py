"""Whether two models give the same answers, on inputs that are made up where none are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Sums over fewer zeros are made in another order; in half precision every layer then rounds differently.
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-5, 5e-2


def made_up_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """One text of eight tokens, or one picture, for a model's forward.

    Raises:
        ValueError: if the model reads neither tokens nor pixels.
    """
    config: Any = model.config
    if model.main_input_name == "input_ids":
        text = config.get_text_config()
        ids = torch.arange(1, 9) % text.vocab_size
        end = text.eos_token_id
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            ids[-1] = end  # some heads read the model there
        tokens = {"input_ids": ids.unsqueeze(0)}
        return {**tokens, "decoder_input_ids": tokens["input_ids"]} if config.is_encoder_decoder else tokens
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        shape = (1, config.num_channels, *((size, size) if isinstance(size, int) else size))
        return {"pixel_values": torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)}
    raise ValueError(
        f"{type(model).__name__} reads {model.main_input_name}, for which no input can be made up; pass a batch as "
        "inputs={...}, on which the answers before and after are compared."
    )


def check_same_answers(model: PreTrainedModel, other: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Refuse a model that answers otherwise than the one it stands for, in evaluation mode.

    Args:
        model: the original.
        other: what has the same outputs.
        inputs: a batch for the forward of both.

    Raises:
        RuntimeError: if an output differs by more than 1e-5 of its largest value (or of 1), in half precision 5e-2.
    """
    before, after = (_answers(each, inputs) for each in (model, other))
    tolerance = _TOLERANCE if torch.finfo(model.dtype).bits >= 32 else _TOLERANCE_OF_HALF
    for name, expected in before.items():
        difference = float((after[name].cpu().double() - expected.cpu().double()).abs().max())
        bound = tolerance * max(1.0, float(expected.abs().max()))
        if not difference <= bound:
            raise RuntimeError(
                f"{name} of the shrunk {type(model).__name__} differs by up to {difference:.2g}, which is more than "
                f"{bound:.2g} by rounding: its parts are coupled in more ways than their names and shapes tell, or its "
                "weights are not finite. The original was not changed."
            )


@torch.no_grad()
def _answers(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    was_training = model.training
    model.eval()
    try:
        output = model(**{name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()})
    finally:
        model.train(was_training)
    return {name: x for name, x in output.items() if isinstance(x, Tensor) and x.is_floating_point()}
