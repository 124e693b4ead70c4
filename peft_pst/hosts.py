"""Modules that hold several matrices as parameters and multiply by them themselves: attention, stacks of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import PSTConfig
from .linear import PSTStoredLinear
from .module import PSTModule
from .nesting import check_no_tuner
from .offloading import offload_hook
from .plan import ScheduleStatus
from .sharding import is_partitioned, is_sharded
from .swapped import in_place_of_own
from .tuner_layer import PSTWrapper


class PSTMatrix(PSTModule):
    """PST on one matrix that a module holds as a parameter, or as one slice of a stack of them.

    Args:
        host: the module that holds the parameter; not registered here, since it stands elsewhere in the model.
        host_name: its name in the model.
        parameter_name: the parameter, (out, in), or (matrices, out, in) for a stack.
        index: which matrix of a stack; None where the parameter is one matrix.
        num_parts: equal parts of its rows that are ranked apart.
    """

    # All in `__dict__`, because a module registers what is a module, and its attributes are set after its start.
    _host: nn.Module
    _parameter_name: str
    _index: int | None
    _names: tuple[str, ...]

    def __init__(
        self,
        host: nn.Module,
        host_name: str,
        parameter_name: str,
        index: int | None,
        num_parts: int,
        adapter_name: str,
        config: PSTConfig,
        status: ScheduleStatus,
    ) -> None:
        self.__dict__ |= {"_parameter_name": parameter_name, "_index": index, "num_parts": num_parts}
        stack = f"{host_name}.{parameter_name}"
        name = stack if index is None else f"{stack}.{index}"
        self.__dict__["_names"] = (name, stack, host_name)
        super().__init__(host, adapter_name, config, status, name)

    def _hold_base(self, base_layer: nn.Module) -> None:
        self.__dict__["_host"] = base_layer

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """The module that holds the matrix."""
        return self._host

    @property
    def weight(self) -> Tensor:
        """The base's parameter, for what PEFT asks of a layer."""
        return self._stored

    @property
    def bias(self) -> None:  # type: ignore[override]
        """None: a bias belongs to the host."""

    @property
    def pattern_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def stored_name(self) -> str:
        return self._parameter_name

    def _share(self, stored: Tensor) -> Tensor:
        return stored if self._index is None else stored[self._index]

    @property
    def _is_transposed(self) -> bool:
        # How transformers marks stacks of (in, out).
        return self._index is not None and bool(getattr(self._host, "is_transposed", False))

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T if self._is_transposed else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if self._is_transposed else matrix

    def _keep_dense(self) -> Tensor:
        # Written in place within its stack, and therefore copied also on the CPU.
        return super()._keep_dense() if self._index is None else self._share(self._stored).detach().to("cpu", copy=True)

    def _write(self, values: Tensor) -> None:
        if self._index is None:
            super()._write(values)
        elif is_sharded(self._stored) or is_partitioned(self._stored):
            raise RuntimeError(
                f"Layer {self.module_name}: a stack of matrices that FSDP or DeepSpeed shards cannot be merged or "
                "unmerged; save the adapter, and merge it in one process."
            )
        else:
            with torch.no_grad():
                self._share(self._stored).copy_(values)


class PSTHost(nn.Module, PSTWrapper):
    """A module that runs as ever, with the masked weights of some of its parameters in the place of its own.

    The adapters are those of the `PSTMatrix` in `matrices`, by name of the parameter, one for each matrix of a stack.
    PEFT switches, merges and deletes them there, as it meets every layer in a model, so that a host does nothing of
    this, and tells the state of what it holds. It is a tuner layer because PEFT tells by this what belongs to an
    adapter, and what to the base model. Everything else is looked up in the module it stands for, and an adapted
    parameter that other code reads is the weight in force.
    """

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.module_name = module_name
        self.matrices = nn.ModuleDict()
        self.base_layer = base_layer
        self._kept: dict[str, tuple[object, Tensor]] = {}  # for evaluation: the stacks, and from what

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def __repr__(self) -> str:
        return "pst." + super().__repr__()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":
            check_no_tuner(value, self.module_name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "matrices"):  # not there yet: being made, or unpickled
                raise
        return self._of_base(name)

    def _of_base(self, name: str) -> Any:
        if name in self.matrices:
            in_force = self._weight_in_force(name)
            if in_force is not None:
                return in_force
        return getattr(self.base_layer, name)

    @property
    def weight(self) -> Any:
        """What the module has under this name, as everything else."""
        return self._of_base("weight")

    @property
    def bias(self) -> Any:
        """What the module has under this name, as everything else."""
        return self._of_base("bias")

    @property
    def in_features(self) -> int:
        """What the module says, or the columns of its first matrix."""
        return getattr(self.base_layer, "in_features", next(self._matrices()).in_features)

    @property
    def out_features(self) -> int:
        """What the module says, or the rows of its first matrix."""
        return getattr(self.base_layer, "out_features", next(self._matrices()).out_features)

    @property
    def active_adapter(self) -> str | list[str]:
        """Of its matrices, which agree."""
        return next(self._matrices()).active_adapter

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Of all its matrices together."""
        return list(dict.fromkeys(name for matrix in self._matrices() for name in matrix.merged_adapters))

    def _get_available_adapters(self) -> set[str]:
        return set().union(*(matrix._get_available_adapters() for matrix in self._matrices()))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Nothing: its layers are switched themselves."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing: it is deleted in its layers themselves."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: its layers are merged themselves."""

    def unmerge(self) -> None:
        """Nothing: its layers are unmerged themselves."""

    def adapt(
        self, parameter_name: str, adapter_name: str, config: PSTConfig, status: ScheduleStatus, num_parts: int = 1
    ) -> None:
        """Add an adapter to the matrices of one parameter, or start it afresh there."""
        if parameter_name in self.matrices:
            for matrix in self._of(parameter_name):
                matrix.update_layer(adapter_name, config, status)
            return
        if offload_hook(self.base_layer) is not None:
            raise ValueError(
                f"{self.module_name}.{parameter_name} is offloaded, and only layers with a single weight can be "
                "adapted then; load the model without offloading, or leave the parameter out."
            )
        parameter = getattr(self.base_layer, parameter_name)
        indices: Sequence[int | None] = [None] if parameter.dim() == 2 else range(len(parameter))
        host = (self.base_layer, self.module_name, parameter_name)
        made = [PSTMatrix(*host, index, num_parts, adapter_name, config, status) for index in indices]
        self.matrices[parameter_name] = nn.ModuleList(made)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = {name: self._weight_in_force(name) for name in self.matrices}
        with in_place_of_own(self.base_layer, {name: weight for name, weight in found.items() if weight is not None}):
            return self.base_layer(*args, **kwargs)

    def train(self, mode: bool = True) -> PSTHost:
        if mode:
            self._kept = {}
        return super().train(mode)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, for PEFT to put back; with the masked weights if these are merged."""
        if merge:
            for matrix in self._matrices():
                matrix.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                matrix.drop_dense()
        _unload_within(self.base_layer, merge, safe_merge, adapter_names)
        return self.base_layer

    def _of(self, parameter_name: str) -> list[PSTMatrix]:
        return cast("list[PSTMatrix]", list(cast("nn.ModuleList", self.matrices[parameter_name])))

    def _matrices(self) -> Iterator[PSTMatrix]:
        for name in self.matrices:
            yield from self._of(name)

    def put_in_force(self, adapter_names: str | list[str], inference_mode: bool) -> None:
        """Switch its matrices, as PEFT switches the layers that it finds."""
        for matrix in self._matrices():
            matrix.set_adapter(adapter_names, inference_mode=inference_mode)

    def _weight_in_force(self, parameter_name: str) -> Tensor | None:
        """What the module multiplies by instead of a parameter; None where that is right as it is."""
        matrices = self._of(parameter_name)
        pairs = [(matrix, matrix._names_in_force()) for matrix in matrices]
        if not all(names for _, names in pairs):
            return None
        matrix, names = pairs[0]
        if matrix._index is None:
            return matrix._as_stored(matrix._weight_in_force(names))
        trains = torch.is_grad_enabled() and any(matrix._trains(names) for matrix, names in pairs)
        if trains or torch.compiler.is_compiling():
            return torch.stack([matrix._as_stored(matrix._weight_in_force(names)) for matrix, names in pairs])
        if not matrix._may_keep_weight():
            return _stacked(pairs)
        origin = tuple(matrix._weight_origin(names) for matrix, names in pairs)
        if parameter_name not in self._kept or self._kept[parameter_name][0] != origin:
            self._kept[parameter_name] = origin, _stacked(pairs)
        return self._kept[parameter_name][1]


def _stacked(pairs: Sequence[tuple[PSTMatrix, list[str]]]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # fit for a later graph, too
        return torch.stack([matrix._as_stored(matrix.get_masked_weight(names)) for matrix, names in pairs])


class HostPlaces:
    """The hosts of a model, and where they stand."""

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, PSTHost]] = []
        self._by_base: dict[nn.Module, PSTHost] = {}
        for parent in model.modules():
            for name, child in parent.named_children():
                if isinstance(child, PSTHost):
                    self.add(parent, name, child)

    def add(self, parent: nn.Module, name: str, host: PSTHost) -> None:
        """Note that a host stands there, or is to."""
        self._places.append((parent, name, host))
        self._by_base[host.base_layer] = host

    def of(self, base: nn.Module) -> PSTHost | None:
        """The host of a plain module, if it has one."""
        return self._by_base.get(base)

    def __iter__(self) -> Iterator[PSTHost]:
        return iter(self._by_base.values())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Have the plain modules in their places, and in the end all hosts, those that were added among them.

        PEFT does not look into tuner layers for what to adapt, and a host may hold layers and parameters beside those
        that it stands for.

        Raises:
            ValueError: if something else has come into the place of one.
        """
        for parent, name, host in self._places:
            setattr(parent, name, host.base_layer)
        try:
            yield
            for parent, name, host in self._places:
                if getattr(parent, name) is not host.base_layer:
                    raise ValueError(
                        f"Module {host.module_name} is named in modules_to_save, but PST adapts its parameters; take "
                        "it out of modules_to_save, or out of what is adapted."
                    )
        finally:
            for parent, name, host in self._places:
                setattr(parent, name, host)


def _unload_within(holder: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Take out what is adapted inside a host, where PEFT does not look."""
    for name, child in list(holder.named_children()):
        unload = getattr(child, "unload_and_optionally_merge_module", None)
        if unload is not None:
            setattr(holder, name, unload(merge=merge, safe_merge=safe_merge, adapter_names=adapter_names))
        elif isinstance(child, BaseTunerLayer):
            if merge:
                child.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            setattr(holder, name, child.get_base_layer())
        else:
            _unload_within(child, merge, safe_merge, adapter_names)


class PSTMultiheadAttention(PSTHost):
    """PST on `nn.MultiheadAttention`: on its query, key and value projections, ranked apart, and on its output.

    They are three parts of `in_proj_weight`, or three matrices where keys or values have a width of their own. The
    output projection is a layer that the module reads, not calls.
    """

    def adapt_all(self, adapter_name: str, config: PSTConfig, status: ScheduleStatus) -> None:
        """Add an adapter to all projections, or start it afresh."""
        base: Any = self.base_layer
        if base.in_proj_weight is not None:
            self.adapt("in_proj_weight", adapter_name, config, status, num_parts=3)
        else:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.adapt(name, adapter_name, config, status)
        if isinstance(base.out_proj, PSTModule):
            base.out_proj.update_layer(adapter_name, config, status)
        else:
            name = f"{self.module_name}.out_proj"
            base.out_proj = PSTStoredLinear(base.out_proj, adapter_name, config, status, name)
