"""Coupled groups: rows and columns of several matrices that make one attention head or one feed-forward neuron.

Scores are summed over groups, groups are selected, and what was selected is expanded to the masks of the matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["heads", "neurons"]


class Part(NamedTuple):
    """Where the groups lie in one matrix, oriented (out, in): side by side, all of one width.

    Group g has the rows or columns from `start + g * width` up to `start + (g + 1) * width`.

    Attributes:
        module: path of the projection in the model.
        axis: 0 where groups are rows (what makes a head or a neuron), 1 where they are columns (what reads it).
        start: the first row or column of the first group.
        width: rows or columns of a group.
        shape: of the whole matrix, (out, in).
    """

    module: str
    axis: int
    start: int
    width: int
    shape: tuple[int, int]


class CoupledGroups(NamedTuple):
    """The heads of one attention layer, or the neurons of one feed-forward.

    Attributes:
        name: what the paths of its projections have in common.
        kind: "heads" or "neurons". Where query heads share keys and values (grouped-query attention), a group is one
            head of keys and values with all the query heads that read it.
        num_groups: how many there are.
        parts: where they lie. A matrix may have several parts; two parts share no entry.
    """

    name: str
    kind: Kind
    num_groups: int
    parts: tuple[Part, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the matrices, each once."""
        return tuple(dict.fromkeys(part.module for part in self.parts))


def group_scores(groups: CoupledGroups, scores: Mapping[str, Tensor]) -> Tensor:
    """The score of each group: the sum over its entries in all matrices.

    Args:
        groups: where the groups lie.
        scores: for each of `groups.modules`, the importance of its weights, (out, in), floating.

    Returns:
        (num_groups,), on the device of the scores of the first part, in float32 or, if theirs is wider, float64.

    Raises:
        ValueError: if scores are missing or of another shape.

    Example:
        >>> up, down = Part("up", 0, 0, 1, (2, 3)), Part("down", 1, 0, 1, (3, 2))
        >>> neurons = CoupledGroups("mlp", "neurons", 2, (up, down))
        >>> group_scores(neurons, {"up": torch.ones(2, 3), "down": torch.tensor([[5.0, 0.0]] * 3)})
        tensor([18.,  3.])
    """
    sums = []
    for part in groups.parts:
        if part.module not in scores or scores[part.module].shape != part.shape:
            found = tuple(scores[part.module].shape) if part.module in scores else None
            raise ValueError(
                f"The scores of {part.module} have shape {found}, but the {groups.kind} of {groups.name} lie in a "
                f"matrix of shape {part.shape}; pass one score for each weight, (out, in)."
            )
        matrix = scores[part.module]
        lines = matrix.sum(1 - part.axis, dtype=torch.promote_types(matrix.dtype, torch.float32))
        lines = lines.narrow(0, part.start, groups.num_groups * part.width)
        sums.append(lines.view(groups.num_groups, part.width).sum(1))
    return torch.stack([part.to(sums[0]) for part in sums]).sum(0)


def group_masks(groups: CoupledGroups, keep: Tensor) -> dict[str, Tensor]:
    """The mask of each matrix that keeps some groups and drops the others.

    Args:
        groups: where the groups lie.
        keep: boolean (num_groups,), True = keep.

    Returns:
        {path: boolean (out, in)} for each of `groups.modules`, on the device of `keep`. What belongs to no group is
        kept.

    Raises:
        ValueError: if `keep` is of another shape or kind.

    Example:
        >>> neurons = CoupledGroups("mlp", "neurons", 2, (Part("up", 0, 0, 1, (2, 3)), Part("down", 1, 0, 1, (3, 2))))
        >>> masks = group_masks(neurons, torch.tensor([True, False]))
        >>> masks["up"].int().tolist(), masks["down"].int().tolist()
        ([[1, 1, 1], [0, 0, 0]], [[1, 0], [1, 0], [1, 0]])
    """
    if keep.dtype != torch.bool or keep.shape != (groups.num_groups,):
        raise ValueError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}; pass a boolean tensor of shape "
            f"({groups.num_groups},), one value for each of the {groups.kind} of {groups.name}."
        )
    masks: dict[str, Tensor] = {}
    for part in groups.parts:
        mask = masks.setdefault(part.module, torch.ones(part.shape, dtype=torch.bool, device=keep.device))
        lines = mask.narrow(part.axis, part.start, groups.num_groups * part.width)
        lines &= keep.repeat_interleave(part.width).unsqueeze(1 - part.axis)
    return masks
