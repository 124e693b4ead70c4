"""Pruned linear layers of a merged model computed by whatever a measurement says is fastest here, sparse or dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from .json_file import write_json
from .kernel_timing import time_kernels
from .linear import is_linear
from .masking import count_zeros
from .sparse_kernels import KERNELS, LinearKernel
from .tables import draw_table

AS_IS = next(iter(KERNELS))
# A kernel that is hardly faster in one measurement may be slower in the next.
_LEAST_GAIN = 1.05


@dataclass(frozen=True)
class LayerChoice:
    """What was measured for one pruned layer, and what computes it now.

    Attributes:
        name: of the layer in the model.
        shape: (out_features, in_features).
        sparsity: fraction of zeros, in [0, 1].
        rows: rows of input that it was measured with, batch x tokens; 0 where the sample never reached it.
        kernel: name in `KERNELS`; "dense" where the layer stayed as it was.
        seconds: of one call, by kernel; empty where nothing was measured.
        refusals: why the other kernels do not take this matrix, by kernel.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    rows: int
    kernel: str
    seconds: Mapping[str, float]
    refusals: Mapping[str, str]

    @property
    def best_dense(self) -> str | None:
        """The fastest kernel that multiplies by the zeros too."""
        return min(
            (name for name in self.seconds if not KERNELS[name].is_sparse), key=self.seconds.__getitem__, default=None
        )

    @property
    def over_best_dense(self) -> float | None:
        """How many times faster the layer is than the best dense choice would be; 1 where that was chosen."""
        return self.seconds[self.best_dense] / self.seconds[self.kernel] if self.best_dense else None

    @property
    def over_as_is(self) -> float | None:
        """How many times faster the layer is than it was."""
        return self.seconds[AS_IS] / self.seconds[self.kernel] if AS_IS in self.seconds else None


@dataclass(frozen=True)
class InferenceReport:
    """What `sparse_inference` chose, layer by layer.

    Attributes:
        layers: the pruned layers, in the order of the model.
        threads: torch's threads while measuring.
        others: number of linear layers that hold too few zeros to be looked at.
    """

    layers: tuple[LayerChoice, ...]
    threads: int
    others: int

    @property
    def replaced(self) -> tuple[LayerChoice, ...]:
        """Layers that something else computes now."""
        return tuple(layer for layer in self.layers if layer.kernel != AS_IS)

    @property
    def sparse(self) -> tuple[LayerChoice, ...]:
        """Layers that a sparse kernel computes now."""
        return tuple(layer for layer in self.layers if KERNELS[layer.kernel].is_sparse)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the ratios included."""
        rows = [
            {**asdict(layer), "over_best_dense": layer.over_best_dense, "over_as_is": layer.over_as_is}
            for layer in self.layers
        ]
        return {"threads": self.threads, "others": self.others, "layers": rows}

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; an interrupted write leaves the old file whole."""
        write_json(path, self.to_dict())

    def to_table(self) -> str:
        """A table for the terminal, one line a layer, and what the whole comes to in a sentence."""
        rows = [
            (
                layer.name,
                f"{layer.shape[0]:,} x {layer.shape[1]:,}",
                f"{100 * layer.sparsity:.1f} %",
                f"{layer.rows:,}",
                layer.kernel,
                _microseconds(layer.seconds.get(layer.kernel)),
                layer.best_dense or "",
                _ratio(layer.over_best_dense),
                _ratio(layer.over_as_is),
            )
            for layer in self.layers
        ]
        header = ("layer", "out x in", "zeros", "rows", "kernel", "µs", "best dense", "over it", "over as is")
        footer = ("all", "", "", "", f"{len(self.sparse)} sparse", *_sums(self.layers))
        return "\n".join([*draw_table(header, rows, footer, left=(0, 4, 6)), "", self.verdict()])

    def verdict(self) -> str:
        """Whether the zeros pay, in a sentence."""
        if not self.layers:
            return "No layer holds enough zeros for a sparse kernel; nothing was changed."
        count, total = len(self.sparse), len(self.layers)
        dense = sum(layer.kernel != AS_IS for layer in self.layers) - count
        repacked = f" {dense} dense ones are packed anew." if dense else ""
        if not count:
            return f"Sparsity does not pay here: no sparse kernel beats the best dense choice in any layer.{repacked}"
        return f"Sparsity pays in {count} of {total} pruned layers at this number of rows.{repacked}"


class SparseLinear(nn.Module):
    """Stands where a linear layer stood, and computes it with another kernel; for inference only.

    The layer it replaces is kept without its weight and gets it back from `dense_again`, bit for bit but for the sign
    of zeros. `state_dict` gives the dense weight under the layer's own names, so that what is saved is a plain model;
    loading into it, and moving or casting it, are refused.
    """

    bias: Tensor | None
    dtype: torch.dtype
    device: torch.device
    _layer: Any

    def __init__(self, layer: Any, kernel: LinearKernel) -> None:
        super().__init__()
        self.in_features, self.out_features = _logical_weight(layer).shape[::-1]
        self.kernel = kernel
        self.bias = layer.bias
        self.dtype, self.device = layer.weight.dtype, layer.weight.device
        object.__setattr__(self, "_layer", layer)  # no submodule: its weight is not there
        layer.weight.data = layer.weight.data.new_empty(0)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # `torch.compile` goes on without this layer
            raise RuntimeError(
                "A layer replaced by sparse_inference() cannot be exported; call dense_again(model) first."
            )
        if torch.is_grad_enabled():
            self._check_no_gradients(x)
        if x.dtype != self.dtype or torch.is_autocast_enabled(x.device.type):
            return self._forward_autocast(x)
        if x.ndim == 2 and len(x):
            return self.kernel(x, self.bias)
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.kernel(x.reshape(-1, self.in_features), self.bias).view(*x.shape[:-1], self.out_features)

    def _check_no_gradients(self, x: Tensor) -> None:
        tensors = (x, self.bias, self._layer.weight)
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                "This layer was replaced by sparse_inference() and computes no gradients; call the model under "
                "torch.no_grad(), or dense_again(model) to train it."
            )

    def _forward_autocast(self, x: Tensor) -> Tensor:
        """In the layer's own precision, since no kernel is known to autocast."""
        if not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(f"The input is {x.dtype}, but this layer computes in {self.dtype}; cast one of them.")
        with torch.autocast(x.device.type, enabled=False):
            return self.forward(x.to(self.dtype))

    @property
    def weight(self) -> Tensor:
        """The weight as it is stored, for code that asks for its dtype or its device; dense where these differ."""
        stored = self.kernel.stored
        has_shape = stored.shape == (self.out_features, self.in_features) and not isinstance(self._layer, Conv1D)
        return stored if has_shape and stored.dtype == self.dtype else self.dense_weight()

    def dense_weight(self) -> Tensor:
        """A copy of the weight as the layer had it: (out, in), or (in, out) of a `Conv1D`."""
        weight = self.kernel.dense_weight()
        return weight.T.contiguous() if isinstance(self._layer, Conv1D) else weight.contiguous()

    def restored(self) -> nn.Module:
        """The layer that was replaced, its parameter holding the weight again."""
        self._layer.weight.data = self.dense_weight()
        return self._layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={_name_of(self.kernel)!r}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        *_, error_messages = others
        error_messages.append(f"{prefix}weight is computed by a packed kernel; call dense_again(model) before loading.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (probe.dtype, probe.device) != (self.dtype, self.device):
            raise RuntimeError(
                f"A layer replaced by sparse_inference() stays {self.dtype} on {self.device}; call dense_again(model), "
                f"then move the model to {probe.dtype} on {probe.device}, and choose anew there."
            )
        return self


@torch.no_grad()
def sparse_inference(
    model: nn.Module,
    sample: Mapping[str, Any] | None = None,
    *,
    rows: int = 1,
    kernel: str | None = None,
    min_sparsity: float = 0.5,
    repeats: int = 9,
    progressbar: bool = False,
) -> InferenceReport:
    """Replace the pruned linear layers of a merged model where another kernel is faster on this machine.

    Each pruned layer is computed by every kernel of `KERNELS` that takes its matrix, in turns, with as many rows of
    input as it will meet, in as many threads as torch has. The fastest stays, if it gains at least 5 % on the layer as
    it is, and a sparse one if it gains as much on the best dense layout. The model is changed in place; its outputs
    stay the same within rounding. `dense_again` undoes it.

    Args:
        model: in evaluation mode, without adapters.
        sample: a batch as the model is called with, `model(**sample)`; each layer is then measured with the rows that
            it gets from it. Without one, all are measured with `rows`.
        rows: rows of input, batch x tokens: 1 for generating one sequence token by token, 128 for one sequence of 128.
        kernel: name of the kernel to use wherever it takes the matrix, without any measurement.
        min_sparsity: layers with a smaller fraction of zeros are left alone, in [0, 1].
        repeats: timed calls of each kernel.
        progressbar: whether to show progress on a terminal.

    Returns:
        What was chosen and measured. Layers of the same shape, within one percent of zeros, share a measurement.

    Raises:
        ValueError: if the model still carries adapters, is in training mode or was replaced before, `kernel` is none of
            `KERNELS` or takes no layer, or a number is out of its range. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64, bias=False)).eval()
        >>> _ = nn.init.eye_(model[0].weight)
        >>> report = sparse_inference(model, kernel="csr")
        >>> report.layers[0].kernel, model[0]
        ('csr', SparseLinear(in_features=64, out_features=64, kernel='csr'))
        >>> with torch.no_grad():
        ...     torch.equal(model(torch.ones(2, 64)), torch.ones(2, 64))
        True
        >>> dense_again(model)[0]
        Linear(in_features=64, out_features=64, bias=False)
    """
    _check(model, rows, kernel, min_sparsity)
    pruned, others = _pruned_linears(model, min_sparsity)
    counts = dict.fromkeys(pruned, rows) if sample is None else _traced_rows(model, sample, pruned)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    contests: dict[tuple[Any, ...], dict[str, float]] = {}
    choices = []
    for name, layer in tqdm(
        pruned.items(), desc="measuring", unit="layer", leave=False, disable=None if progressbar else True
    ):
        choices.append(_choose(name, layer, counts[name], kernel, repeats, weight_bytes, contests))
    if kernel not in (None, AS_IS) and not any(choice.kernel == kernel for choice in choices):
        raise ValueError(_nothing_to_do(str(kernel), min_sparsity, choices))
    for choice in choices:
        if choice.kernel != AS_IS:
            _replace(model, choice)
    return InferenceReport(tuple(choices), torch.get_num_threads(), others)


@torch.no_grad()
def dense_again(model: nn.Module) -> nn.Module:
    """Put back the layers that `sparse_inference` replaced, with their own weights; returns the model.

    The modules and parameters are the very ones that were there before.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            model.set_submodule(name, module.restored())
    return model


# Which layers


def _check(model: nn.Module, rows: int, kernel: str | None, min_sparsity: float) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(f"{name} still carries an adapter; merge it first: model = model.merge_and_unload()")
        if isinstance(module, SparseLinear):
            raise ValueError(f"{name} was replaced before; call dense_again(model) first.")
    if model.training:
        raise ValueError(
            "The model is in training mode, and the kernels compute no gradients; call model.eval() first."
        )
    if rows < 1:
        raise ValueError(f"rows={rows}, but a batch has at least 1 row.")
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is none of {', '.join(map(repr, KERNELS))}.")
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity={min_sparsity} is outside [0, 1].")


def _pruned_linears(model: nn.Module, min_sparsity: float) -> tuple[dict[str, Any], int]:
    """The linear layers with enough zeros by name, and the number of those with fewer.

    A layer is left out whose weight has another name too, since that would lose it; one with hooks, which would be
    bypassed; one of another class, which may do more than multiply; and one whose weight is elsewhere.
    """
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[str, Any] = {}
    others = 0
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if type(module) not in (nn.Linear, Conv1D) or not is_linear(module, parent):
            continue
        weight: Any = module.weight
        hooks = (module._forward_pre_hooks, module._forward_hooks)
        is_plain = weight.dtype.is_floating_point and weight.numel() and not weight.is_meta and not any(hooks)
        is_own = bool(name) and names[id(weight)] == 1
        if is_plain and is_own and count_zeros(weight) >= min_sparsity * weight.numel():
            found[name] = module
        else:
            others += 1
    return found, others


def _traced_rows(model: nn.Module, sample: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The most rows that each layer gets in one call; 0 for one that is not called."""
    rows = dict.fromkeys(layers, 0)

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[name] = max(rows[name], inputs[0].numel() // inputs[0].shape[-1])

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    return rows


# Choosing


def _choose(
    name: str,
    layer: Any,
    rows: int,
    kernel: str | None,
    repeats: int,
    weight_bytes: int,
    contests: dict[tuple[Any, ...], dict[str, float]],
) -> LayerChoice:
    weight = _logical_weight(layer)
    sparsity = count_zeros(weight) / weight.numel()
    refusals = {other: reason for other in KERNELS if (reason := KERNELS[other].refusal(weight)) is not None}
    able = [other for other in KERNELS if other not in refusals]
    seconds: dict[str, float] = {}
    if kernel is not None:
        chosen = kernel if kernel in able else AS_IS
    elif rows == 0:
        chosen = AS_IS
    else:
        # Kernels that refuse tell patterns apart, such as blocks from single entries.
        form = (weight.shape, weight.dtype, weight.device, weight.is_contiguous(), layer.bias is None)
        key = (*form, rows, round(sparsity, 2), *able)
        if key not in contests:
            other_bytes = weight_bytes - weight.numel() * weight.element_size()
            contests[key] = time_kernels(weight, layer.bias, rows, able, other_bytes=other_bytes, repeats=repeats)
        seconds = contests[key]
        chosen = _winner(seconds)
    return LayerChoice(name, tuple(weight.shape), sparsity, rows, chosen, seconds, refusals)  # type: ignore[arg-type]


def _winner(seconds: Mapping[str, float]) -> str:
    """The fastest, where it gains enough: on the layer as it is, and if it is sparse, on the best dense kernel."""
    dense = min((name for name in seconds if not KERNELS[name].is_sparse), key=seconds.__getitem__)
    if seconds[AS_IS] < _LEAST_GAIN * seconds[dense]:
        dense = AS_IS
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[dense] >= _LEAST_GAIN * seconds[fastest] else dense


def _replace(model: nn.Module, choice: LayerChoice) -> None:
    layer = model.get_submodule(choice.name)
    packed = KERNELS[choice.kernel](_logical_weight(layer).detach(), max(choice.rows, 1))
    model.set_submodule(choice.name, SparseLinear(layer, packed))


def _nothing_to_do(kernel: str, min_sparsity: float, choices: list[LayerChoice]) -> str:
    if not choices:
        return (
            f"No linear layer holds a fraction of {min_sparsity:g} zeros or more; lower min_sparsity, or prune first."
        )
    first = choices[0]
    return f"kernel={kernel!r} takes none of {len(choices)} pruned layers; of {first.name}: {first.refusals[kernel]}."


def _logical_weight(layer: Any) -> Tensor:
    """(out, in), a view where the layer stores it the other way round."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _name_of(kernel: LinearKernel) -> str:
    return next((name for name, kind in KERNELS.items() if kind is type(kernel)), type(kernel).__name__)


# Text


def _sums(layers: tuple[LayerChoice, ...]) -> Iterator[str]:
    measured = [layer for layer in layers if layer.seconds]
    chosen = sum(layer.seconds[layer.kernel] for layer in measured)
    dense = sum(layer.seconds[layer.best_dense] for layer in measured if layer.best_dense)
    as_is = sum(layer.seconds[AS_IS] for layer in measured)
    yield _microseconds(chosen or None)
    yield ""
    yield _ratio(dense / chosen if measured else None)
    yield _ratio(as_is / chosen if measured else None)


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
