"""What compact files take of a model of BERT-base's shape, for the table in docs/compact-files.md.

    python benchmarks/compact_sizes.py --output benchmarks/results/compact_sizes  # under a minute, 400 MB

Nothing is downloaded and nothing trained: sizes depend on shapes, type and number of zeros alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from peft_pst import PSTConfig, compact_checkpoint, report_model
from peft_pst.json_file import write_json
from peft_pst.packing import compact_ratio

SPARSITIES = (0.5, 0.9)
HEADER = """| zeros | the {matrices} matrices | in theory | the whole file | dense |
|---|---|---|---|---|"""


def measure(config: BertConfig, sparsity: float, folder: Path) -> dict[str, Any]:
    """Bytes of a model in bf16 whose block matrices are pruned, dense and compact, from the files."""
    torch.manual_seed(0)
    model = get_peft_model(BertModel(config).to(torch.bfloat16), PSTConfig(initial_sparsity=sparsity))
    rows = report_model(model).layers
    model.merge_and_unload().save_pretrained(folder / "dense")
    compact_checkpoint(folder / "dense", folder / "compact")
    stored = _stored_bytes(folder / "compact" / "compact.safetensors")
    names = [f"{row.name}.weight" for row in rows]
    return {
        "sparsity": sparsity,
        "matrices": len(rows),
        "zeros": sum(row.zeros for row in rows),
        "matrices_dense": sum(row.weights for row in rows) * torch.bfloat16.itemsize,
        "matrices_compact": sum(stored[f"{name}.pst_{part}"] for name in names for part in ("mask", "values")),
        "theory": compact_ratio(8 * torch.bfloat16.itemsize, sparsity),
        "file_dense": (folder / "dense" / "model.safetensors").stat().st_size,
        "file_compact": (folder / "compact" / "compact.safetensors").stat().st_size,
    }


def _stored_bytes(file: Path) -> dict[str, int]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as the page shows it."""
    lines = [HEADER.format(matrices=rows[0]["matrices"])]
    for row in rows:
        matrices, file = row["matrices_compact"], row["file_compact"]
        lines.append(
            f"| {row['sparsity']:.0%} | {matrices / 1e6:.1f} MB, {matrices / row['matrices_dense']:.2%} | "
            f"{row['theory']:.2%} | {file / 1e6:.1f} MB, {file / row['file_dense']:.1%} | "
            f"{row['file_dense'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for compact_sizes.json")
    output = parser.parse_args().output
    rows = []
    for sparsity in SPARSITIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(BertConfig(), sparsity, Path(folder)))
    print(table(rows), end="")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_json(
            output / "compact_sizes.json", {"model": "BertModel(BertConfig())", "dtype": "bfloat16", "rows": rows}
        )


if __name__ == "__main__":
    main()
