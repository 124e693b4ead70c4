"""The reference model of preference training, where TRL makes it an adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from .config import PSTConfig


def complete_reference(model: Any) -> None:
    """Make the adapter "ref" the copy of "default" that TRL means it to be.

    Given a `PeftModel`, TRL's trainers of preferences (DPO, KTO, GRPO, RLOO) add an adapter "ref" of the very
    configuration of "default" and copy into it every parameter whose name goes on after the adapter's. PST's names end
    there, and its zeros in force are buffers, so the reference would be a new adapter, which prunes nothing.

    Args:
        model: what is trained; anything but a `PeftModel` with such a reference is left alone.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> config = PSTConfig(target_modules=["0"], target_sparsity=0.5)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> _ = model.update_sparsity(10, total_steps=10)
        >>> model.add_adapter("ref", model.peft_config["default"])
        >>> complete_reference(model)
        >>> model.base_model.model[0].get_num_pruned("ref")
        16
    """
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    config = configs.get("ref")
    # Of the very configuration: one that the user added under this name has another.
    if isinstance(config, PSTConfig) and config is configs.get("default"):
        state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        set_peft_model_state_dict(model, state, adapter_name="ref")
