"""PST as a method of PEFT: entered once, refused with a reason, and known to a new process by its import alone."""

from __future__ import annotations

import enum
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import (
    LoraModel,
    PeftConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file
from tiny_models import (
    logits,
    outputs,
    pruned_net,
    tiny_bert,
    train_a_little,
)
from transformers import (
    AutoModelForSequenceClassification,
)

import peft_pst
from peft_pst import PSTConfig, PSTModel
from peft_pst import _registration as registration
from peft_pst.config import PSTPeftType


def run_python(code: str, *arguments: object) -> str:
    """Run code in a new process that knows the package by its import alone."""
    root = str(Path(peft_pst.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_registered_under_the_name_and_the_prefix() -> None:
    for key in (PSTPeftType.PST, "PST"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is PSTConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is PSTModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "pst_"


def test_registering_again_is_harmless() -> None:
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    registration.register()
    importlib.reload(registration)
    importlib.reload(peft_pst)
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    assert outputs(pruned_net()).isfinite().all()


@pytest.mark.parametrize("version", ["0.20.0", "0.9.1", "0.21.0rc1"])
def test_peft_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs peft>=0\.21\.0, but peft {version} is installed; run `pip install"):
        registration.register()


def test_tuner_name_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PSTPeftType.PST, LoraModel)
    with pytest.raises(ImportError, match="already has a method named PST or with the prefix pst_"):
        registration.register()


def test_prefix_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.LORA, "pst_")
    with pytest.raises(ImportError, match="already has a method named PST or with the prefix pst_"):
        registration.register()


def test_name_taken_by_a_later_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "PeftType", enum.Enum("PeftType", {"LORA": "LORA", "PST": "PST"}))
    with pytest.raises(ImportError, match="Upgrade peft_pst, or install an older peft"):
        registration.register()


IN_A_NEW_PROCESS = """
import importlib, pickle, sys
from pathlib import Path
import peft_pst, torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

folder = Path(sys.argv[1])
tokens = torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])
base = AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()
models = {
    "loaded": PeftModel.from_pretrained(base, folder / "adapter"),
    "auto": AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter"),
    "pickled": pickle.loads((folder / "model.pickle").read_bytes()),
    "merged": AutoModelForSequenceClassification.from_pretrained(folder / "merged"),
}
assert pickle.loads((folder / "config.pickle").read_bytes()) == PeftConfig.from_pretrained(folder / "adapter")
with torch.no_grad():
    save_file({name: model.eval()(input_ids=tokens).logits for name, model in models.items()}, folder / "logits")
print(models["loaded"].get_sparsity())
# All that hold a class of the reloaded modules, each after those that it imports.
names = "config plan layer group_selection module linear swapped hosts quantised kinds loading targets scope units"
for name in (*names.split(), "model", "_registration"):
    importlib.reload(importlib.import_module(f"peft_pst.{name}"))
importlib.reload(peft_pst)
again = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")
assert type(again.base_model) is peft_pst.PSTModel
"""


@pytest.mark.slow
def test_a_new_process_gives_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    """Saved in mid-schedule: loaded by path, by AutoPeft, pickled whole, and merged."""
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, PSTConfig(target_sparsity=0.8, total_steps=10, task_type="SEQ_CLS")).eval()
    train_a_little(model, step=3)
    assert 0 < model.get_sparsity() < 0.8
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(PeftConfig.from_pretrained(tmp_path / "adapter")))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    sparsity = model.get_sparsity()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert float(run_python(IN_A_NEW_PROCESS, tmp_path)) == sparsity
    results = load_file(tmp_path / "logits")
    assert set(results) == {"loaded", "auto", "pickled", "merged"}
    for name, result in results.items():
        assert torch.equal(result, expected), name
