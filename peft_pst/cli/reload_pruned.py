"""Evaluate a pruned checkpoint with stock transformers: python reload_pruned.py MODEL_FOLDER DOCUMENTS.jsonl

`peft-pst demo` copies this file beside its results and runs it in a process of its own. It needs torch and
transformers alone: importing the package that did the pruning is made an error here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

BATCH_SIZE = 32


def evaluate(folder: str, documents: list[dict[str, str]]) -> dict[str, Any]:
    """Classify documents {"text", "label"}; returns the accuracy in [0, 1] and the predicted label of each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    predicted: list[str] = []
    for start in tqdm(range(0, len(documents), BATCH_SIZE), desc="3/3 reload without peft_pst", unit="batch"):
        texts = [document["text"] for document in documents[start : start + BATCH_SIZE]]
        batch = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**batch).logits.argmax(dim=1)
        predicted += [model.config.id2label[int(index)] for index in best]
    correct = sum(label == document["label"] for label, document in zip(predicted, documents, strict=True))
    return {"accuracy": correct / len(documents), "predicted": predicted}


if __name__ == "__main__":
    sys.modules["peft_pst"] = None  # type: ignore[assignment]  # from here on, importing it is an error
    logging.disable_progress_bar()
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    print(json.dumps(evaluate(sys.argv[1], [json.loads(line) for line in lines])))
