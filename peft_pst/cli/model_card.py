"""The README.md of an adapter folder: what it is, how good, and the lines that load it."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from ..config import PSTConfig
from ..model import get_sparsity, pst_layers
from ..model_card import TAGS
from .labels import Labels

_CARD = """---
{metadata}
---

# {title}

A sparse adapter for `{base}`, trained with [PST](https://arxiv.org/abs/2205.11005) (parameter-efficient sparse
training) by the package `peft_pst`. With it, {zeros:.2%} of the weights in {layers} matrices are exactly zero.

## Loading

`import peft_pst` teaches PEFT the method; without this line loading ends in `KeyError: 'PST'`.

```python
import peft_pst
from peft import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained("{folder}"{arguments})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

For a plain checkpoint with the zeros in it, which loads without `peft_pst`:

```
peft-pst merge {folder} {folder}-merged
```
{sections}"""

_AUTO_CLASSES = {"SEQ_CLS": "AutoPeftModelForSequenceClassification", "CAUSAL_LM": "AutoPeftModelForCausalLM"}
_PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}


def write_model_card(
    model: PeftModel, folder: Path, labels: Labels | None, further_settings: dict[str, object]
) -> None:
    """Write README.md into an adapter folder.

    Args:
        model: the trained model, for base, sparsity and settings.
        folder: where the adapter was saved; the metrics are read from its `all_results.json`, if there is one.
        labels: what a classifier predicts; None for language modelling.
        further_settings: beside those of the adapter, by name.
    """
    config = model.active_peft_config
    metadata = ModelCardData(
        base_model=config.base_model_name_or_path,
        library_name="peft",
        pipeline_tag=_PIPELINES[config.task_type],
        tags=[*TAGS, f"base_model:adapter:{config.base_model_name_or_path}"],
    )
    text = _CARD.format(
        metadata=metadata.to_yaml(),
        title=folder.resolve().name,
        base=config.base_model_name_or_path,
        zeros=get_sparsity(model),
        layers=sum(1 for _ in pst_layers(model)),
        auto_class=_AUTO_CLASSES[config.task_type],
        folder=folder.resolve().name,
        arguments=f", num_labels={labels.num_labels}" if labels else "",
        sections="".join(_sections(config, folder, labels, further_settings)),
    )
    ModelCard(text, ignore_metadata_errors=True).save(folder / "README.md")


def _sections(config: PSTConfig, folder: Path, labels: Labels | None, further_settings: dict[str, object]) -> list[str]:
    results = folder / "all_results.json"
    sections = []
    if results.is_file():
        metrics = json.loads(results.read_text(encoding="utf-8"))
        wanted = {name: value for name, value in metrics.items() if name.startswith(("eval_", "test_", "perplexity"))}
        noise = ("runtime", "per_second", "samples")
        sections.append(_table("Results", {k: v for k, v in wanted.items() if not k.endswith(noise)}))
    settings = ("target_sparsity", "r", "score_rank", "structured", "init_weights", "total_steps")
    sections.append(_table("Settings", {name: getattr(config, name) for name in settings} | further_settings))
    if labels and labels.names:
        sections.append(_table("Labels", {str(id_): name for id_, name in labels.id2label.items()}))
    return sections


def _table(title: str, rows: dict[str, object]) -> str:
    if not rows:
        return ""
    cells = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in rows.items()]
    return "\n".join([f"\n## {title}\n", "| | |", "|---|---|", *cells, ""])
