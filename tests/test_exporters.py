"""The exports of docs/inference.md: the stock exporters of ONNX and OpenVINO keep outputs and zeros.

Needs the extra `export` (`make test-integrations`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_bert, tiny_gpt2
from torch import Tensor, nn

from peft_pst import PSTConfig

pytestmark = pytest.mark.slow  # an export takes seconds, however small the model

PAGE = (Path(__file__).parent.parent / "docs" / "inference.md").read_text()
SNIPPETS = re.findall(r"^```python no-run\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
IDS = torch.tensor([[3, 7, 11, 30, 2], [5, 2, 39, 1, 9], [1, 1, 2, 3, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def pruned(base: nn.Module) -> Any:
    config = PSTConfig(target_sparsity=0.9, initial_sparsity=0.9, r=2, score_rank=2)
    return get_peft_model(base, config).merge_and_unload().eval()


def bert() -> Any:
    model = pruned(tiny_bert())
    model.config.max_position_embeddings = 20
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # logits that differ by more than rounding
    return model


def run_snippet(package: str, model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the page's code for a package in a folder of its own; returns the names that it made."""
    (code,) = [snippet for snippet in SNIPPETS if f"import {package}\n" in snippet]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"pruned": model}
    exec(compile(code.replace("max=512", "max=20"), f"docs/inference.md, {package}", "exec"), names)
    return names


@torch.no_grad()
def expected(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def assert_zeros_kept(model: nn.Module, stored: list[np.ndarray]) -> None:
    """Each pruned matrix is there, entry by entry, in one orientation or the other."""
    matrices = [module.weight for name, module in model.named_modules() if re.search(r"\.(query|key|dense)$", name)]
    in_blocks = [weight.detach().numpy() for weight in matrices if (weight == 0).float().mean() > 0.8]
    assert len(in_blocks) == 10
    for weight in in_blocks:
        assert any(np.array_equal(weight, other) or np.array_equal(weight.T, other) for other in stored)


def test_onnx(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    model = bert()
    session = run_snippet("onnxruntime", model, tmp_path, monkeypatch)["session"]
    (logits,) = session.run(None, {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()})
    assert expected(model).std() > 1e-2
    np.testing.assert_allclose(logits, expected(model).numpy(), rtol=1e-4, atol=1e-5)
    graph = onnx.load(tmp_path / "pruned.onnx").graph
    assert_zeros_kept(model, [onnx.numpy_helper.to_array(tensor, str(tmp_path)) for tensor in graph.initializer])


def test_openvino(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    model = bert()
    run_snippet("openvino", model, tmp_path, monkeypatch)
    read = openvino.Core().read_model(tmp_path / "pruned.xml")
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = next(iter(compiled({"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()}).values()))
    np.testing.assert_allclose(logits, expected(model).numpy(), rtol=1e-4, atol=1e-5)
    constants = [node.data for node in read.get_ops() if node.get_type_name() == "Constant"]
    assert_zeros_kept(model, [constant for constant in constants if constant.ndim == 2])


def test_onnx_of_a_model_that_continues_texts(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = pruned(tiny_gpt2())
    model.config.use_cache = False
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=20)}}
    program = torch.onnx.export(model, kwargs={"input_ids": IDS[:2]}, dynamic_shapes=shapes, dynamo=True)
    program.save(tmp_path / "gpt2.onnx")
    (logits, *_) = onnxruntime.InferenceSession(tmp_path / "gpt2.onnx").run(None, {"input_ids": IDS.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(input_ids=IDS).logits.numpy(), rtol=1e-4, atol=1e-5)
