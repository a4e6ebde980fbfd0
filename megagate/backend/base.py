"""The seam between the maths and the kernels. A layer asks its backend for a linear, a norm, attention; it never asks which backend."""

from typing import Protocol

from torch import Tensor

from megagate.backend.documents import Documents
from megagate.parallel.mesh import Axis


class Backend(Protocol):
    """Kernels of a model, given to every layer's constructor.

    Args:
        row_multiple: The rows of each expert are padded up to this multiple before `grouped_linear`.
    """

    row_multiple: int

    def column_linears(self, x: Tensor, weights: list[Tensor], tp: Axis) -> list[Tensor]:
        """Several column-parallel products of one input, as one GEMM.

        Shapes: x [b, s/tp, h], each weight [rows_i/tp, h] -> each output [b, s, rows_i/tp].
        Parallel: all-gather over the sequence forward, reduce-scatter backward.
        """
        ...

    def row_linear(self, x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
        """A row-parallel product.

        Shapes: x [b, s, k/tp], weight [h, k/tp] -> [b, s/tp, h].
        Parallel: reduce-scatter over the sequence forward, all-gather backward.
        """
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension with fp32 statistics, in the dtype of `x`. Source: arXiv 1910.07467, equation 4."""
        ...

    def attention_core(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal grouped-query attention, over the whole row or, where documents are given, within each of them.

        Shapes: q [b, s, n, d], k and v [b, s, g, d] -> [b, s, n, d].
        """
        ...

    def grouped_linear(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """One product per expert: rows `ends[e-1]:ends[e]` of `x` with `weight[e]`.

        Shapes: x [rows, k], weight [e, n, k], ends [e] int32 -> [rows, n]. An expert without rows still takes part.
        """
        ...
