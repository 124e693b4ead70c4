"""What an adapter's configuration comes to for one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from peft.utils.other import get_pattern_key
from torch import Tensor

from .budget import most_pruned
from .config import PSTConfig
from .coupling import CoupledGroups
from .masking import check_num_pruned, num_pruned
from .patterns import Coupled, Pattern, Size, parse_pattern


@dataclass
class ScheduleStatus:
    """Whether the schedule of an adapter has been driven in this process; one object for all layers of the adapter."""

    moved: bool = False
    was_pruned: bool = False  # the adapter has come from a file, with zeros in some layer
    warned: set[str] = field(default_factory=set)  # the occasions on which the user was told that it has not
    length_from_trainer: bool = False  # total_steps was filled in by the callback, so the next run may fill it anew


class Change(NamedTuple):
    """A sparsity as it is put in force.

    Attributes:
        counts: zeros of each part.
        mask: as `pack_mask` stores it; None where masks are not held but follow the scores.
    """

    counts: tuple[int, ...]
    mask: Tensor | None


Criterion = Literal["scores", "weights", "update"]


@dataclass(frozen=True)
class LayerPlan:
    """What an adapter's configuration comes to for one layer, its patterns resolved."""

    config: PSTConfig
    status: ScheduleStatus
    shape: Size  # of each part
    pattern: Pattern
    size: Size  # of the blocks to whose mean a score is reduced
    num_parts: int
    target_sparsity: float
    shares_target: bool  # whether the target is one that several matrices reach together
    groups: CoupledGroups | None  # heads or neurons that lie in the matrix
    r: int
    residual: int
    score_rank: int

    @classmethod
    def of(
        cls, config: PSTConfig, status: ScheduleStatus, names: Sequence[str], shape: Size, num_parts: int = 1
    ) -> LayerPlan:
        """The plan for a matrix (out, in) that is made of so many parts if the configuration says nothing else."""
        module_name = names[0]

        def resolve(pattern: dict[str, Any], default: Any) -> Any:
            keys = (get_pattern_key(list(pattern), name) for name in names)
            return next((pattern[key] for key in keys if key in pattern), default)

        pattern = parse_pattern(config.pattern)
        # Coupled groups are ranked over all rows that they have anywhere.
        num_parts = 1 if isinstance(pattern, Coupled) else resolve(config.parts, num_parts)
        part = (shape[0] // num_parts, shape[1])
        own_target = resolve(config.sparsity_pattern, None) is not None
        plan = cls(
            config,
            status,
            shape=part,
            pattern=pattern,
            size=pattern.size(part),
            num_parts=num_parts,
            shares_target=config.scope == "global" and not own_target,
            groups=None,
            target_sparsity=resolve(config.sparsity_pattern, config.target_sparsity),
            r=resolve(config.rank_pattern, config.r),
            residual=resolve(config.residual_pattern, config.residual),
            score_rank=resolve(config.score_rank_pattern, config.score_rank),
        )
        if not plan.r and not plan.residual and not plan.score_rank and not config.structured:
            raise ValueError(
                f"Layer {module_name}: the patterns leave r=0, residual=0 and score_rank=0, and structured=False, so "
                "nothing would train; switch a part on or exclude the layer."
            )
        try:
            if shape[0] % num_parts:
                raise ValueError(f"{shape[0]} rows are not made of {num_parts} equal parts; mend `parts`.")
            pattern.check_fits(part)
            _check_sizes(plan, shape)
        except ValueError as error:
            raise ValueError(f"Layer {module_name}: {error}") from error
        return plan

    @property
    def num_weights(self) -> int:
        """Number of entries of all parts."""
        return self.num_parts * self.shape[0] * self.shape[1]

    @property
    def sparsity_at_start(self) -> float:
        """What is in force from the moment the adapter exists."""
        changes_nothing_dense = self.config.init_weights is False and not self.r and not self.residual
        return (
            self.target_sparsity if changes_nothing_dense else min(self.config.initial_sparsity, self.target_sparsity)
        )

    @property
    def is_coupled(self) -> bool:
        """Whether masks are selected over several matrices, if the matrix is pruned at all."""
        return isinstance(self.pattern, Coupled)

    def coupled_by(self, groups: CoupledGroups | None, module_name: str) -> LayerPlan:
        """The same plan for a matrix in which these groups lie, or which stays dense if there are none."""
        if groups is None:
            return replace(self, target_sparsity=0.0)
        parts = [part for part in groups.parts if part.module == module_name]
        lines = math.gcd(*(number for part in parts for number in (part.width, part.start)))
        size = (lines, self.shape[1]) if parts[0].axis == 0 else (self.shape[0], lines)
        return replace(self, groups=groups, size=size)

    @property
    def stays_dense(self) -> bool:
        """Whether the target comes to no zero in the matrix, whatever its scores."""
        if not self.target_sparsity:
            return True
        if self.groups is not None:
            groups = self.groups.num_groups
        elif self.shares_target:
            groups = self.shape[0] * self.shape[1] // (self.size[0] * self.size[1])
        else:
            return not any(self.counts_at(self.target_sparsity))
        if self.shares_target:
            return most_pruned(groups, self.config.min_kept) == 0
        return num_pruned(groups, self.target_sparsity) == 0

    def counts_at(self, sparsity: float) -> tuple[int, ...]:
        """How many entries of each part are zero at a sparsity."""
        return (self.pattern.num_pruned(self.shape, sparsity),) * self.num_parts

    def check_counts(self, counts: Sequence[int]) -> None:
        """Refuse stored numbers of zeros that the parts cannot have.

        Raises:
            ValueError: if there are too many of them, or they are no number of whole groups.
        """
        for count in counts:
            check_num_pruned(count, self.shape[0] * self.shape[1])
            if not self.config.holds_mask:  # a mask made elsewhere follows no pattern
                self.pattern.check_count(count, self.shape)


def check_rank(name: str, value: int, shape: Size) -> None:
    """Refuse a low-rank product that outgrows its matrix, before it takes memory.

    Raises:
        ValueError: if the rank is above both sides of the matrix and 64.

    Example:
        >>> check_rank("r", 8, (2, 4))
    """
    most = max(min(shape), _SMALL_RANK)
    if value > most:
        raise ValueError(f"{name}={value} is above {most}, the most for a matrix of {shape[0]} x {shape[1]}.")


_SMALL_RANK = 64  # allowed for any matrix, since the defaults are the same for all


def _check_sizes(plan: LayerPlan, shape: Size) -> None:
    check_rank("r", plan.r, shape)
    check_rank("score_rank", plan.score_rank, shape)
    entries = shape[0] * shape[1]
    if plan.residual > entries:
        raise ValueError(
            f"residual={plan.residual} is above {entries}, the most for a matrix of {shape[0]} x {shape[1]}."
        )
