"""Which zeros are there no longer: a model or a checkpoint against the mask that it is supposed to keep."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import StoredTensor, checkpoint_files, stored_tensors
from .embedding import PSTEmbeddingUpdate
from .hosts import PSTHost
from .layer import PSTLayer
from .masking import unpack_mask
from .offloading import at_hand
from .report import REPORT_NAME, SparsityReport
from .sharding import whole, whole_shape
from .tables import comparison_table

Source = nn.Module | str | Path
Reference = nn.Module | str | Path | Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerComparison:
    """What became of the zeros of one matrix.

    Attributes:
        name: name of the layer in the plain model.
        shape: shape of the weight as it is stored.
        reference_zeros: entries that are zero in the reference.
        lost: those of them that are not zero now.
    """

    name: str
    shape: tuple[int, ...]
    reference_zeros: int
    lost: int


@dataclass(frozen=True)
class SparsityComparison:
    """What became of the zeros of a reference.

    Attributes:
        source: what was looked at: a class name, or a path as it was given.
        reference: what it was compared with.
        layers: the matrices that have zeros in the reference.
    """

    source: str
    reference: str
    layers: tuple[LayerComparison, ...]

    @property
    def reference_zeros(self) -> int:
        """Zeros of the reference."""
        return sum(layer.reference_zeros for layer in self.layers)

    @property
    def lost(self) -> int:
        """Zeros of the reference that are not zero now."""
        return sum(layer.lost for layer in self.layers)

    @property
    def lost_layers(self) -> tuple[LayerComparison, ...]:
        """The matrices that lost zeros."""
        return tuple(layer for layer in self.layers if layer.lost)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the sums included."""
        return {
            "source": self.source,
            "reference": self.reference,
            "reference_zeros": self.reference_zeros,
            "lost": self.lost,
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }

    def to_table(self, show_all: bool = False) -> str:
        """A table for the terminal: the matrices that lost zeros, or all, and the sum."""
        return comparison_table(self, show_all)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def compare_sparsity(source: Source, reference: Reference, *, progressbar: bool = False) -> SparsityComparison:
    """Look whether what is zero in a reference still is, one matrix at a time.

    What comes after pruning may undo it without a word: a LoRA that is merged fills nearly every zero, and so does
    another round of training without the mask.

    Args:
        source: a checkpoint (a folder, dense or compact, or one safetensors file) or a live model, plain or with PST
            adapters, which count as if they were merged.
        reference: what is supposed to be zero. A checkpoint or a model, of which the pruned layers count, or, where
            that is not known, the matrices inside numbered blocks; or masks, in a safetensors file or as {name of the
            layer: tensor}, boolean of the weight's shape as stored, or packed as `peft_pst.masking.pack_mask` does it,
            True = keep. The names of one side may lack the first parts of the other's, such as "bert.".
        progressbar: whether to show progress on a terminal.

    Returns:
        The zeros of the reference, matrix by matrix, and how many are lost.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, the reference has no zeros, a matrix of it is missing in `source` or has
            another shape, or another tuner's adapter is not merged.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 2))
        >>> masks = {"0": torch.tensor([[True, False, True, False]] * 2)}
        >>> compare_sparsity(base, masks).layers
        (LayerComparison(name='0', shape=(2, 4), reference_zeros=4, lost=4),)
        >>> base[0].weight.data *= masks["0"]
        >>> compare_sparsity(base, masks).lost
        0
    """
    found = _matrices(source)
    expected = _masks(reference) if isinstance(reference, Mapping) else _pruned_matrices(reference)
    rows = []
    for name, there in tqdm(expected.items(), "comparing", leave=False, disable=None if progressbar else True):
        own_name = _counterpart(name, found, source, reference)
        here = found[own_name]
        zero = there.zeros(here.shape)
        if zero.shape != here.shape:
            raise ValueError(
                f"Layer {name} has shape {tuple(zero.shape)} in {_called(reference)} and {here.shape} in "
                f"{_called(source)}; compare with what was not resized."
            )
        if count := int(zero.count_nonzero()):
            lost = int((zero.to(torch.bool) & ~here.zeros(here.shape).to(zero.device)).count_nonzero())
            rows.append(LayerComparison(own_name, here.shape, count, lost))
    if not rows:
        raise ValueError(f"{_called(reference)} has no zeros in its matrices, so there is nothing to compare.")
    return SparsityComparison(_called(source), _called(reference), tuple(rows))


class _Matrix(NamedTuple):
    """A weight of which it can be asked where it is zero.

    Attributes:
        shape: as stored; () where only the other side can tell.
        zeros: given the shape, where it is zero, boolean of that shape.
    """

    shape: tuple[int, ...]
    zeros: Callable[[tuple[int, ...]], Tensor]


def _called(source: Any) -> str:
    """How messages call a source."""
    if isinstance(source, Mapping):
        return "the masks"
    if isinstance(source, nn.Module):
        return type(source.get_base_model() if isinstance(source, PeftModel) else source).__name__
    return str(source)


def _counterpart(name: str, found: Mapping[str, _Matrix], source: Any, reference: Any) -> str:
    """The matrix of this name, or the one whose name is longer or shorter at its beginning."""
    if name in found:
        return name
    close = [other for other in found if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if len(close) != 1:
        problem = f"could be {' or '.join(close[:3])} in" if close else "is not in"
        raise ValueError(f"Layer {name} of {_called(reference)} {problem} {_called(source)}; pass what belongs to it.")
    return close[0]


def _is_zero(weight: Tensor) -> Tensor:
    return (weight.float() if weight.element_size() == 1 else weight) == 0  # torch compares no 8-bit floats


def _layer_name(key: str) -> str:
    return re.sub(r"\.(weight|mask)$", "", key)


# Where weights and masks come from


def _matrices(source: Source) -> dict[str, _Matrix]:
    if isinstance(source, nn.Module):
        return dict(_of_module(source.get_base_model() if isinstance(source, PeftModel) else source, ""))
    return {
        _layer_name(stored.key): _of_stored(stored)
        for stored in stored_tensors(_files(source))
        if stored.is_floating and len(stored.shape) > 1
    }


def _pruned_matrices(reference: Source) -> dict[str, _Matrix]:
    """Masks, if the file holds such; or the matrices that were pruned, or are likely to have been."""
    if isinstance(reference, nn.Module):
        pruned = {layer.module_name for layer in reference.modules() if isinstance(layer, PSTLayer)}
        return _chosen(_matrices(reference), pruned)
    files = _files(reference)
    masks = {stored.key: stored for stored in stored_tensors(files) if _is_mask(stored)}
    if masks:
        return {_layer_name(key): _of_mask(stored.read) for key, stored in masks.items()}
    promise = files[0].parent / REPORT_NAME
    pruned = {layer.name for layer in SparsityReport.load(promise).layers} if promise.is_file() else set()
    return _chosen(_matrices(reference), pruned)


def _chosen(matrices: dict[str, _Matrix], pruned: set[str]) -> dict[str, _Matrix]:
    pruned = pruned | {name.rpartition(".")[0] for name in pruned}  # the matrices of a stack are named by their numbers
    names = pruned & matrices.keys() or {name for name in matrices if re.search(r"(^|\.)\d+(\.|$)", name)}
    return {name: matrix for name, matrix in matrices.items() if name in names or not names}


def _masks(masks: Mapping[str, Tensor]) -> dict[str, _Matrix]:
    return {_layer_name(key): _of_mask(partial(_itself, mask)) for key, mask in masks.items()}


def _files(path: str | Path) -> list[Path]:
    if (Path(path) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{str(path)!r} is an adapter, without weights of its own; merge it with `peft-pst merge` first."
        )
    return checkpoint_files(path)


def _of_stored(stored: StoredTensor) -> _Matrix:
    return _Matrix(stored.shape, lambda shape: _is_zero(stored.read()))


def _is_mask(stored: StoredTensor) -> bool:
    return (stored.dtype == "BOOL" and len(stored.shape) > 1) or (stored.dtype == "U8" and len(stored.shape) == 1)


def _itself(mask: Tensor) -> Tensor:
    return mask


def _of_mask(read: Callable[[], Tensor]) -> _Matrix:
    def zeros(shape: tuple[int, ...]) -> Tensor:
        mask = read()
        if mask.dtype == torch.uint8:
            numel = torch.Size(shape).numel()
            if mask.shape != ((numel + 7) // 8,):
                raise ValueError(
                    f"A packed mask has shape {tuple(mask.shape)}, but a weight of shape {shape} needs "
                    f"{(numel + 7) // 8} bytes; pass the mask of this model."
                )
            return ~unpack_mask(mask, shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"A mask is {mask.dtype}; pass boolean ones, True = keep, or packed ones.")
        return ~mask

    return _Matrix((), zeros)


def _of_module(module: nn.Module, name: str, without: Collection[str] = ()) -> Iterator[tuple[str, _Matrix]]:
    """The matrices of a module and what is in it, but for some of its own, by their names in the plain model."""
    prefix = f"{name}." if name else ""
    if isinstance(module, PSTLayer):
        yield name, _Matrix(tuple(whole_shape(module._stored)), partial(_zeros_of_layers, [module]))
        return
    if isinstance(module, PSTEmbeddingUpdate):
        shape = tuple(whole_shape(module.weight))
        yield name, _Matrix(shape, lambda shape: _is_zero(module.get_weight_in_force()))
        return
    if isinstance(module, PSTHost):
        for part, matrices in module.matrices.items():
            stored = getattr(module.base_layer, part)
            yield prefix + part, _Matrix(tuple(whole_shape(stored)), partial(_zeros_of_layers, [*matrices]))  # type: ignore[misc]
        yield from _of_module(module.base_layer, name, without=module.matrices.keys())
        return
    if isinstance(module, BaseTunerLayer):
        if not module.merged and not module.disable_adapters:
            raise ValueError(
                f"Layer {name} carries an adapter of {type(module).__module__}, which fills zeros once it is merged; "
                "merge it first, with merge_and_unload() or merge_keeping_zeros()."
            )
        yield from _of_module(module.get_base_layer(), name)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _of_module(_module_in_force(module), name)
        return
    for part, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1 and part not in without:
            key = _layer_name(prefix + part)
            yield key, _Matrix(tuple(parameter.shape), partial(_zeros_at_hand, module, part))
    for child_name, child in module.named_children():
        yield from _of_module(child, prefix + child_name)


def _zeros_at_hand(module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    weight = at_hand(module, name)
    if weight is None:
        raise ValueError(f"The {name} of {type(module).__name__} has no data (meta device); load the model first.")
    return _is_zero(whole(weight))


def _zeros_of_layers(layers: Sequence[PSTLayer], shape: tuple[int, ...]) -> Tensor:
    """Of a layer, or of all matrices of a stack, as it would be stored once merged."""
    return torch.stack([_is_zero(_weight_in_force(layer)) for layer in layers]).reshape(shape)


def _weight_in_force(layer: PSTLayer) -> Tensor:
    """As the layer would store it once merged; of a merged one as it stands, whatever was done to it since."""
    as_it_stands = layer.merged or layer.disable_adapters
    return layer._as_stored(layer.get_stored_weight() if as_it_stands else layer.get_masked_weight())


def _module_in_force(wrapper: Any) -> nn.Module:
    saved = getattr(wrapper, "modules_to_save", {})
    active = [name for name in wrapper.active_adapters if name in saved]
    return saved[active[0]] if active and not wrapper.disable_adapters else wrapper.original_module
