"""Importance of each weight: the formulas for the updated weight and for its score.

Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022
(arXiv 2205.11005). Matrices are oriented (out_features, in_features) throughout, whatever the layer stores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import available


class Factors(NamedTuple):
    """The trainable tensors of one adapter on one layer, with their scales.

    Beware the letters: PST's A is (out, score_rank) and B is (score_rank, in); LoRA's run the other way. S is DSEE's
    S2, the values of a sparse residual, and not the scores, which have no letter here.

    Attributes:
        U: left factor of the weight update, (out, r), or None when r = 0.
        V: right factor of the weight update, (r, in), or None when r = 0.
        A: left factor of the low-rank importance, (out, score_rank), or None when score_rank = 0.
        B: right factor of the low-rank importance, (score_rank, in), or None when score_rank = 0.
        R: importance of each row, (out,), or None without the structured part.
        C: importance of each column, (in,), or None without the structured part.
        S: values of the sparse residual, (N,), or None when N = 0.
        positions: where they stand, int64 (N,), row * in + column, no two alike, or None when N = 0. In the factors of
            a block of rows they count from the block's first entry, and those outside it concern other rows.
        beta: scale of the weight update U V.
        alpha1: scale of the low-rank importance A B.
        alpha2: scale of the structured importance R 1' + 1 C'.
    """

    U: Tensor | None = None
    V: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    S: Tensor | None = None
    positions: Tensor | None = None
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What trains: U, V, A, B, R, C, S in this order, None where a part is switched off."""
        return self.U, self.V, self.A, self.B, self.R, self.C, self.S

    def rows(self, block: slice, width: int) -> Factors:
        """The part that concerns some rows of a matrix of that width; V, B, C and S concern them all."""
        U, A, R = (None if tensor is None else tensor[block] for tensor in (self.U, self.A, self.R))
        positions = None if self.positions is None else self.positions - block.start * width
        return self._replace(U=U, A=A, R=R, positions=positions)

    def at(self, rows: Tensor, columns: Tensor) -> Factors:
        """The part that concerns where some rows and columns, given by index, meet; without the residual."""
        U, A, R = (None if tensor is None else tensor[rows] for tensor in (self.U, self.A, self.R))
        V, B, C = (None if tensor is None else tensor[..., columns] for tensor in (self.V, self.B, self.C))
        return self._replace(U=U, V=V, A=A, B=B, R=R, C=C, S=None, positions=None)

    @property
    def scales(self) -> tuple[float, float, float]:
        """beta, alpha1, alpha2."""
        return self.beta, self.alpha1, self.alpha2


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which weights of `dtype` are scored: float64 for float64, float32 for everything else.

    Example:
        >>> score_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def updated_weight(weight: Tensor, factors: Factors) -> Tensor:
    """The dense weight with the adapter's update, W = W0 + beta U V + S, low-rank and sparse.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        factors: the adapter; U (out, r) and V (r, in), S and its positions (N,) are read; what is None adds nothing.

    Returns:
        W, (out, in), in `score_dtype(weight.dtype)`.

    Source: Li et al. 2022, eq. for W; the low-rank update is LoRA's (arXiv 2106.09685), the sparse one is DSEE's S2
    (Chen et al., ACL 2023, arXiv 2111.00160).

    Example:
        >>> factors = Factors(U=torch.tensor([[1.0], [0.0]]), V=torch.tensor([[0.5, 0.25]]), beta=2.0)
        >>> updated_weight(torch.zeros(2, 2, dtype=torch.bfloat16), factors)
        tensor([[1.0000, 0.5000],
                [0.0000, 0.0000]])
    """
    return add_update(weight.to(score_dtype(weight.dtype)), factors)


def add_update(weight: Tensor, factors: Factors) -> Tensor:
    """Add beta U V + S to a weight, or a block of its rows, in score precision; the input is left as it is."""
    updated = weight
    if factors.U is not None and factors.V is not None:
        U, V = factors.U.to(weight.dtype), factors.V.to(weight.dtype)
        updated = torch.addmm(weight, U, V, alpha=factors.beta)
    if factors.S is not None and factors.positions is not None:
        if updated is weight:
            updated = weight.clone(memory_format=torch.contiguous_format)
        index, inside = locate(factors.positions, weight.numel())
        updated.view(-1).index_add_(0, index, factors.S.to(weight.dtype).where(inside, 0))
    return updated


def locate(positions: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Which positions fall within a block of rows, without asking the host how many.

    Args:
        positions: int64 (N,), counted from the first entry of the block.
        numel: number of entries of the block.

    Returns:
        An index within the block for every position, (N,), and whether it means that position, boolean (N,). Where it
        does not, the index is that of some entry, to which nothing may be added.

    Example:
        >>> locate(torch.tensor([-3, 2, 9]), numel=4)
        (tensor([0, 2, 3]), tensor([False,  True, False]))
    """
    return positions.clamp(0, numel - 1), (positions >= 0) & (positions < numel)


def importance_scores(weight: Tensor, factors: Factors) -> Tensor:
    """Importance of each entry, S = |W| + alpha1 A B + alpha2 (R 1' + 1 C').

    |W| is the data-free part, the rest the data-driven part that is learned through the loss.

    Args:
        weight: the updated weight W of `updated_weight`, (out, in), in score precision.
        factors: the adapter; A (out, score_rank), B (score_rank, in), R (out,), C (in,) are read, each may be None.

    Returns:
        S, (out, in), in the dtype of `weight`, any real scale; higher means kept.

    Source: Li et al. 2022, eq. for S.

    Example:
        >>> importance_scores(torch.tensor([[-1.0, 2.0]]), Factors(R=torch.tensor([0.5]), C=torch.tensor([0.0, -1.0])))
        tensor([[1.5000, 1.5000]])
    """
    scores = weight.abs()
    if factors.A is not None and factors.B is not None:
        A, B = factors.A.to(weight.dtype), factors.B.to(weight.dtype)
        scores = scores.addmm_(A, B, alpha=factors.alpha1)
    if factors.R is not None and factors.C is not None:
        R, C = factors.R.to(weight.dtype), factors.C.to(weight.dtype)
        scores = scores.add_(R[:, None], alpha=factors.alpha2).add_(C, alpha=factors.alpha2)
    return scores


def rank_zeros_lowest(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores by which the zeros of a base weight are pruned before everything else.

    Args:
        scores: importance of each entry, (out, in), any real scale; higher means kept.
        weight: base weight W0, of that shape.

    Returns:
        The scores with minus infinity where the weight is zero, and there alone: elsewhere the lowest is that of the
        largest finite number. A NaN stays one, except at a zero.

    Example:
        >>> rank_zeros_lowest(torch.tensor([5.0, 1.0, -2.0]), torch.tensor([0.0, 3.0, -1.0]))
        tensor([-inf,  1., -2.])
    """
    return scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill_(weight == 0, -torch.inf)


def base_scores(weight: Tensor, factors: Factors) -> Tensor:
    """Importance of each entry of a base weight: `importance_scores` of its `updated_weight`.

    In one pass over the weight on a GPU with Triton, unless there is a sparse residual.

    Args:
        weight: base weight W0, (out, in), any floating dtype.
        factors: the adapter.

    Returns:
        S, (out, in), in `score_dtype(weight.dtype)`, any real scale; higher means kept.

    Example:
        >>> base_scores(torch.tensor([[-1.0, 2.0]]), Factors(R=torch.tensor([0.5]), C=torch.tensor([0.0, -1.0])))
        tensor([[1.5000, 1.5000]])
    """
    if factors.S is None and available(weight):
        from .kernels import weights  # imports Triton

        return weights.importance_scores(weight, factors)
    return importance_scores(updated_weight(weight, factors), factors)
