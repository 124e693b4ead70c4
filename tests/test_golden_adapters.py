"""What a release wrote, later ones read: the same masks, and the same numbers up to rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import Net, layers_of

from peft_pst.config import FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = sorted(path.parent for path in GOLDEN.glob("*/*/adapter_config.json"))


def base_of(adapter: Path) -> Net:
    base = Net().eval()
    base.load_state_dict(load_file(adapter.parent / "base.safetensors"))
    return base


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_golden_adapter_loads_as_it_was_saved(adapter: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = PeftModel.from_pretrained(base_of(adapter), str(adapter)).eval()
    assert not [str(warning.message) for warning in recwarn if "Found missing" in str(warning.message)]
    expected = load_file(adapter / "expected.safetensors")
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.get_mask("default"), expected[f"mask.{name}"]), name
    with torch.no_grad():
        torch.testing.assert_close(model(expected["x"]), expected["y"])
    zeros = {name: int((~mask).sum()) for name, mask in expected.items() if name.startswith("mask.")}
    assert min(zeros.values()) > 20
    merged = model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(expected["x"]), expected["y"])


def test_every_layout_has_its_golden_adapters() -> None:
    versions = {json.loads((path / "adapter_config.json").read_text())["format_version"] for path in ADAPTERS}
    assert versions == set(range(1, FORMAT_VERSION + 1))


def changed(adapter: Path, folder: Path, **fields: object) -> str:
    shutil.copytree(adapter, folder / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return str(folder / "adapter")


def test_a_later_layout_is_refused(tmp_path: Path) -> None:
    later = changed(ADAPTERS[0], tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(
        ValueError, match=f"format_version={FORMAT_VERSION + 1} is later than {FORMAT_VERSION}.*upgrade"
    ):
        PeftModel.from_pretrained(base_of(ADAPTERS[0]), later)


def test_a_field_of_a_later_release_is_named_and_left_out(tmp_path: Path) -> None:
    later = changed(ADAPTERS[0], tmp_path, a_field_to_come=3)
    with pytest.warns(UserWarning, match="a_field_to_come"):
        model = PeftModel.from_pretrained(base_of(ADAPTERS[0]), later)
    assert layers_of(model)
