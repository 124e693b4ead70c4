"""What zeros buy at inference: single layers, whole models and other runtimes, dense and sparse side by side.

    python benchmarks/inference.py layers                # BERT-base's three shapes, by rows, zeros and pattern
    python benchmarks/inference.py models                # BERT-base on a text, GPT-2 small generating a token
    python benchmarks/inference.py runtimes              # an encoder in ONNX Runtime and OpenVINO, zeros or not

All sides take turns within one run, so that their ratios hold on a machine whose speed drifts; medians are printed. A
layer meets the caches as within a model: before each timed call 256 MiB of other data are read (`--warm` leaves that
out). Weights are random: the time depends on where the zeros are, and not on the values.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parents[1]))
from peft_pst import sparse_inference, topk_mask
from peft_pst.cli.latency import measure, processor_name
from peft_pst.cli.variants import load_variants
from peft_pst.kernel_timing import time_in_turns, time_kernels
from peft_pst.sparse_kernels import KERNELS

OTHER_BYTES = 256 * 2**20
# (fraction of zeros, what is pruned together), with the numbers of rows and precisions that each is measured with.
LAYER_CASES: list[tuple[float, str, tuple[int, ...], tuple[str, ...]]] = [
    (0.9, "unstructured", (1, 8, 32, 128), ("float32", "bfloat16")),
    (0.7, "unstructured", (1, 128), ("float32",)),
    (0.8, "unstructured", (1, 128), ("float32",)),
    (0.95, "unstructured", (1, 128), ("float32",)),
    (0.9, "32x32", (1, 128), ("float32",)),
    (0.5, "rows", (1, 128), ("float32", "bfloat16")),
]


def layers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kernel that takes the matrix, on each shape, case, number of rows and precision."""
    rows = []
    for case in tqdm([*_layer_cases(options)], desc="layers", leave=False):
        out, width, sparsity, pattern, tokens, precision = case
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(out, width, generator=generator)
        weight = torch.where(topk_mask(weight.abs(), sparsity, pattern), weight, 0).to(getattr(torch, precision))
        bias = torch.randn(out, generator=generator).to(weight)
        able = [name for name, kernel in KERNELS.items() if kernel.refusal(weight) is None]
        other = 0 if options.warm else OTHER_BYTES
        with torch.no_grad():
            seconds = time_kernels(weight, bias, tokens, able, other_bytes=other, repeats=options.repeats)
        names = ("out", "in", "sparsity", "pattern", "rows", "precision")
        rows.append({**dict(zip(names, case, strict=True)), "seconds": seconds})
    return rows


def _layer_cases(options: argparse.Namespace) -> Iterator[tuple[int, int, float, str, int, str]]:
    width, wide = options.width, 4 * options.width
    for sparsity, pattern, all_rows, precisions in LAYER_CASES:
        for out, in_ in ((wide, width), (width, wide), (width, width)):
            for precision in precisions:
                for tokens in all_rows:
                    yield out, in_, sparsity, pattern, tokens, precision


def layers_table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in KERNELS if any(name in row["seconds"] for row in rows)]
    head = ["out x in", "zeros", "pattern", "rows", "precision", *(f"{name}, µs" for name in names)]
    lines = ["| " + " | ".join([*head, "best sparse over best dense"]) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        cells = [f"{row['out']} x {row['in']}", f"{row['sparsity']:.0%}", row["pattern"], str(row["rows"])]
        cells += [row["precision"], *(_microseconds(row["seconds"].get(name)) for name in names)]
        lines.append("| " + " | ".join([*cells, f"{gain(row['seconds']):.2f}"]) + " |")
    return "\n".join([*lines, "", *_blocks_table(rows)])


def _blocks_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The matrices of a whole block: two of the feed-forward network and four of attention."""
    yield "| block of | zeros | pattern | rows | precision | as it is, µs | best dense, µs | best sparse, µs | gain |"
    yield "|---" * 9 + "|"
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sparsity"], row["pattern"], row["rows"], row["precision"]), []).append(row)
    for (sparsity, pattern, tokens, precision), parts in groups.items():
        counted = [(4 if part["out"] == part["in"] else 1, part["seconds"]) for part in parts]
        as_is = sum(count * seconds["dense"] for count, seconds in counted)
        dense = sum(count * best(seconds, is_sparse=False) for count, seconds in counted)
        sparse = sum(count * best(seconds, is_sparse=True) for count, seconds in counted)
        cells = [str(parts[0]["in"]), f"{sparsity:.0%}", pattern, str(tokens), precision]
        cells += [*map(_microseconds, (as_is, dense, sparse)), f"{dense / sparse:.2f}"]
        yield "| " + " | ".join(cells) + " |"


def gain(seconds: dict[str, float]) -> float:
    """How many times faster the best sparse kernel is than the best dense one."""
    return best(seconds, is_sparse=False) / best(seconds, is_sparse=True)


def best(seconds: dict[str, float], *, is_sparse: bool) -> float:
    """The least seconds of the sparse kernels, or of the dense ones; infinite where there is none."""
    return min((took for name, took in seconds.items() if KERNELS[name].is_sparse == is_sparse), default=float("inf"))


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.0f}"


def models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants of `peft-pst bench`, of an encoder and of a decoder, with 90 % zeros in every block."""
    measured = []
    for model in (_bert(options), _gpt2(options)):
        _prune(model, 0.9)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            variants = load_variants(Path(folder), None, None, "cpu")
        for measurement in measure(variants, 1, options.tokens, options.repeats, "cpu"):
            print(f"\n{type(model).__name__}, {measurement.to_markdown()}\n\n{measurement.verdict()}\n")
            measured.append({"model": type(model).__name__, **measurement.to_dict()})
        del variants
    return measured


def _bert(options: argparse.Namespace, layers: int | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_attention_heads": 12}
    config = BertConfig(num_hidden_layers=layers or options.layers, **sizes, attn_implementation="sdpa")
    return BertForSequenceClassification(config).eval()


def _gpt2(options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=options.width, n_layer=options.layers, n_head=12)).eval()


@torch.no_grad()
def _prune(model: nn.Module, sparsity: float) -> None:
    """Zeros by magnitude in every linear layer of the numbered blocks."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split(".")):
            module.weight[~topk_mask(module.weight.abs(), sparsity)] = 0


def runtimes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two blocks of the encoder, full and with 90 % zeros, by torch, ONNX Runtime and OpenVINO, all in float32."""
    ids = torch.randint(1000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], Any]] = {}
    expected: dict[str, Tensor] = {}
    for zeros in ("no zeros", "90 % zeros"):
        model = _bert(options, layers=2)
        if zeros != "no zeros":
            _prune(model, 0.9)
        with torch.no_grad():
            expected[zeros] = model(ids).logits
        calls |= {f"ONNX Runtime, {zeros}": _onnx_call(model, ids), f"OpenVINO, {zeros}": _openvino_call(model, ids)}
        calls[f"torch, {zeros}"] = _torch_call(model, ids)
        if zeros != "no zeros":
            sparse = _bert(options, layers=2)
            _prune(sparse, 0.9)
            sparse_inference(sparse, {"input_ids": ids})
            calls[f"sparse_inference, {zeros}"] = _torch_call(sparse, ids)
            packed = copy.deepcopy(model)
            sparse_inference(packed, kernel="onednn", min_sparsity=0)
            calls[f"torch packed, {zeros}"] = _torch_call(packed, ids)
    with torch.no_grad():
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected[name.split(", ")[1]], rtol=1e-3, atol=1e-4)
    seconds = time_in_turns(calls, repeats=options.repeats)
    return [{"runtime": name, "seconds": took} for name, took in sorted(seconds.items())]


def runtimes_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {row['runtime']} | {1e3 * row['seconds']:.2f} |" for row in rows]
    return "\n".join(["| runtime, weights | ms |", "|---|---|", *lines])


def _torch_call(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model(ids).logits


def _onnx_call(model: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(model, kwargs={"input_ids": ids}, dynamo=True, verbose=False).save(f"{folder}/model.onnx")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", settings)
    return lambda: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


def _openvino_call(model: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    import openvino

    converted = openvino.convert_model(model, example_input={"input_ids": ids})
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    return lambda: torch.from_numpy(next(iter(compiled({"input_ids": ids.numpy()}).values())))


MEASURES: dict[str, tuple[Callable[..., list[dict[str, Any]]], Callable[..., str] | None]] = {
    "layers": (layers, layers_table),
    "models": (models, None),
    "runtimes": (runtimes, runtimes_table),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12, help="of the whole models")
    parser.add_argument("--tokens", type=int, default=128, help="of the whole models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warm", action="store_true", help="leave a layer's weights in the cache between two calls")
    parser.add_argument("--output", type=Path, help="folder for the JSON; by default the table is printed only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    run, table = MEASURES[options.what]
    rows = run(options)
    if table:
        print(table(rows))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        result = {"settings": settings, "machine": processor_name(), "torch": torch.__version__, "rows": rows}
        name = f"{options.what}-{options.threads}threads{'-warm' if options.warm else ''}.json"
        (options.output / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
