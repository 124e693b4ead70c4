"""What an adapter folder's README.md says about PST: how to load it, how sparse it is, how good."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

CARD_NAME = "README.md"
TAGS = ("peft_pst", "pruning", "sparsity")
_BEGIN, _END = "<!-- peft_pst: begin{name} -->", "<!-- peft_pst: end{name} -->"
_SETTINGS = ("target_sparsity", "pattern", "scope", "r", "score_rank", "structured", "residual", "mask_interval")

_SECTION = """{begin}
## Sparse training{title}

An adapter for `{base}`, trained with parameter-efficient sparse training
([PST](https://arxiv.org/abs/2205.11005)) by the package `peft_pst`. {zeros}

`import peft_pst` teaches PEFT the method; without this line loading ends in `KeyError: 'PST'`.

```python
import peft_pst
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder{below}")
pruned = model.merge_and_unload()  # a plain model with the zeros in it, which loads without peft_pst
```

{tables}
{end}"""


class StoredZeros(NamedTuple):
    """The zeros that an adapter's file puts in force.

    Attributes:
        layers: number of adapted matrices.
        zeros: their zeros.
        weights: their entries; None if the file does not say, as for an adapter that is nothing but a residual.
    """

    layers: int
    zeros: int
    weights: int | None

    def __str__(self) -> str:
        share = "" if self.weights is None else f" ({self.zeros / self.weights:.2%})"
        of = "entries" if self.weights is None else f"of {self.weights:,} entries"
        return f"With it, {self.zeros:,} {of}{share} of {self.layers} weight matrices are exactly zero."


def update_model_card(folder: str | Path, metrics: Mapping[str, float] | None = None) -> None:
    """Say in an adapter folder's README.md what the adapter is, how it is loaded, how sparse and how good it is.

    `save_pretrained`, and with it `push_to_hub`, of models and of a `Trainer`, does so by itself, without metrics. The
    section is written anew each time; the rest of the card is left alone.

    Args:
        folder: what `save_pretrained` wrote, with `adapter_config.json`; a card is made if there is none.
        metrics: results to show, by name, such as what `Trainer.evaluate` returns.

    Raises:
        FileNotFoundError: if the folder holds no adapter.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> config = PSTConfig(target_modules=["0"], initial_sparsity=0.5)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     update_model_card(folder, {"accuracy": 0.93})
        ...     card = Path(folder, "README.md").read_text()
        >>> "With it, 16 of 32 entries (50.00%) of 1 weight matrices are exactly zero." in card
        True
    """
    folder = Path(folder)
    _write_section(folder / CARD_NAME, folder, metrics)


def update_card_above(folder: Path) -> None:
    """Say the same of an adapter that `PeftModel.save_pretrained` has put into a folder of its name, in the card above.

    Args:
        folder: of the adapter. A card above it that is not PEFT's is left alone.
    """
    path = folder.parent / CARD_NAME
    was_saved = (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and path.is_file()
    if was_saved and ModelCard.load(path).data.library_name == "peft":
        _write_section(path, folder)


def _write_section(path: Path, folder: Path, metrics: Mapping[str, float] | None = None) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData(library_name="peft"))
    card.data["tags"] = sorted({*(card.data.tags or ()), *TAGS})
    name = "" if folder == path.parent else folder.name
    section = _section(config, stored_zeros(folder / SAFETENSORS_WEIGHTS_NAME), metrics, name)
    card.text = _insert(card.text, section, name)
    card.save(path)


def keep_section_in_cards() -> None:
    """Have PEFT's models write PST's section too when they finish a card; to ask for it again is harmless.

    A `Trainer` that pushes to the hub writes its own card over that of the adapter, lets the `PeftModel` add what it
    has to say, and uploads the folder. This method of `PeftModel` is all that runs in between.
    """
    write = PeftModel.create_or_update_model_card
    if hasattr(write, "__wrapped__"):
        return

    @wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write(self, output_dir)
        _restore_section(Path(output_dir))

    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]


def _restore_section(folder: Path) -> None:
    path = folder / CARD_NAME
    if _BEGIN.partition("{")[0] in path.read_text(encoding="utf-8"):
        return
    for each in (folder, *sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))):
        # What is just being saved has none yet, or one that was never finished: it comes last and writes the section.
        with suppress(FileNotFoundError, ValueError, SafetensorError):
            if json.loads((each / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type") == "PST":
                _write_section(path, each)


def stored_zeros(file: Path) -> StoredZeros | None:
    """The zeros of an adapter file; None where there is no safetensors file."""
    if not file.is_file():
        return None
    layers: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    zeros = 0
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  # not a dict
            layer, _, part = key.rpartition(".")
            if part.startswith("pst_") and not part.startswith("pst_embedding_"):
                layers[layer][part] = tuple(tensors.get_slice(key).get_shape())
            if part == "pst_num_pruned":
                zeros += int(tensors.get_tensor(key).sum())
    sizes = [_size(parts) for parts in layers.values()]
    known = [size for size in sizes if size is not None]
    weights = sum(known) if len(known) == len(sizes) else None
    if weights == 0:
        return None  # a process that saves its shards elsewhere writes a file without tensors
    return StoredZeros(len(layers), zeros, weights)


def _size(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Entries of the matrix (out, in) that factors of these shapes belong to."""
    for left, right in (("pst_U", "pst_V"), ("pst_A", "pst_B"), ("pst_R", "pst_C")):
        if left in shapes:
            return shapes[left][0] * shapes[right][-1]
    return None


def _section(
    config: Mapping[str, Any], zeros: StoredZeros | None, metrics: Mapping[str, float] | None, name: str
) -> str:
    tables = [_table("Setting", {name: config[name] for name in _SETTINGS if name in config})]
    if metrics:
        tables.insert(0, _table("Result", metrics))
    base = config.get("base_model_name_or_path") or "a model that has no name"
    text = "" if zeros is None else str(zeros)
    begin, end = _marks(name)
    title, below = (f": adapter `{name}`", f"/{name}") if name else ("", "")
    joined = "\n\n".join(tables)
    return _SECTION.format(begin=begin, end=end, title=title, below=below, base=base, zeros=text, tables=joined)


def _marks(name: str) -> tuple[str, str]:
    """Before and after the section of an adapter, "" being that of the folder itself."""
    named = f" {name}" if name else ""
    return _BEGIN.format(name=named), _END.format(name=named)


def _table(title: str, rows: Mapping[str, Any]) -> str:
    cells = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in rows.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *cells])


def _insert(text: str, section: str, name: str) -> str:
    """The text with the section in its old place, or else after the title."""
    begin, end = _marks(name)
    before, found, rest = text.partition(begin)
    if found:
        return before + section + rest.partition(end)[2]
    lines = text.splitlines()
    after_title = next((index + 1 for index, line in enumerate(lines) if line.startswith("# ")), 0)
    return "\n".join([*lines[:after_title], "", section, *lines[after_title:]])
