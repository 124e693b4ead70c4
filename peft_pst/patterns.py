"""What is pruned together: scores are reduced to groups, groups are selected, the mask is expanded.

A pattern divides a matrix (out, in) into groups of entries. Unstructured pruning is the case of groups of one entry,
whole rows and columns that of the largest groups; n:m limits how many neighbours may go. All select with the one
`select_mask`, so counts are exact and ties deterministic whatever the pattern.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .masking import NAN_MESSAGE, num_pruned, select_mask

Size = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Blocks:
    """Entries live and die in blocks; by default each is its own.

    Attributes:
        height: rows of a block; None for all.
        width: columns of a block; None for all.
        name: as it is written in `PSTConfig.pattern`.
    """

    height: int | None = 1
    width: int | None = 1
    name: str = "unstructured"

    def size(self, shape: Size) -> Size:
        """Rows and columns of a block of a matrix of that shape."""
        return self.height or shape[0], self.width or shape[1]

    def check_fits(self, shape: Size) -> None:
        """Refuse a matrix that the blocks do not tile.

        Raises:
            ValueError: naming the size that does not divide.
        """
        for size, length, axis in zip(self.size(shape), shape, ("rows", "columns"), strict=True):
            if length % size:
                raise ValueError(
                    f"pattern {self.name!r} needs a number of {axis} that {size} divides, but the matrix is "
                    f"{shape[0]} x {shape[1]}; exclude it, or choose another pattern."
                )

    def num_pruned(self, shape: Size, sparsity: float) -> int:
        """How many entries are zero at a sparsity: whole blocks, rounded down, at least one of which stays."""
        height, width = self.size(shape)
        return num_pruned(shape[0] * shape[1] // (height * width), sparsity) * height * width

    def check_count(self, count: int, shape: Size) -> None:
        """Refuse a number of zeros that is no number of whole blocks.

        Raises:
            ValueError: if it is none.
        """
        height, width = self.size(shape)
        if count % (height * width):
            raise ValueError(f"{count} zeros are no whole number of blocks of {height} x {width} ({self.name!r}).")

    def check_zeros(self, zeros: Tensor) -> None:
        """Refuse zeros that are to be kept, boolean (out, in), but are no whole blocks.

        Raises:
            ValueError: if they are not.
        """
        size = self.size((zeros.shape[0], zeros.shape[1]))
        if size != (1, 1) and not torch.equal(reduce_to_blocks(zeros.float(), size), zeros.float()):
            raise ValueError(
                f"keep_zeros=True cannot be combined with pattern {self.name!r} here, since the zeros of the base are "
                f"no whole blocks of {size[0]} x {size[1]}; leave the pattern out."
            )

    def select(self, scores: Tensor, count: int) -> Tensor:
        """Which blocks stay, boolean, where `scores` are those of the blocks and exactly `count` of them go."""
        return select_mask(scores, count)


@dataclass(frozen=True)
class NofM:
    """Of every m neighbours in a row, n stay at the target sparsity, which is 1 - n / m; before, n or more.

    Attributes:
        n: entries kept.
        m: entries of a group.
    """

    n: int
    m: int

    @property
    def name(self) -> str:
        """As it is written in `PSTConfig.pattern`."""
        return f"{self.n}:{self.m}"

    @property
    def most(self) -> float:
        """The highest sparsity, which is also the target."""
        return 1 - self.n / self.m

    def size(self, shape: Size) -> Size:
        """Rows and columns of what is pruned as one: a single entry."""
        return 1, 1

    def check_fits(self, shape: Size) -> None:
        """Refuse a matrix whose rows are not made of groups.

        Raises:
            ValueError: naming the width.
        """
        if shape[1] % self.m:
            raise ValueError(
                f"pattern {self.name!r} needs a number of columns that {self.m} divides, but the matrix is "
                f"{shape[0]} x {shape[1]}; exclude it, or choose another pattern."
            )

    def num_pruned(self, shape: Size, sparsity: float) -> int:
        """How many entries are zero at a sparsity, which is at most `most`."""
        count = num_pruned(shape[0] * shape[1], sparsity)
        self.check_count(count, shape)
        return count

    def check_count(self, count: int, shape: Size) -> None:
        """Refuse more zeros than the groups allow.

        Raises:
            ValueError: if there are more.
        """
        most = shape[0] * shape[1] // self.m * (self.m - self.n)
        if count > most:
            raise ValueError(
                f"pattern {self.name!r} allows {most} zeros in a matrix of {shape[0]} x {shape[1]}, a sparsity of "
                f"{self.most:g}, but {count} were asked for; lower the sparsity."
            )

    def check_zeros(self, zeros: Tensor) -> None:
        """Refuse zeros that are to be kept, boolean (out, in), but are more than a group may have.

        Raises:
            ValueError: if they are.
        """
        found = int(zeros.reshape(-1, self.m).sum(1).amax())
        if found > self.m - self.n:
            raise ValueError(
                f"keep_zeros=True cannot be combined with pattern {self.name!r} here, since the base has {found} zeros "
                f"among {self.m} neighbours; leave the pattern out."
            )

    def select(self, scores: Tensor, count: int) -> Tensor:
        """Which entries stay, boolean; those that go are the `count` lowest among the m - n lowest of each group."""
        if scores.device.type == "cpu":
            if scores.isnan().any():
                raise ValueError(NAN_MESSAGE)
        else:
            scores = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # kept, as everywhere there
        groups = scores.reshape(-1, self.m)
        ranks = _rank_within(groups)
        if count == groups.shape[0] * (self.m - self.n):
            return (ranks >= self.m - self.n).view(scores.shape)
        # On the way there, those that may go are ranked among each other: below infinity, where all others are put.
        groups = groups.clamp(max=torch.finfo(groups.dtype).max).masked_fill_(ranks >= self.m - self.n, math.inf)
        return select_mask(groups.view(scores.shape), count)


@dataclass(frozen=True)
class Coupled:
    """Attention heads or feed-forward neurons: rows of some matrices that die together with columns of another.

    Which rows and columns is a matter of the architecture, and the selection one of the model; see `coupled.py`. A
    matrix by itself is, for this pattern, a matrix of single entries whose mask is made elsewhere.

    Attributes:
        kinds: "heads", "neurons" or both.
    """

    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is written in `PSTConfig.pattern`."""
        return "+".join(self.kinds)

    def size(self, shape: Size) -> Size:
        """Rows and columns of what a matrix by itself prunes as one: a single entry."""
        return 1, 1

    def check_fits(self, shape: Size) -> None:
        """Whether the groups tile the matrix is seen when they are looked for in the model."""

    def num_pruned(self, shape: Size, sparsity: float) -> int:
        """How many entries are zero at a sparsity, if the groups allow it; the model's selection counts groups."""
        return num_pruned(shape[0] * shape[1], sparsity)

    def check_count(self, count: int, shape: Size) -> None:
        """Any number may be one of whole groups."""

    def check_zeros(self, zeros: Tensor) -> None:
        """Refused by the configuration already."""

    def select(self, scores: Tensor, count: int) -> Tensor:
        """Everything stays. To prune is refused: one matrix does not know what the others of its groups score.

        Raises:
            RuntimeError: unless `count` is 0.
        """
        if count == 0:
            return select_mask(scores, 0)
        raise RuntimeError(
            f"pattern {self.name!r} couples matrices, so the mask of one cannot be selected by itself; use "
            "update_sparsity(model, ...) or prune_once(model, ...)."
        )


Pattern = Blocks | NofM | Coupled

UNSTRUCTURED = Blocks()

_WHOLE: dict[str, Pattern] = {
    "unstructured": UNSTRUCTURED,
    "rows": Blocks(1, None, "rows"),
    "columns": Blocks(None, 1, "columns"),
    "heads": Coupled(("heads",)),
    "neurons": Coupled(("neurons",)),
    "heads+neurons": Coupled(("heads", "neurons")),
}
_CHOICES = (
    '"unstructured", "n:m" such as "2:4", "bxc" such as "4x4" (rows x columns of a block), "rows", "columns", "heads", '
    '"neurons" and "heads+neurons"'
)


@cache
def parse_pattern(name: str) -> Pattern:
    """What a pattern's name means.

    Args:
        name: "unstructured"; "n:m", n of every m neighbours along the input kept; "bxc", blocks of b rows and c
            columns; "rows" or "columns" (whole ones); "heads", "neurons" or "heads+neurons".

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_pattern("2:4"), parse_pattern("16x1").size((64, 32)), parse_pattern("rows").size((64, 32))
        (NofM(n=2, m=4), (16, 1), (1, 32))
        >>> parse_pattern("4:2")
        Traceback (most recent call last):
        ...
        ValueError: pattern='4:2' keeps 4 of 2; in n:m, n is at least 1 and less than m.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    found = re.fullmatch(r"(\d{1,6})([:x])(\d{1,6})", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"pattern={name!r} is none of {_CHOICES}.")
    first, second = int(found[1]), int(found[3])
    if found[2] == ":":
        if not 0 < first < second:
            raise ValueError(f"pattern={name!r} keeps {first} of {second}; in n:m, n is at least 1 and less than m.")
        return NofM(first, second)
    if not first or not second:
        raise ValueError(f"pattern={name!r} has blocks without entries; both numbers are at least 1.")
    return Blocks(first, second, name) if (first, second) != (1, 1) else UNSTRUCTURED


def block_means(matrix: Tensor, size: Size) -> Tensor:
    """Mean over each block.

    Args:
        matrix: (out, in), tiled by blocks.
        size: rows and columns of a block.

    Returns:
        (out / rows, in / columns), in the dtype of `matrix`.

    Example:
        >>> block_means(torch.tensor([[1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 0.0, 8.0]]), (2, 2))
        tensor([[4., 2.]])
    """
    height, width = size
    return matrix.reshape(matrix.shape[0] // height, height, matrix.shape[1] // width, width).mean((1, 3))


def expand_groups(blocks: Tensor, size: Size) -> Tensor:
    """Give every entry the value of its block: `blocks` (m, n) as (m * rows, n * columns).

    Example:
        >>> expand_groups(torch.tensor([[True, False]]), (2, 1))
        tensor([[ True, False],
                [ True, False]])
    """
    height, width = size
    if size == (1, 1):
        return blocks
    rows, columns = blocks.shape
    return blocks[:, None, :, None].expand(rows, height, columns, width).reshape(rows * height, columns * width)


def reduce_to_blocks(matrix: Tensor, size: Size) -> Tensor:
    """Give every entry the mean of its block; nothing is done to blocks of one entry.

    It is what `block_means` and `expand_groups` make of a score, and their derivative what they make of its gradient.

    Example:
        >>> reduce_to_blocks(torch.tensor([[1.0, 3.0], [0.0, 4.0]]), (1, 2))
        tensor([[2., 2.],
                [2., 2.]])
    """
    return matrix if size == (1, 1) else expand_groups(block_means(matrix, size), size)


def select_pattern_mask(scores: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Reduce scores to groups, select groups, expand the mask.

    Args:
        scores: importance of each weight, (out, in), any real scale; higher is kept.
        count: number of entries to prune, as `pattern.num_pruned` counts them.
        pattern: what is pruned together; groups are ranked by their mean score.

    Returns:
        Boolean mask, (out, in), True = keep, with exactly `count` entries False.

    Raises:
        ValueError: as `select_mask` does.

    Example:
        >>> select_pattern_mask(torch.tensor([[1.0, 2.0], [4.0, 0.0]]), 2, parse_pattern("rows"))
        tensor([[False, False],
                [ True,  True]])
    """
    size = pattern.size((scores.shape[0], scores.shape[1]))
    groups = scores if size == (1, 1) else block_means(scores, size)
    return expand_groups(pattern.select(groups, count // (size[0] * size[1])), size)


def topk_mask(scores: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """Keep the highest-scoring entries, or groups of entries, of one weight matrix.

    Args:
        scores: importance of each weight, (out_features, in_features), any real scale; higher is kept. Without a
            pattern any shape will do.
        sparsity: fraction of entries to zero, in [0, 1); 0.9 keeps one weight in ten.
        pattern: what is pruned together, as in `parse_pattern`; groups are ranked by their mean score.

    Returns:
        Mask of the shape and device of `scores`, True = keep. Exactly `num_pruned(scores.numel(), sparsity)` entries
        are False (of blocks, rows and columns as many whole ones as that), also when scores tie: the earlier of two
        equal entries in row-major order is pruned.

    Raises:
        ValueError: if `sparsity` is outside [0, 1) or beyond what n:m allows, the pattern does not fit the matrix or
            couples several, or `scores` holds a NaN.

    Source: Li et al. 2022 (arXiv 2205.11005), eq. for M; the authors sort fully and leave ties open.

    Example:
        >>> scores = torch.tensor([[0.1, 3.0, 0.2, 0.3], [2.0, -1.0, 0.5, 0.4]])
        >>> topk_mask(scores, sparsity=0.5)
        tensor([[False,  True, False, False],
                [ True, False,  True,  True]])
        >>> topk_mask(scores, sparsity=0.5, pattern="2:4")
        tensor([[False,  True, False,  True],
                [ True, False,  True, False]])
        >>> topk_mask(scores, sparsity=0.5, pattern="rows")
        tensor([[ True,  True,  True,  True],
                [False, False, False, False]])
    """
    if torch.isnan(scores).any():
        raise ValueError(NAN_MESSAGE)
    parsed = parse_pattern(pattern)
    if isinstance(parsed, Coupled):
        raise ValueError(f"pattern={pattern!r} couples several matrices; one matrix has no mask of its own.")
    matrix = scores if scores.is_floating_point() else scores.double()
    matrix = matrix if scores.ndim == 2 else matrix.reshape(1, -1)
    shape = (matrix.shape[0], matrix.shape[1])
    parsed.check_fits(shape)
    return select_pattern_mask(matrix, parsed.num_pruned(shape, sparsity), parsed).view(scores.shape)


_COMPARED = 16  # up to so many entries, comparing all pairs is faster than sorting


def _rank_within(groups: Tensor) -> Tensor:
    """How many of its group each entry comes after, the earlier of two equal ones first; integers, (groups, m)."""
    m = groups.shape[1]
    if m > _COMPARED:
        order = groups.argsort(dim=1, stable=True)
        return torch.empty_like(order).scatter_(1, order, torch.arange(m, device=groups.device).expand_as(order))
    columns = groups.unbind(1)
    ranks = [torch.zeros(groups.shape[0], dtype=torch.uint8, device=groups.device) for _ in columns]
    for later, right in enumerate(columns):
        for earlier in range(later):
            comes_after = right >= columns[earlier]
            ranks[later] += comes_after
            ranks[earlier] += ~comes_after
    return torch.stack(ranks, 1)
