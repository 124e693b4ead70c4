"""WikiText-2: language modelling, scored by perplexity on the test text.

From the hub the training text is the set's own. The local files have no training text; there the validation text serves
for it, so that figures from the two sources do not compare.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_pst.cli.data import load_hub_splits
from peft_pst.cli.language import pack, read_corpus
from peft_pst.cli.metrics import perplexity as perplexity_of_loss
from peft_pst.cli.options import DataOptions

from ..generation.perplexity import perplexity, read_text
from ..models import load_causal_model
from ..runs import Run
from .protocol import LoadedTask, Scores, split_training

TASKS = ("wikitext2",)
_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def task_files(task: str, data: Path, *, with_validation: bool) -> list[Path]:
    """The text to train on, and the one to predict.

    Args:
        task: "wikitext2".
        data: a folder that holds them itself, or in `wikitext-2`.
        with_validation: whether the second is wanted.

    Raises:
        FileNotFoundError: if one of them is missing.
    """
    folder = data / "wikitext-2" if (data / "wikitext-2").is_dir() else data
    files = [folder / "valid.txt", *([folder / "test.txt"] if with_validation else [])]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; pass --data FOLDER.")
    return files


def load(run: Run, data: Path | None) -> LoadedTask:
    """Read the texts and a causal model; examples are blocks of `max_length` tokens."""
    searching = run.split == "held_out"
    files = None if data is None else task_files(run.task, data, with_validation=not searching)
    base = load_causal_model(run.model)
    base.model.loss_type = "ForCausalLM"  # GPT-2's class does not say so, and its loss would be scaled otherwise
    options = DataOptions(task="causal_lm", dataset_name=_HUB[0], dataset_config_name=_HUB[1])
    if files is not None:
        options = DataOptions(task="causal_lm", train_file=str(files[0]))
    length = run.training.max_length
    blocks = pack(read_corpus(options).train, base.tokenizer, length)
    pool, held_out = split_training(len(blocks), run)

    def evaluate(model: nn.Module, arguments: TrainingArguments) -> Scores:
        if searching:
            trainer = Trainer(model=model, args=arguments, data_collator=default_data_collator)
            return {"perplexity": perplexity_of_loss(trainer.evaluate(blocks.select(held_out))["eval_loss"])}
        text = "".join(load_hub_splits(*_HUB)["test"]["text"]) if files is None else read_text(files[1])
        found = perplexity(model, base.tokenizer, text, context=length, stride=length // 2, progress=False)
        return {"perplexity": found.per_token, "perplexity_per_word": found.per_word}

    return LoadedTask(
        base.model,
        "CAUSAL_LM",
        [],
        blocks.select(pool),
        default_data_collator,
        evaluate,
        main_score="perplexity",
        highest_is_best=False,
    )
