"""Ways to compute `y = x W' + b` for one matrix: dense in several layouts, and sparse by the kernels of libraries.

`KERNELS` is the register: an entry more is a candidate more, in `sparse_inference` and in `peft-pst bench`. None
computes gradients.
"""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from importlib import metadata
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from .masking import count_zeros

_HALF = (torch.bfloat16, torch.float16)
_LARGEST_INDEX = 2**31 - 1


class LinearKernel(ABC):
    """One way to compute `x W' + b`, with its own copy of the weight in the form that it wants.

    Args:
        weight: (out, in), floating, in any memory layout; never changed.
        rows: rows of input to expect; a kernel may pack for them, and is right for any number.
    """

    is_sparse: ClassVar[bool] = True

    @staticmethod
    @abstractmethod
    def refusal(weight: Tensor) -> str | None:
        """Why this kernel does not take a matrix (out, in); None where it does."""

    @abstractmethod
    def __init__(self, weight: Tensor, rows: int) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in), at least one row, of the weight's dtype -> (rows, out), contiguous, of the same dtype."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The weight as it is stored: some tensor of shape (out, in), or what is kept of one."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight that was packed, (out, in), bit for bit, but for the sign of zeros."""

    # Packed tensors cannot always be copied or pickled; weights can.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dense_weight(), 1)


class Dense(LinearKernel):
    """The weight in the layout it came in, multiplied by torch."""

    is_sparse = False

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        return None

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    @property
    def stored(self) -> Tensor:
        return self.weight

    def dense_weight(self) -> Tensor:
        return self.weight


class Transposed(Dense):
    """The weight with rows and columns exchanged in memory, multiplied by torch."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = weight.T.contiguous().T if weight.is_contiguous() else weight.contiguous()


class OneDNN(LinearKernel):
    """Dense, in the blocked layout that oneDNN chooses for this processor, as torch's compiler packs it."""

    is_sparse = False

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return "oneDNN is for CPUs, and has to be part of torch"
        supported = {
            torch.float32: True,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
        return None if supported.get(weight.dtype) else f"oneDNN packs no {weight.dtype} on this processor"

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, bias, "none", [], "")

    @property
    def stored(self) -> Tensor:
        return self.packed

    def dense_weight(self) -> Tensor:
        return self.packed.to_dense()


class CSR(LinearKernel):
    """Compressed sparse rows in torch, which hands them to MKL: a vector product for one row, else a matrix product.

    Indices are 32 bits wide, as MKL wants them; torch's default of 64 would be converted at every call. bfloat16 and
    float16 weights are stored and multiplied as float32, since there are no kernels for them.
    """

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        if weight.device.type != "cpu" or not torch.backends.mkl.is_available():
            return "CSR needs a CPU, and MKL as part of torch"
        return _no_smaller(weight, weight.numel() - count_zeros(weight))

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.dtype = weight.dtype
        with _without_beta_warnings():
            self.matrix = _with_int32_indices(_computable(weight).to_sparse_csr())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _compressed_product(self.matrix, x, bias)

    @property
    def stored(self) -> Tensor:
        return self.matrix

    def dense_weight(self) -> Tensor:
        return self.matrix.to_dense().to(self.dtype)


class BSR(CSR):
    """Blocks of zeros left out, the others multiplied whole: torch's block-sparse rows, by MKL."""

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        if weight.device.type != "cpu" or not torch.backends.mkl.is_available():
            return "BSR needs a CPU, and MKL as part of torch"
        if block_size(weight) is None:
            return f"its zeros do not come in square blocks of {_BLOCK_SIZES[-1]} to {_BLOCK_SIZES[0]}"
        return _no_smaller(weight, weight.numel() - count_zeros(weight))

    def __init__(self, weight: Tensor, rows: int) -> None:
        side = block_size(weight)
        assert side is not None, "refusal() lets none through"
        self.dtype = weight.dtype
        with _without_beta_warnings():
            self.matrix = _with_int32_indices(_computable(weight).to_sparse_bsr((side, side)))


class MKL(LinearKernel):
    """Compressed sparse rows by the package sparse-dot-mkl, which brings an MKL of its own (extra `sparse`)."""

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        if weight.device.type != "cpu":
            return "MKL is for CPUs"
        try:
            _load_sparse_dot_mkl()
        except ImportError as error:
            return f"{error}; run: pip install 'peft-pst[sparse]'"
        return _no_smaller(weight, weight.numel() - count_zeros(weight))

    def __init__(self, weight: Tensor, rows: int) -> None:
        from scipy.sparse import csr_array

        self.dtype = weight.dtype
        self.product = _load_sparse_dot_mkl()
        kept = CSR(weight, rows).matrix
        parts = (kept.values().numpy(), kept.col_indices().numpy(), kept.crow_indices().numpy())
        self.matrix = csr_array(parts, shape=tuple(weight.shape))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        computed = _computable(x)
        if len(x) == 1:
            product = torch.from_numpy(self.product(self.matrix, computed[0].numpy()))[None]
        else:
            product = torch.from_numpy(self.product(self.matrix, computed.T.contiguous().numpy())).T.contiguous()
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    @property
    def stored(self) -> Tensor:
        return torch.from_numpy(self.matrix.data)

    def dense_weight(self) -> Tensor:
        return torch.from_numpy(self.matrix.toarray()).to(self.dtype)


class Submatrix(LinearKernel):
    """A dense product with the rows and columns that are not wholly zero: inputs are gathered, outputs spread."""

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        rows, columns = (weight != 0).any(1), (weight != 0).any(0)
        kept = int(rows.sum()) * int(columns.sum())
        # Moving inputs and outputs costs something too, so a stray row is no reason.
        return None if kept <= 0.9 * weight.numel() else "less than a tenth of it is in rows and columns wholly zero"

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.shape = tuple(weight.shape)
        self.kept_rows = (weight != 0).any(1).nonzero().squeeze(1)
        self.kept_columns = (weight != 0).any(0).nonzero().squeeze(1)
        small = weight[self.kept_rows][:, self.kept_columns].contiguous()
        kind = OneDNN if small.numel() and OneDNN.refusal(small) is None else Dense
        self.product: LinearKernel = kind(small, rows)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out_features, in_features = self.shape
        inputs = x if len(self.kept_columns) == in_features else x.index_select(1, self.kept_columns)
        if len(self.kept_rows) == out_features:
            return self.product(inputs, bias)
        result = x.new_zeros(len(x), out_features) if bias is None else bias.expand(len(x), out_features).clone()
        small_bias = None if bias is None else bias[self.kept_rows]
        return result.index_copy_(1, self.kept_rows, self.product(inputs, small_bias))

    @property
    def stored(self) -> Tensor:
        return self.product.stored

    def dense_weight(self) -> Tensor:
        small = self.product.dense_weight()
        dense = small.new_zeros(self.shape)
        dense[self.kept_rows[:, None], self.kept_columns] = small
        return dense


class TwoFour(LinearKernel):
    """At most two of every four neighbours kept: the sparse tensor cores of NVIDIA GPUs from Ampere on, by torch."""

    @staticmethod
    def refusal(weight: Tensor) -> str | None:
        if weight.device.type != "cuda":
            return "2:4 needs a CUDA device"
        return _unusable_form(weight) or two_four_violation(weight)

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.matrix: Any = torch.sparse.to_sparse_semi_structured(weight.contiguous())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.matrix, bias)

    @property
    def stored(self) -> Tensor:
        return self.matrix

    def dense_weight(self) -> Tensor:
        return self.matrix.to_dense()


KERNELS: dict[str, type[LinearKernel]] = {
    "dense": Dense,
    "transposed": Transposed,
    "onednn": OneDNN,
    "csr": CSR,
    "bsr": BSR,
    "mkl": MKL,
    "submatrix": Submatrix,
    "2:4": TwoFour,
}
"""Name -> kernel; the first is the layer as it is."""


# Patterns


def two_four_violation(weight: Tensor) -> str | None:
    """Where a matrix breaks the rule that torch's semi-structured packing takes for granted; None where it holds.

    The rule for 16 bits: of the entries 4 j to 4 j + 3 of a row, at most two are not zero. The packing keeps two of
    each four without a word about a third, so that a matrix that breaks the rule would come out as another one.

    Args:
        weight: (out, in); the groups lie along the inputs.

    Example:
        >>> two_four_violation(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]]))
        >>> two_four_violation(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 4.0, 5.0, 3.0]]))
        'row 1, columns 0 to 3 hold 3 entries that are not zero; 2:4 allows 2'
    """
    if weight.shape[1] % 4:
        return f"its {weight.shape[1]} columns are not a multiple of 4"
    kept = (weight != 0).unflatten(1, (-1, 4)).sum(2)
    if not (kept > 2).any():
        return None
    row, group = (kept > 2).nonzero()[0].tolist()
    number = int(kept[row, group])
    return f"row {row}, columns {4 * group} to {4 * group + 3} hold {number} entries that are not zero; 2:4 allows 2"


_BLOCK_SIZES = (64, 32, 16, 8, 4)


def block_size(weight: Tensor) -> int | None:
    """Side of the largest square blocks that zeros come in: what is kept then holds less than one zero in ten.

    Args:
        weight: (out, in).

    Returns:
        64, 32, 16, 8 or 4, which divides both sides; None where there are no such blocks, or no zeros.

    Example:
        >>> block_size(torch.eye(8).repeat_interleave(8, 0).repeat_interleave(8, 1))
        8
        >>> block_size(torch.eye(64)) is None
        True
    """
    kept = weight.numel() - count_zeros(weight)
    for side in _BLOCK_SIZES:
        if weight.shape[0] % side == 0 and weight.shape[1] % side == 0:
            blocks = int((weight != 0).unflatten(0, (-1, side)).unflatten(2, (-1, side)).any(3).any(1).sum())
            if blocks * side**2 < weight.numel() and kept > 0.9 * blocks * side**2:
                return side
    return None


def _unusable_form(weight: Tensor) -> str | None:
    backends = (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS)
    if weight.dtype == torch.float32:
        return (
            "torch packs float32 as one entry of every two, not as two of four; cast the model to bfloat16 or float16"
        )
    limits = [b._DTYPE_SHAPE_CONSTRAINTS[weight.dtype] for b in backends if weight.dtype in b._DTYPE_SHAPE_CONSTRAINTS]
    if not limits:
        return f"torch packs no {weight.dtype} as 2:4"
    rows, columns = (math.lcm(*sizes) for sizes in zip(*(limit[:2] for limit in limits), strict=True))
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {tuple(weight.shape)} is not a multiple of {rows} x {columns}, which 2:4 asks for"
    return None


def _no_smaller(weight: Tensor, kept: int) -> str | None:
    """A value and its 32-bit index for each kept entry have to be less than the dense matrix."""
    if kept > _LARGEST_INDEX:
        return f"it keeps {kept:,} entries, more than 32-bit indices reach"
    sparse, dense = kept * (4 + _computable(weight[:0]).element_size()), weight.numel() * weight.element_size()
    if sparse < dense:
        return None
    return f"its {kept:,} kept entries would take {sparse:,} bytes with their indices, the dense matrix {dense:,}"


# Products


def _computable(tensor: Tensor) -> Tensor:
    """As float32 where it is half as wide: MKL's sparse products know float32 and float64."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _with_int32_indices(matrix: Tensor) -> Tensor:
    return torch.sparse_compressed_tensor(
        matrix.crow_indices().int(),
        matrix.col_indices().int(),
        matrix.values(),
        matrix.shape,
        layout=matrix.layout,
        check_invariants=True,
    )


def _compressed_product(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    computed, shift = _computable(x), None if bias is None else _computable(bias)
    if len(x) == 1:
        vector = computed[0]
        product = (matrix @ vector if shift is None else torch.addmv(shift, matrix, vector))[None]
    else:
        columns = computed.T
        product = (matrix @ columns if shift is None else torch.addmm(shift[:, None], matrix, columns)).T.contiguous()
    return product.to(x.dtype)


def _without_beta_warnings() -> warnings.catch_warnings:
    """Torch says once in a process that its compressed tensors are in beta, and that they are not checked."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _load_sparse_dot_mkl() -> Any:
    """Its product, with as many threads as torch uses."""
    if "MKL_RT" not in os.environ:
        # Inside a virtual environment the package does not find the library that pip put there.
        library = [file for file in metadata.files("mkl") or [] if file.name.startswith(("libmkl_rt.", "mkl_rt."))]
        if library:
            os.environ["MKL_RT"] = str(library[0].locate())
    import sparse_dot_mkl

    sparse_dot_mkl.mkl_set_num_threads(torch.get_num_threads())
    return sparse_dot_mkl.dot_product_mkl
