"""The state of an adapted matrix: owns the tensors, keeps PEFT's contract, leaves the mathematics to pure functions.

What runs forward, and in which form a kind of base layer stores its matrix, is in `module.py` and `linear.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from .callers import users_level
from .config import PSTConfig
from .fingerprint import fingerprint, identity, optimizer_steps
from .graph import register_layer, traced_packed_mask
from .masked_linear import Pruner, effective_weight
from .masking import check_zeros, count_zeros, pack_mask, unpack_mask
from .offloading import (
    at_hand,
    moved_to_disk,
    offload_folder,
    offload_hook,
    take_dense_weight,
)
from .plan import Change, Criterion, LayerPlan, ScheduleStatus
from .residual import check_positions, residual_positions
from .scoring import Factors, add_update, base_scores, score_dtype
from .selection import group_scores, select_adapter_mask, selection_scores
from .sharding import (
    copy_of,
    is_gathered_for_forward,
    is_partitioned,
    is_sharded,
    replace_values,
    whole,
    whole_shape,
)
from .tuner_layer import PSTTunerLayer, broken_message


class PSTLayer(PSTTunerLayer):
    """The state of every PST adapter on one base layer, and what PEFT does to it.

    Matrices are oriented (out_features, in_features), whatever the base layer stores. For each adapter the layer
    holds `pst_U` (out, r), `pst_V` (r, in), `pst_A` (out, score_rank), `pst_B` (score_rank, in), `pst_R` (out,),
    `pst_C` (in,) and `pst_num_pruned`, int64: the number of zeros now in force, a scalar, or of a matrix that is ranked
    in parts one number for each, (parts,). It is part of the
    adapter's state dict, so an adapter saved in mid-schedule loads at the sparsity it was saved at. Where the
    configuration holds masks from step to step, `pst_mask`, uint8 (ceil(out * in / 8),), is the mask now in force and
    part of the state dict too; elsewhere the mask follows from the scores and is kept nowhere. A sparse residual is
    held as its values `pst_S` (N,) and `pst_positions`, int64 (N,): row * in + column, ascending.

    Source: Li et al. 2022 (arXiv 2205.11005); the contract is PEFT's `BaseTunerLayer`.

    Example:
        >>> from peft import get_peft_model
        >>> config = PSTConfig(target_modules=["0"], initial_sparsity=0.5)
        >>> layer = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config).base_model.model[0]
        >>> layer.get_num_pruned("default"), layer.get_mask("default").shape
        (16, torch.Size([4, 8]))
        >>> int((layer.get_masked_weight() == 0).sum())
        16
    """

    adapter_layer_names = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C", "pst_S")
    buffer_names = ("pst_num_pruned", "pst_mask", "pst_positions")
    other_param_names = (*buffer_names, "pst_plans")

    # One random factor of each product is enough to learn from; the other at zero makes it the identity.
    random_factors: tuple[str, ...] = ("pst_U", "pst_A")
    num_parts = 1  # matrices that a layer of this class is made of, if the configuration says nothing else
    base_layer: nn.Module
    training: bool
    pst_S: nn.ParameterDict  # noqa: N815  # the formula's letter

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        self.pst_plans: dict[str, LayerPlan] = {}  # first, since it tells a PST layer from another tuner's
        self._hold_base(base_layer)
        self.module_name = module_name
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.pst_num_pruned = BufferDict(persistent=True)
        self.pst_mask = BufferDict(persistent=True)
        self.pst_positions = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = self._matrix_shape()
        # Plain attributes, not buffers: none of these belongs in a state dict.
        self._dense_weight: Tensor | None = None  # the base weight while an adapter is merged
        self._loaded_weight: Tensor | None = None  # an offloaded base weight while it is worked with
        self._offload_folder: Path | None = None  # where that of a merged layer was, and goes
        self._zeros: tuple[object, tuple[int, ...]] | None = None  # which base weight in how many parts, its zeros
        # pst_num_pruned on the host, since reading a GPU's would stall it.
        self._counts: dict[str, tuple[object, tuple[int, ...]]] = {}
        self._checked_positions: dict[str, object] = {}  # per adapter: the pst_positions that were found in order
        self._masks: dict[str, tuple[object, Tensor]] = {}  # per adapter: what it was selected from, packed mask
        self._checked_masks: dict[str, object] = {}  # per adapter: the held mask whose zeros were counted
        self._masked_weight: tuple[object, Tensor] | None = None  # for evaluation: what it was made from, weight
        self._warned_about_hooks = False
        self._handle = register_layer(self)

    # Where the matrix is stored; kinds of base layers that have it in another place or form override these

    @property
    def stored_name(self) -> str:
        """Under which name the base layer holds the tensor with the matrix."""
        return "weight"

    @property
    def _stored(self) -> Tensor:
        """The tensor of the base layer that holds the matrix."""
        return getattr(self._base, self.stored_name)

    def _share(self, stored: Tensor) -> Tensor:
        """The part of that tensor which is this matrix: a view."""
        return stored

    def _as_matrix(self, stored: Tensor) -> Tensor:
        """What the base layer stores, as (out, in)."""
        return stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix, (out, in), in the shape and memory layout in which the base layer stores it."""
        return matrix

    def _matrix_shape(self) -> tuple[int, int]:
        stored = torch.empty(whole_shape(self._stored), device="meta")
        out, in_ = self._as_matrix(self._share(stored)).shape
        return out, in_

    def _hold_base(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def _keep_dense(self) -> Tensor:
        """What is put back when unmerging; on the CPU, so that merging does not double an accelerator's memory."""
        return copy_of(self._stored)

    def _write(self, values: Tensor) -> None:
        """Put other values, of the shape that is stored, in the place of the matrix."""
        replace_values(self._stored, values)

    @property
    def pattern_names(self) -> tuple[str, ...]:
        """By what the configuration's patterns know this matrix, the narrowest first."""
        return (self.module_name,)

    # Adapter life

    def update_layer(self, adapter_name: str, config: PSTConfig, status: ScheduleStatus) -> None:
        """Add an adapter, or start an existing one afresh."""
        plan = LayerPlan.of(config, status, self.pattern_names, (self.out_features, self.in_features), self.num_parts)
        for name in (*self.adapter_layer_names, "pst_mask", "pst_positions"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]  # the new configuration may have no such part
        self.pst_plans[adapter_name] = plan
        out, in_ = self.out_features, self.in_features
        shapes = {
            "pst_U": (out, plan.r) if plan.r else None,
            "pst_V": (plan.r, in_) if plan.r else None,
            "pst_A": (out, plan.score_rank) if plan.score_rank else None,
            "pst_B": (plan.score_rank, in_) if plan.score_rank else None,
            "pst_R": (out,) if config.structured else None,
            "pst_C": (in_,) if config.structured else None,
            "pst_S": (plan.residual,) if plan.residual else None,
        }
        for name, shape in shapes.items():
            if shape is not None:
                getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape))
        self._reset_parameters(adapter_name, config)
        if plan.residual:
            self.pst_positions[adapter_name] = self._choose_positions(adapter_name)
        # Coupled matrices are pruned once all of them are there.
        counts = (0,) if plan.is_coupled else self.counts_at(adapter_name, plan.sparsity_at_start)
        self.pst_num_pruned[adapter_name] = _count_buffer(counts)
        if config.holds_mask:
            self.pst_mask[adapter_name] = pack_mask(torch.ones(out * in_, dtype=torch.bool))
        self._forget(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if config.holds_mask and self.has_data(adapter_name) and self.get_num_pruned(adapter_name):
            self._hold(adapter_name, self._select(adapter_name, self.get_counts(adapter_name)))

    @torch.no_grad()
    def _reset_parameters(self, adapter_name: str, config: PSTConfig) -> None:
        std = 1.0 if config.init_weights == "paper" else self.in_features**-0.5
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name not in parameters:
                continue
            if name in self.random_factors or config.init_weights is False:
                nn.init.normal_(parameters[adapter_name], std=std)
            else:
                nn.init.zeros_(parameters[adapter_name])

    def has_data(self, adapter_name: str) -> bool:
        """Whether the base weight and the adapter's tensors are there, and not still to be loaded."""
        factors = self.get_factors(adapter_name).tensors
        return self._base_has_data and not any(tensor.is_meta for tensor in factors if tensor is not None)

    def _choose_positions(self, adapter_name: str) -> Tensor:
        plan = self.pst_plans[adapter_name]
        to_be_loaded = not self._base_has_data or self.pst_S[adapter_name].is_meta or plan.config.inference_mode
        if to_be_loaded:
            # Choosing would be lost work, or impossible.
            return torch.arange(plan.residual)
        try:
            with outside_any_graph(self._device):
                return residual_positions(self._dense(), plan.residual, plan.config.residual_positions, rank=plan.r)
        except ValueError as error:
            raise ValueError(f"Layer {self.module_name}, adapter {adapter_name!r}: {error}") from error

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._counts.pop(adapter_name, None)
        self._checked_masks.pop(adapter_name, None)
        self._checked_positions.pop(adapter_name, None)
        self._forget(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._masked_weight = None

    def _forget(self, adapter_name: str) -> None:
        """Drop what was selected, so that the next forward selects anew."""
        self._masks.pop(adapter_name, None)
        self._masked_weight = None

    def forget_all(self) -> None:
        """Drop what was made for every adapter, after tensors were written in a way that nothing counts."""
        for adapter_name in self.pst_plans:
            self._forget(adapter_name)

    # Sparsity

    @property
    def num_weights(self) -> int:
        """Number of entries of the adapted matrix."""
        return self.out_features * self.in_features

    def get_num_pruned(self, adapter_name: str) -> int:
        """The number of zeros now in force, read from the adapter's state; the base's own among them, if they stay."""
        return sum(self.get_counts(adapter_name))

    def get_counts(self, adapter_name: str) -> tuple[int, ...]:
        """The same for each part of the matrix."""
        buffer = self.pst_num_pruned[adapter_name]
        self.check_loaded(adapter_name, [buffer])
        known = self._counts.get(adapter_name)
        if known is None or known[0] != identity(buffer):
            counts = tuple(buffer.reshape(-1).tolist())
            with self.refusing_damage(adapter_name):
                self.pst_plans[adapter_name].check_counts(counts)
            known = self._counts[adapter_name] = (identity(buffer), counts)
        if adapter_name in self.pst_mask or is_sharded(self._stored) or is_gathered_for_forward(self._base):
            return known[1]  # of a mask that is state, or of a count that was put in force with all shards at hand
        # A base that had no data when the count was put in force may have zeros now.
        return self.with_kept_zeros(adapter_name, known[1])

    def counts_at(self, adapter_name: str, sparsity: float) -> tuple[int, ...]:
        """How many zeros a sparsity comes to in each part: never fewer than the base's own, if they stay.

        Raises:
            ValueError: if `sparsity` is outside [0, 1), the pattern does not allow it, or a whole base weight would
                stay zero.
        """
        try:
            counts = self.pst_plans[adapter_name].counts_at(sparsity)
        except ValueError as error:
            raise ValueError(f"Layer {self.module_name}, adapter {adapter_name!r}: {error}") from error
        return self.with_kept_zeros(adapter_name, counts)

    def with_kept_zeros(self, adapter_name: str, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of zeros, raised to those of the base's own where these stay."""
        plan = self.pst_plans[adapter_name]
        base = self._stored if self._dense_weight is None else self._dense_weight
        if not plan.config.keep_zeros or not self._base_has_data:
            return counts
        origin = identity(base), plan.num_parts
        if self._zeros is None or self._zeros[0] != origin:
            self._zeros = origin, self._count_base_zeros(plan)
        return tuple(max(pair) for pair in zip(counts, self._zeros[1], strict=True))

    def _count_base_zeros(self, plan: LayerPlan) -> tuple[int, ...]:
        parts = self.get_dense_weight().split(plan.shape[0])
        counts = tuple(count_zeros(part) for part in parts)
        if max(counts) == parts[0].numel():
            what = "weights" if len(parts) == 1 else "weights of a part"
            raise ValueError(
                f"Layer {self.module_name}: keep_zeros=True holds what is zero, but all {max(counts)} {what} of the "
                "base are; name the layer in exclude_modules."
            )
        for part in parts:
            try:
                plan.pattern.check_zeros(part == 0)
            except ValueError as error:
                raise ValueError(f"Layer {self.module_name}: {error}") from error
        return counts

    def set_sparsity(self, adapter_name: str, sparsity: float) -> None:
        """Put a sparsity in force for one adapter, in [0, 1), by the mask that its scores now select.

        Raises:
            RuntimeError: while the adapter is merged.
        """
        self.put_in_force(adapter_name, self.prepare_sparsity(adapter_name, sparsity))

    def prepare_sparsity(self, adapter_name: str, sparsity: float, by: Criterion = "scores") -> Change:
        """What a sparsity comes to. Changes nothing.

        Raises:
            ValueError: if the scores cannot be ranked, or the pattern allows no such sparsity.
            RuntimeError: while the adapter is merged, or if the pattern couples the matrix with others.
        """
        self.check_unmerged(adapter_name)
        return self.prepare_counts(adapter_name, self.counts_at(adapter_name, sparsity), by)

    def prepare_counts(self, adapter_name: str, counts: tuple[int, ...], by: Criterion = "scores") -> Change:
        """The same for given numbers of zeros, which the pattern allows."""
        self.check_unmerged(adapter_name)
        return Change(counts, self._select(adapter_name, counts, by) if adapter_name in self.pst_mask else None)

    def put_in_force(self, adapter_name: str, change: Change) -> None:
        """Put in force what `prepare_sparsity` returned."""
        self._set_counts(adapter_name, change.counts)
        if change.mask is not None:
            self._hold(adapter_name, change.mask)

    def set_mask(self, adapter_name: str, keep: Tensor) -> None:
        """Put a mask made elsewhere in force for one adapter, and its number of zeros.

        It stays until the schedule asks for more zeros than it has, or `set_sparsity` is called. What is zero in the
        base weight stays so, whatever the mask says, if the configuration has `keep_zeros`.

        Args:
            adapter_name: an adapter whose configuration has `mask_interval=None`.
            keep: boolean (out, in), True = keep; at least one entry is kept.

        Raises:
            ValueError: if the mask is of another kind or shape or keeps nothing, or if the adapter's configuration
                would have it selected anew.
            RuntimeError: while the adapter is merged.
        """
        self.check_holds_mask(adapter_name)
        shape = (self.out_features, self.in_features)
        if keep.dtype != torch.bool or keep.shape != shape:
            raise ValueError(
                f"Layer {self.module_name}: the mask is {keep.dtype} of shape {tuple(keep.shape)}; pass a boolean one "
                f"of shape {shape}, (out, in), True = keep."
            )
        if self.pst_plans[adapter_name].config.keep_zeros:
            keep = keep & (self.get_dense_weight() != 0)
        parts = keep.reshape(self.pst_plans[adapter_name].num_parts, -1)
        counts = tuple((~parts).sum(1).tolist())
        if max(counts) == parts.shape[1]:
            what = "weights" if len(parts) == 1 else "weights of a part"
            raise ValueError(
                f"Layer {self.module_name}: the mask keeps none of {max(counts)} {what}; keep at least one."
            )
        self._set_counts(adapter_name, counts)
        self._hold(adapter_name, pack_mask(keep))

    def _set_counts(self, adapter_name: str, counts: tuple[int, ...]) -> None:
        buffer = self.pst_num_pruned[adapter_name]
        if len(set(counts)) == 1:
            buffer.fill_(counts[0])  # without a copy from the host, for which a GPU would be waited for
        else:
            buffer.copy_(_count_buffer(counts))
        self._counts[adapter_name] = (identity(buffer), counts)
        self._forget(adapter_name)

    def check_holds_mask(self, adapter_name: str) -> None:
        """Refuse to go on where a mask made elsewhere would not stay in force.

        Raises:
            ValueError: if the adapter's `mask_interval` is not None.
            RuntimeError: while the adapter is merged.
        """
        self.check_unmerged(adapter_name)
        interval = self.pst_plans[adapter_name].config.mask_interval
        if interval is not None:
            raise ValueError(
                f"Layer {self.module_name}: with mask_interval={interval}, adapter {adapter_name!r} selects its mask "
                "anew while training, so one made elsewhere would be lost; make the adapter with mask_interval=None."
            )

    def check_unmerged(self, adapter_name: str) -> None:
        """Refuse to go on while an adapter is merged, since what is in the base weight would not follow."""
        if adapter_name in self.merged_adapters:
            raise RuntimeError(
                f"Layer {self.module_name}: the sparsity of adapter {adapter_name!r} cannot change while it is merged; "
                "call unmerge_adapter() first."
            )

    def check_bounded(self, adapter_name: str) -> None:
        """Refuse an infinite factor before it is ranked; on the CPU, since elsewhere it would stall the device to ask.

        Raises:
            ValueError: naming the layer and the factor.
            RuntimeError: if a factor has no data.
        """
        self.keep_adapters_at_hand()
        for part in self.adapter_layer_names:
            factor = getattr(self, part).get(adapter_name, None)
            self.check_loaded(adapter_name, [factor])
            if factor is None or factor.device.type != "cpu" or is_sharded(factor) or is_partitioned(factor):
                continue
            # A sum is quicker than a look at each, and not finite if one is not. A NaN is for the selection to refuse.
            if not math.isfinite(factor.detach().sum()) and factor.isinf().any():
                raise ValueError(
                    f"Layer {self.module_name}, adapter {adapter_name!r}: {part} holds an infinity; the training has "
                    "diverged. Go on from the last checkpoint, with lower learning rates."
                )

    def _warn_if_never_pruned(self, adapter_names: Sequence[str], occasion: str) -> None:
        for name in adapter_names:
            plan = self.pst_plans[name]
            known = plan.status.moved or plan.status.was_pruned or occasion in plan.status.warned
            if known or plan.stays_dense or self.get_num_pruned(name):
                continue
            plan.status.warned.add(occasion)
            warnings.warn(
                f"{occasion} adapter {name!r}, which prunes nothing: its sparsity is still 0 although its target is "
                f"{plan.target_sparsity}, because the schedule has never moved. Train with "
                "Trainer(..., callbacks=[PSTCallback()]), or call model.update_sparsity(step, total_steps) after every "
                "optimizer step.",
                stacklevel=users_level(),
            )

    def get_factors(self, adapter_name: str) -> Factors:
        """The trainable tensors of one adapter with their scales, for the pure functions; whole, also where sharded."""
        self.keep_adapters_at_hand()
        config = self.pst_plans[adapter_name].config
        scales: list[Any] = [config.beta, config.alpha1, config.alpha2]
        stored = [getattr(self, name).get(adapter_name) for name in self.adapter_layer_names]
        tensors = [tensor if tensor is None else whole(tensor) for tensor in stored]
        return Factors._make((*tensors, self._positions(adapter_name), *scales))

    def _loaded_factors(self, adapter_name: str) -> Factors:
        factors = self.get_factors(adapter_name)
        self.check_loaded(adapter_name, factors.tensors)
        return factors

    def _positions(self, adapter_name: str) -> Tensor | None:
        """The positions of the residual, looked at once when they have come from a file; None without a residual."""
        if adapter_name not in self.pst_positions:
            return None
        positions = self.pst_positions[adapter_name]
        if positions.is_meta or torch.compiler.is_compiling():
            return positions
        if self._checked_positions.get(adapter_name) == identity(positions):
            return positions
        with self.refusing_damage(adapter_name):
            check_positions(positions, self.num_weights)
        self._checked_positions[adapter_name] = identity(positions)
        return positions

    def get_scores(self, adapter_name: str) -> Tensor:
        """Importance of each weight, (out, in), from the dense base weight, also while merged."""
        factors = self._loaded_factors(adapter_name)
        with outside_any_graph(self._device):
            return base_scores(self._dense(), factors)

    def get_group_scores(self, adapter_name: str, rows: slice, by: Criterion = "scores") -> Iterator[Tensor]:
        """Mean score of each group of the adapter's pattern within some rows, whole groups of them; piece by piece."""
        plan = self.pst_plans[adapter_name]
        with outside_any_graph(self._device):
            matrix, factors = self._ranked(adapter_name, by)
            own = factors.rows(rows, self.in_features)
            yield from group_scores(matrix[rows], own, plan.size, keep_zeros=plan.config.keep_zeros)

    def _ranked(self, adapter_name: str, by: Criterion) -> tuple[Tensor, Factors]:
        """A matrix and factors whose `base_scores` are what a criterion ranks by; zero where the base is to stay so."""
        if by != "update":
            return self._dense(), self._loaded_factors(adapter_name) if by == "scores" else Factors()
        # Without factors, the scores of a matrix are its magnitudes.
        update = self.get_update(adapter_name)
        if self.pst_plans[adapter_name].config.keep_zeros:
            # The base's zeros are known by being zero, so nothing else may be.
            update = update.abs().clamp_(min=torch.finfo(update.dtype).tiny).masked_fill_(self._dense() == 0, 0)
        return update, Factors()

    def get_importance(self, adapter_name: str, by: Criterion = "scores") -> Tensor:
        """What each weight is ranked by, (out, in), in score precision; higher means kept."""
        with outside_any_graph(self._stored.device):
            return selection_scores(
                *self._ranked(adapter_name, by), keep_zeros=self.pst_plans[adapter_name].config.keep_zeros
            )

    def get_spread(self, rows: slice = slice(None)) -> Tensor:
        """Root mean square of some rows of the base weight, a scalar; 1 if they are all zero.

        Scores are divided by it where they meet those of another matrix.
        """
        weight = self.get_dense_weight()[rows]
        norm = torch.linalg.vector_norm(weight, dtype=score_dtype(weight.dtype))
        return (norm / weight.numel() ** 0.5).where(norm > 0, 1)

    def get_update(self, adapter_name: str) -> Tensor:
        """What one adapter adds to the base weight before masking, beta U V + S, (out, in), in score precision."""
        weight = self._dense()
        with outside_any_graph(weight.device):
            zeros = torch.zeros(weight.shape, dtype=score_dtype(weight.dtype), device=weight.device)
            return add_update(zeros, self._loaded_factors(adapter_name))

    def get_mask(self, adapter_name: str) -> Tensor:
        """The mask now in force for one adapter, boolean (out, in), True = keep."""
        return unpack_mask(self.get_packed_mask(adapter_name), (self.out_features, self.in_features))

    def get_masked_weight(self, adapter_names: Sequence[str] | None = None) -> Tensor:
        """The weight that these adapters (by default the active ones) put in force, (out, in), in the base's dtype."""
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        with outside_any_graph(self._device):
            weight = effective_weight(self._dense(), self._pruners(names)) if names else self._dense()
            # Laid out as the base layer stores it, so that this weight, once merged, gives the same sums bit for bit.
            return self._as_matrix(self._as_stored(weight))

    def get_stored_weight(self) -> Tensor:
        """What the base layer holds now, (out, in): the masked weight while merged, else the dense one."""
        return self._as_matrix(self._share(whole(self._at_hand()))).detach()

    def get_dense_weight(self) -> Tensor:
        """The base weight without any adapter, (out, in), also while merged."""
        return self._dense().detach()

    @contextmanager
    def loading_once(self) -> Iterator[None]:
        """Within the block an offloaded base weight is read from its store but once."""
        if not self._is_offloaded or self._loaded_weight is not None or self._dense_weight is not None:
            yield
            return
        self._loaded_weight = at_hand(self._base, self.stored_name)
        try:
            yield
        finally:
            self._loaded_weight = None

    def _dense_stored(self) -> Tensor:
        """The base weight without any adapter, as the base layer stores it, where the layer computes."""
        if self._dense_weight is not None:
            return self._dense_weight.to(self._device, self._stored.dtype)
        if self._loaded_weight is not None:
            return self._loaded_weight
        return self._at_hand()

    def _at_hand(self) -> Tensor:
        """What the base layer holds, where the layer computes."""
        stored = at_hand(self._base, self.stored_name) if self._stored.is_meta else self._stored
        if stored is None:
            raise RuntimeError(
                f"Layer {self.module_name}: the base weight has no data (meta device), so it cannot be pruned; load "
                "the weights into the model, or dispatch it with accelerate, first."
            )
        return stored

    def _dense(self) -> Tensor:
        weight = whole(self._dense_stored())
        if self._dense_weight is None:
            weight = self._share(weight)
        if weight.numel() != self.num_weights:
            raise RuntimeError(
                f"Layer {self.module_name}: FSDP1 shards the base weight in a way that PST cannot gather; use FSDP2 or "
                "DeepSpeed ZeRO instead."
            )
        return self._as_matrix(weight)

    def _present(self, adapter_names: Sequence[str]) -> list[str]:
        return [name for name in adapter_names if name in self.pst_plans]

    def get_packed_mask(self, adapter_name: str) -> Tensor:
        """The mask now in force as `pack_mask` stores it; selected once for all micro-batches and evaluations."""
        return self._packed_mask(adapter_name, self.get_factors(adapter_name))

    def _packed_mask(self, adapter_name: str, factors: Factors) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if adapter_name in self.pst_mask:
            return self.pst_mask[adapter_name] if compiling else self._held_mask(adapter_name)
        tensors = self._origin(adapter_name, factors)
        if compiling:
            return traced_packed_mask([tensor.detach() for tensor in tensors], self._handle, adapter_name)
        if is_sharded(self._stored):
            # Outside a forward: what was gathered for this selection is gone after it, and has no identity to compare.
            return self._select(adapter_name, self.get_counts(adapter_name))
        origin = self._mask_origin(tensors)
        cached = self._masks.get(adapter_name)
        if cached is None or cached[0] != origin:
            cached = (origin, self._select(adapter_name, self.get_counts(adapter_name)))
            self._masks[adapter_name] = cached
        return cached[1]

    def _mask_origin(self, tensors: Sequence[Tensor]) -> object:
        if not is_gathered_for_forward(self._base):
            return fingerprint(tensors)
        # What was gathered moves about in memory, and does not count the writes to the shards it came from. While
        # training, an optimizer is taken to be the only writer; elsewhere, nothing is taken for granted.
        return optimizer_steps() if self.training else object()

    def _select(self, adapter_name: str, counts: tuple[int, ...], by: Criterion = "scores") -> Tensor:
        try:
            with outside_any_graph(self._device):
                ranked, plan = self._ranked(adapter_name, by), self.pst_plans[adapter_name]
                return select_adapter_mask(*ranked, counts, plan.pattern, keep_zeros=plan.config.keep_zeros)
        except ValueError as error:
            raise ValueError(f"Layer {self.module_name}, adapter {adapter_name!r}: {error}") from error

    def _hold(self, adapter_name: str, packed: Tensor) -> None:
        # Another tensor in its place, since a backward that is still to come may need the mask of its forward.
        self.pst_mask[adapter_name] = packed
        self._checked_masks[adapter_name] = self._held_identity(adapter_name)

    def _held_identity(self, adapter_name: str) -> object:
        return identity(self.pst_mask[adapter_name]), identity(self.pst_num_pruned[adapter_name])

    def _held_mask(self, adapter_name: str) -> Tensor:
        """The mask in force where it is state, after a look at whether it agrees with the number of zeros."""
        held = self.pst_mask[adapter_name]
        if self._checked_masks.get(adapter_name) != self._held_identity(adapter_name):
            with self.refusing_damage(adapter_name):
                check_zeros(held, self.get_num_pruned(adapter_name), self.num_weights)
            self._checked_masks[adapter_name] = self._held_identity(adapter_name)
        return held

    def _pruners(self, adapter_names: Sequence[str]) -> list[Pruner]:
        if torch.is_grad_enabled() and is_partitioned(self._stored) and is_sharded(self._stored):
            raise RuntimeError(
                f"Layer {self.module_name}: its weight is read for training where DeepSpeed ZeRO-3 has not gathered "
                "it, so what trains would get no gradient. Call the adapted module, or use ZeRO-2 or FSDP2."
            )
        pairs = [(name, self._loaded_factors(name)) for name in adapter_names]
        return [Pruner(factors, self._packed_mask(name, factors), self.pst_plans[name].size) for name, factors in pairs]

    def _origin(self, adapter_name: str, factors: Factors) -> list[Tensor]:
        """The tensors that an adapter's masked weight depends on, the base weight first."""
        base = self._stored if self._dense_weight is None else self._dense_weight
        mask = [self.pst_mask[adapter_name]] if adapter_name in self.pst_mask else []
        parts = [tensor for tensor in (*factors.tensors, factors.positions) if tensor is not None]
        return [base, *parts, self.pst_num_pruned[adapter_name], *mask]

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the masked weight into the base layer, zeros exact; `unmerge` restores the dense weight bit for bit.

        Raises:
            ValueError: with `safe_merge`, when the scores or the merged weight are not finite.
            RuntimeError: when the merged weight holds fewer zeros than the adapters promise, or the base weight is a
                copy that FSDP gathered for a forward.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if self._is_offloaded:
            with onload_layer(self):  # as PEFT's own methods do, which write back what they have merged
                self.merge(safe_merge, names)
            return
        self._check_writable()
        self._warn_if_never_pruned(names, "Merging")
        merged_names = self.merged_adapters + names
        merged = self._weight_to_merge(merged_names, safe_merge)
        values, was_offloaded = self._as_stored(merged), offload_hook(self._base) is not None
        if self._dense_weight is None:
            self._offload_folder = offload_folder(self._base)
        if self._offload_folder is not None:
            values = moved_to_disk(values, self._offload_folder)
        if self._dense_weight is None:
            self._dense_weight = take_dense_weight(self._base) if was_offloaded else self._keep_dense()
        self._write(values)
        self.merged_adapters = merged_names
        self._masked_weight = None

    def _weight_to_merge(self, adapter_names: list[str], safe_merge: bool) -> Tensor:
        """The masked weight, (out, in), once it has been looked at."""
        if safe_merge:
            self._check_finite(adapter_names)
        merged = self.get_masked_weight(adapter_names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(broken_message(adapter_names[-1], self.module_name))
        self._check_zeros(merged, adapter_names)
        return merged

    def _check_finite(self, adapter_names: Sequence[str]) -> None:
        # A NaN score need not make any weight NaN, so looking at the merged weight alone would miss it.
        for name in adapter_names:
            if not torch.isfinite(self.get_scores(name)).all():
                raise ValueError(broken_message(name, self.module_name))

    def _check_zeros(self, merged: Tensor, adapter_names: Sequence[str]) -> None:
        promised = max(self.get_num_pruned(name) for name in adapter_names)
        zeros = merged.numel() - int(torch.count_nonzero(merged))
        if zeros < promised:
            raise RuntimeError(
                f"Layer {self.module_name}: the merged weight holds {zeros} zeros, but adapters {list(adapter_names)} "
                f"promise {promised}. The base layer is unchanged. This is a defect of peft_pst, please report it."
            )

    def drop_dense(self) -> None:
        """Forget the dense weight of a merged layer that is about to be taken out of the model."""
        self._dense_weight = None

    def _restore(self, dense: Tensor) -> None:
        # The model may have been moved or cast meanwhile.
        device = self._stored.device if self._offload_folder is None else "cpu"  # where it is mapped from its file
        self._write(dense.to(device, self._stored.dtype))
        self._masked_weight = None


@contextmanager
def outside_any_graph(device: torch.device) -> Iterator[None]:
    """No gradient; full precision also within autocast; tensors fit for a later graph also within inference mode."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _count_buffer(counts: Sequence[int]) -> Tensor:
    return torch.tensor(counts[0] if len(counts) == 1 else counts, dtype=torch.int64)
