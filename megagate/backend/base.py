"""The seam between the maths and the kernels. A layer asks its backend for its products when it is built, and never which backend it is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from megagate.backend.documents import Documents
from megagate.config.model import MoEConfig
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.shard import Shard

Role = Literal["projection", "gate", "logits"]
"""What a product is for: values; logits of an elementwise gate, in FP8 if so configured; other logits, which never are."""


@dataclass(frozen=True)
class Part:
    """One weight of a `ColumnLinears`.

    Args:
        name: Of the weight in its layer; no two of a site are alike.
        rows: Of this rank.
        role: What its product is for.
    """

    name: str
    rows: int
    role: Role = "projection"


class Norm(Protocol):
    """A norm that a product may take along; `nn.norm.RMSNorm`."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The normed x."""
        ...


class ColumnLinears(Protocol):
    """Several column-parallel products of one input, as one GEMM.

    Shapes: x [b, s/tp, h], each weight [rows_i/tp, h] -> each output [b, s, rows_i/tp], and the normed x [b, s/tp, h].
    Parallel: all-gather over the sequence forward, reduce-scatter backward.
    """

    def __call__(self, x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
        """The products, in the order of `weights`. Where a norm is given, x is normed by it first."""
        ...


class RowLinear(Protocol):
    """A row-parallel product.

    Shapes: x [b, s, k/tp], weight [h, k/tp] -> [b, s/tp, h].
    Parallel: reduce-scatter over the sequence forward, all-gather backward.
    """

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product, summed over tp."""
        ...


class GroupedLinear(Protocol):
    """One product per expert: rows `ends[e-1]:ends[e]` of `x` with `weight[e]`. An expert without rows still takes part.

    Shapes: x [rows, k], weight [e, n, k], ends [e] int32 -> [rows, n].
    """

    def __call__(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """The products."""
        ...


class AttentionCore(Protocol):
    """Causal grouped-query attention, over the whole row or, where documents are given, within each of them.

    Shapes: q [b, s, n, d], k and v [b, s, g, d] -> [b, s, n, d].
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v."""
        ...


class Chosen(NamedTuple):
    """What a router's logits come to.

    Args:
        ids: [b, s, k] int64, the experts.
        probs: [b, s, k] fp32, their weights, with gradient.
        shares: [b, s, E] fp32, the scores of all experts as shares of 1, with gradient.
    """

    ids: Tensor
    probs: Tensor
    shares: Tensor


class Permuted(NamedTuple):
    """Tokens once for each of their experts, grouped by expert, in the order of the tokens within each.

    Args:
        x: [R, h].
        probs: [R, 1] fp32.
        restore: What `Backend.unpermute` needs.
    """

    x: Tensor
    probs: Tensor
    restore: Any


@dataclass(frozen=True)
class Kept:
    """A tensor of numbers that precision needs from step to step, in fp32.

    Args:
        name: In its site.
        tensor: This rank's part, live: whoever loads a checkpoint copies into it.
        shard: Which part that is: all of it, the same on every rank, or whole experts, cut over ep.
        unit: The tensor holds so many times what a checkpoint does, which is to be the same under every layout.
    """

    name: str
    tensor: Tensor
    shard: Shard
    unit: float = 1.0


@runtime_checkable
class KeepsState(Protocol):
    """A site that has such tensors; an `nn.Module` (for its name in the model) without parameters and buffers."""

    def kept_state(self) -> list[Kept]:
        """All of them, in the same order and with the same full shapes on every rank and under every layout."""
        ...


class Backend(Protocol):
    """Kernels of a model, given to every layer's constructor.

    Products are *sites*: made once for each place in the model and called with the weights, which the layers own; a site may keep what its
    precision needs beside them.

    Args:
        row_multiple: The rows of each expert are padded up to this multiple before a `GroupedLinear`.
    """

    row_multiple: int

    def of_layer(self, index: int, num_layers: int) -> "Backend":
        """The backend of one block; some blocks may stay in high precision."""
        ...

    def column_linears(
        self, width: int, parts: Sequence[Part], *, tp: Axis, eps: float | None = None, gives_normed: bool = True
    ) -> ColumnLinears:
        """The site of products of an input of `width` with weights as in `parts`.

        Args:
            width: Of the input.
            parts: What is multiplied with it.
            tp: The tensor axis.
            eps: Of the norm that every call gives, so that a kernel may norm and multiply at once; None where calls may give none.
            gives_normed: Whether the normed input is read; if not, what is given back as such may be anything.
        """
        ...

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        """The site of a product of an input whose part on this rank has `width`, with `rows` results."""
        ...

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """The site of the products of `num_experts` experts, over all ranks, cut over `mesh.ep`."""
        ...

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        """The site of the attention of this rank's heads of `width` channels."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension with fp32 statistics, in the dtype of `x`. Source: arXiv 1910.07467, equation 4."""
        ...

    def choose(self, logits: Tensor, config: MoEConfig, *, bias: Tensor | None) -> Chosen:
        """The experts of each token and their weights.

        Shapes: logits [b, s, E] fp32, bias [E], added to scores for the choice alone.
        """
        ...

    def permute(self, x: Tensor, probs: Tensor, ids: Tensor, *, num_experts: int) -> Permuted:
        """Group tokens by expert. Shapes: x [T, h], probs and ids [T, k]."""
        ...

    def unpermute(self, rows: Tensor, restore: Any) -> Tensor:
        """The sum of each token's rows. Shapes: rows [R, h] -> [T, h]."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Around every forward pass of the model."""
        ...

    def recompute(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, computed again in the backward pass instead of keeping what it needs."""
        ...

    def after_backward(self, model: nn.Module) -> None:
        """After the backward pass of each micro-step. Collective."""
        ...

    def unrecorded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around passes that are no part of the training: they use what sites keep, and leave no trace in it, nor in what comes after."""
        ...
