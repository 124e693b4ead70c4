"""PEFT's own test-suite, with PST among the methods that it tries: `make test-peft`.

The tests are in PEFT's source archive, not in its wheel. They are fetched for the version that is installed, and rows
for PST are added to their lists of methods. The small models that they take from the hub are made here, from
configurations, in a cache of their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent


class Excluded(NamedTuple):
    """Tests that fail, and why PST does not do what they ask.

    Attributes:
        tests: their names.
        rows: the rows of PST with which they fail; all if left open.
        reason: why.
        always: whether they fail at every run.
    """

    tests: tuple[str, ...]
    rows: tuple[str, ...]
    reason: str
    always: bool = True

    def is_about(self, name: str) -> bool:
        """Whether a test is meant, by its name with the row in brackets."""
        test, _, rest = name.partition("[")
        return test in self.tests and (not self.rows or rest.startswith(tuple(f"{row}-" for row in self.rows)))


EXCLUDED = (
    Excluded(("test_from_pretrained_cache_dir",), (), "takes a file from the hub into an empty folder"),
    Excluded(
        ("test_disable_adapters", "test_disable_adapters_with_merging"),
        ("PST r=0",),
        "importance alone changes nothing before the schedule asks for zeros, and the test never moves it",
    ),
    Excluded(
        ("test_disable_adapters", "test_disable_adapters_with_merging"),
        ("PST sparse",),
        "asks that a new adapter changes nothing, and this one is pruned from the start",
    ),
    Excluded(
        ("test_parameters_after_loading_model", "test_only_params_are_updated"),
        ("PST 4", "PST regex", "PST global", "PST rank_pattern"),
        "SGD at a rate of 0.5 on inputs of up to 90 diverges when both layers train: LoRA's parameters reach 1e20 "
        "after the three steps, and PST's may overflow",
        always=False,
    ),
    Excluded(
        ("test_only_params_are_updated",),
        ("PST Embedding", "PST Embedding and Conv1D"),
        "the factor that all tokens share moves by some 1e-5 in the three steps, and the test looks from 1e-4 on",
        always=False,
    ),
)

CUSTOM = """
    ("PST 1", "MLP", PSTConfig, {"target_modules": "lin0"}),
    ("PST 2", "MLP", PSTConfig, {"target_modules": ["lin0"]}),
    ("PST 3", "MLP", PSTConfig, {"target_modules": ["lin1"], "r": 2}),
    ("PST 4", "MLP", PSTConfig, {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("PST regex", "MLP", PSTConfig, {"target_modules": r"lin\\d"}),
    ("PST modules_to_save", "MLP", PSTConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("PST r=0", "MLP", PSTConfig, {"target_modules": ["lin0"], "r": 0}),
    ("PST score_rank=0", "MLP", PSTConfig, {"target_modules": ["lin0"], "score_rank": 0}),
    ("PST unstructured", "MLP", PSTConfig, {"target_modules": ["lin0"], "structured": False}),
    ("PST 2:4", "MLP", PSTConfig, {"target_modules": ["lin1"], "r": 2, "pattern": "2:4"}),
    ("PST rows", "MLP", PSTConfig, {"target_modules": ["lin0"], "pattern": "rows"}),
    ("PST global", "MLP", PSTConfig, {"target_modules": ["lin0", "lin1"], "r": 2, "scope": "global"}),
    ("PST held", "MLP", PSTConfig, {"target_modules": ["lin0"], "mask_interval": None}),
    ("PST residual", "MLP", PSTConfig, {"target_modules": ["lin0"], "residual": 4}),
    ("PST rank_pattern", "MLP", PSTConfig, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}}),
    ("PST sparse", "MLP", PSTConfig, {"target_modules": ["lin0"], "initial_sparsity": 0.3}),
    ("PST Conv1D", "EmbConv1D", PSTConfig, {"target_modules": ["conv1d"], "r": 1}),
    ("PST Embedding", "EmbConv1D", PSTConfig, {"target_modules": ["emb"], "r": 2}),
    ("PST Embedding and Conv1D", "EmbConv1D", PSTConfig, {"target_modules": ["emb", "conv1d"], "r": 1}),
    ("PST Embedding updated", "EmbConv1D", PSTConfig, {"target_modules": ["conv1d"], "embedding_modules": ["emb"]}),
    ("PST Conv1d", "Conv1d", PSTConfig, {"target_modules": ["conv1d"], "r": 1}),
    ("PST Conv2d", "Conv2d", PSTConfig, {"target_modules": ["conv2d"]}),
    ("PST Conv2d and linear", "Conv2d", PSTConfig, {"target_modules": ["conv2d", "lin0"], "r": 2}),
    ("PST Conv2d groups", "Conv2dGroups", PSTConfig, {"target_modules": ["conv2d"], "r": 1}),
    ("PST Conv3d", "Conv3d", PSTConfig, {"target_modules": ["conv3d"], "r": 2}),
    ("PST MHA", "MHA", PSTConfig, {"target_modules": ["mha"]}),
    ("PST MHA and linear", "MHA", PSTConfig, {"target_modules": ["mha", "lin0"], "r": 2}),
    ("PST parameters", "MlpUsingParameters", PSTConfig, {"target_parameters": ["lin0.weight"], "target_modules": []}),
"""
SEVERAL = """
    ("PST Same", "pst", PSTConfig, {"target_modules": ["lin0"], "init_weights": False},
     {"target_modules": ["lin0"], "init_weights": False}),
    ("PST Different", "pst", PSTConfig, {"target_modules": ["lin0"], "init_weights": False},
     {"target_modules": ["lin1"], "r": 2, "init_weights": False}),
    ("PST Sparse", "pst", PSTConfig, {"target_modules": ["lin0"], "init_weights": False, "initial_sparsity": 0.3},
     {"target_modules": ["lin0"], "init_weights": False, "initial_sparsity": 0.6}),
"""
EXPERTS = """
    ("trl-internal-testing/tiny-Llama4ForCausalLM", PSTConfig,
     {"task_type": TaskType.CAUSAL_LM, "target_modules": [], "target_parameters": ["feed_forward.experts.down_proj"]}),
    ("trl-internal-testing/tiny-Llama4ForCausalLM", PSTConfig,
     {"task_type": TaskType.CAUSAL_LM, "target_modules": [],
      "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]}),
    ("trl-internal-testing/tiny-GptOssForCausalLM", PSTConfig,
     {"task_type": TaskType.CAUSAL_LM, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
"""


def _rows(task: str) -> str:
    """Every kind of adapter, on the default targets."""
    options = ({}, {"r": 0}, {"score_rank": 0}, {"pattern": "2:4"}, {"mask_interval": None, "scope": "global"})
    return "".join(f"(PSTConfig, { ({'task_type': task, 'target_modules': None} | more)!r}),\n" for more in options)


INSERTED = {
    "test_custom_models.py": [("TEST_CASES = [", CUSTOM), ("MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [", SEVERAL)],
    "test_config.py": [("ALL_CONFIG_CLASSES = (", "(PSTConfig, {}),\n")],
    "test_decoder_models.py": [("ALL_CONFIGS = [", _rows("CAUSAL_LM"))],
    "test_encoder_decoder_models.py": [("ALL_CONFIGS = [", _rows("SEQ_2_SEQ_LM"))],
    "test_feature_extraction_models.py": [("ALL_CONFIGS = [", _rows("FEATURE_EXTRACTION"))],
    "test_seq_classifier.py": [("ALL_CONFIGS = [", _rows("SEQ_CLS"))],
    "test_target_parameters.py": [("ALL_CONFIGS = [", EXPERTS)],
    "test_token_classification_qa.py": [
        ("    return [", '(PSTConfig, {"task_type": task_type, "target_modules": None}),\n')
    ],
}


def main() -> None:
    """Fetch the tests, unless their folder is given, and run them with what else is given to pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="folder of PEFT's source archive, if it is there already")
    parser.add_argument("--work", type=Path, help="folder to run in; a temporary one if left open")
    options, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(exist_ok=True)
        copy_tests(options.source or fetch_source(work), work)
        make_hub(work / "hub")
        sys.exit(run(work, further))


def fetch_source(folder: Path) -> Path:
    """PEFT's source archive of the installed version, unpacked."""
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*pip, "--no-build-isolation", "--dest", str(folder), f"peft=={version}"], check=True)
    with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"peft-{version}"


def copy_tests(source: Path, work: Path) -> None:
    """Copy the tests that try every method, with rows for PST."""
    tests = work / "tests"
    tests.mkdir(exist_ok=True)
    (tests / "__init__.py").touch()
    for name in ("testing_common.py", "testing_utils.py"):
        (tests / name).write_text((source / "tests" / name).read_text())
    with (tests / "testing_utils.py").open("a") as file:  # it goes online once for each model
        file.write("\nfrom contextlib import nullcontext as hub_online_once\n")
    for name, places in INSERTED.items():
        text = (source / "tests" / name).read_text()
        for place, rows in places:
            if text.count(f"\n{place}") != 1:
                raise SystemExit(f"tests/{name} of this PEFT has no line {place!r} of its own to put rows below.")
            text = text.replace(f"\n{place}", f"\n{place}\n{rows}")
        start = re.search(r"^(from|import) (?!__future__)", text, re.MULTILINE)
        assert start is not None
        (tests / name).write_text(f"{text[: start.start()]}from peft_pst import PSTConfig\n{text[start.start() :]}")


def run(work: Path, further: list[str]) -> int:
    """Run the rows of PST; how pytest ended."""
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "HF_HOME": str(work / "home"),
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite", "--rootdir", str(work), "-W", "ignore", *further]
    return subprocess.run([*command, "tests"], cwd=work, env=environment, check=False).returncode


def pytest_collection_modifyitems(config: Any, items: list[pytest.Item]) -> None:
    """Keep what tries PST, and expect what is excluded to fail."""
    ours = [item for item in items if "PST" in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours
    for item in ours:
        for excluded in EXCLUDED:
            if excluded.is_about(item.name):
                item.add_marker(pytest.mark.xfail(reason=excluded.reason, strict=excluded.always))


def make_hub(folder: Path) -> None:
    """Write tiny random models where transformers looks for what it had downloaded before."""
    for name, saved in _saved():
        kept = folder / f"models--{name.replace('/', '--')}"
        snapshot = kept / "snapshots" / ("0" * 40)
        if snapshot.exists():
            continue
        (kept / "refs").mkdir(parents=True, exist_ok=True)
        for revision in ("main", "test"):
            (kept / "refs" / revision).write_text("0" * 40)
        saved.save_pretrained(snapshot)


def _saved() -> Iterator[tuple[str, Any]]:
    import peft
    import torch
    import transformers as t

    torch.manual_seed(0)
    text = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    encoder = text | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    decoder = encoder | {"num_key_value_heads": 2}
    gpt = text | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    t5 = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    bart = text | {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
    }
    yield "peft-internal-testing/tiny-opt-lora-revision", peft.LoraConfig()
    opt = t.OPTConfig(**{**encoder, "ffn_dim": 64, "word_embed_proj_dim": 32})
    peft_, trl, hf = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
    yield f"{peft_}/tiny-random-OPTForCausalLM", t.OPTForCausalLM(opt)
    yield f"{peft_}/opt-125m", t.OPTForCausalLM(opt)
    for name in (f"{peft_}/tiny-random-GPT2LMHeadModel", f"{hf}/tiny-random-gpt2"):
        yield name, t.GPT2LMHeadModel(t.GPT2Config(**gpt))
    yield f"{peft_}/tiny-random-GPTJForCausalLM", t.GPTJForCausalLM(t.GPTJConfig(**gpt, rotary_dim=4))
    for name in (f"{trl}/tiny-random-LlamaForCausalLM", f"{peft_}/tiny-random-LlamaForCausalLM"):
        yield name, t.LlamaForCausalLM(t.LlamaConfig(**decoder))
    yield f"{peft_}/tiny-dummy-qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**decoder))
    yield f"{hf}/tiny-random-MistralForCausalLM", t.MistralForCausalLM(t.MistralConfig(**decoder))
    gemma = t.Gemma3TextConfig(**decoder, head_dim=8)
    yield f"{hf}/tiny-random-Gemma3ForCausalLM", t.Gemma3ForCausalLM(gemma)
    for end in ("-calibrated", ""):
        made = t.T5ForConditionalGeneration(t.T5Config(**t5, decoder_start_token_id=0))
        yield f"{peft_}/tiny-random-T5ForConditionalGeneration{end}", made
    yield f"{peft_}/tiny-random-BartForConditionalGeneration", t.BartForConditionalGeneration(t.BartConfig(**bart))
    yield f"{peft_}/tiny-random-BertModel", t.BertModel(t.BertConfig(**encoder))
    yield f"{peft_}/tiny-random-RobertaModel", t.RobertaModel(t.RobertaConfig(**encoder))
    yield f"{peft_}/tiny-random-DebertaModel", t.DebertaModel(t.DebertaConfig(**encoder))
    yield f"{peft_}/tiny-random-DebertaV2Model", t.DebertaV2Model(t.DebertaV2Config(**encoder))
    for kind in ("Bert", "Roberta"):
        made = getattr(t, f"{kind}ForSequenceClassification")(getattr(t, f"{kind}Config")(**encoder))
        yield f"{peft_}/tiny-random-{kind}ForSequenceClassification", made
    llama = t.LlamaForSequenceClassification(t.LlamaConfig(**decoder))
    yield f"{trl}/tiny-LlamaForSequenceClassification-3.2", llama
    llama4 = t.Llama4TextConfig(**decoder, head_dim=8, intermediate_size_mlp=64, num_local_experts=4)
    yield f"{trl}/tiny-Llama4ForCausalLM", t.Llama4ForCausalLM(llama4)
    gpt_oss = t.GptOssConfig(**decoder, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    yield f"{trl}/tiny-GptOssForCausalLM", t.GptOssForCausalLM(gpt_oss)


if __name__ == "__main__":
    main()
