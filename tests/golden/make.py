"""Writes the golden adapters of a release, which every later one must read: python tests/golden/make.py 0.1

Run once when the adapter's layout changes, into a new folder; what a release wrote is never written again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from peft_pst import PSTConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import inputs, layers_of, net, outputs, train_a_little

OPTIONS = {
    "selected": {"sparsity_pattern": {"down": 0.4}, "residual": 5, "bias": "pst_only"},
    "held": {"mask_interval": 4, "modules_to_save": ["head"], "rank_pattern": {"layers.1.up": 3}},
}


def write(folder: Path) -> None:
    folder.mkdir()  # an existing one stays as it is
    save_file(net().state_dict(), folder / "base.safetensors")
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        model = get_peft_model(net(), PSTConfig(target_sparsity=0.6, r=2, score_rank=2, **options))
        train_a_little(model, step=4).eval()
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        masks = {f"mask.{part}": layer.get_mask("default") for part, layer in layers_of(model).items()}
        save_file({"x": inputs(), "y": outputs(model), **masks}, folder / name / "expected.safetensors")


if __name__ == "__main__":
    write(Path(__file__).parent / sys.argv[1])
