"""LoRA (Hu et al. 2022, arXiv 2106.09685) as PEFT has it, on the same matrices as PST; nothing pruned."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model

from peft_pst.targets import find_block_linears, find_token_embeddings

from .protocol import Goal, Method, Prepared, Start, rate_groups


def _prepare(start: Start, goal: Goal, *, embeddings: bool = False) -> Prepared:
    config = LoraConfig(
        task_type=start.task_type,
        target_modules=find_block_linears(start.model) + (find_token_embeddings(start.model) if embeddings else []),
        modules_to_save=list(start.head_modules) or None,
        **goal.options,
    )
    model: Any = get_peft_model(start.model, config)
    groups = rate_groups(model, goal, lambda name: "lora_" not in name)
    return Prepared(model, groups, finish=model.merge_and_unload)


_DEFAULTS = {"r": 8, "lora_alpha": 8}

METHODS = {
    "lora": Method("LoRA", ("lr",), _prepare, _DEFAULTS, prunes=False),
    "lora-embeddings": Method(
        "LoRA, embeddings too", ("lr",), partial(_prepare, embeddings=True), _DEFAULTS, prunes=False
    ),
}
