"""Invertible changes between a model's tensors and those of a Hugging Face class.

Each works on meta tensors too, which is how shapes and sizes on the Hugging Face side are known before anything is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.errors import CheckpointError


class Op(Protocol):
    """A change and its inverse.

    Args:
        exact: Whether no number is rounded in either direction, in any floating-point format (overflow aside).
    """

    exact: bool

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        """Their tensors of ours; a result may share memory with its source."""

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        """Our tensors of theirs.

        Raises:
            CheckpointError: Theirs hold something that ours cannot, at `where`.
        """


@dataclass(frozen=True)
class Same:
    """The same tensor."""

    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        return list(native)

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        return list(theirs)


@dataclass(frozen=True)
class Scaled:
    """Times a power of two, which no format rounds."""

    factor: float
    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        return [tensor * self.factor for tensor in native]

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        return [tensor / self.factor for tensor in theirs]


@dataclass(frozen=True)
class LessOne:
    """w - 1, for norms that multiply by 1 + w. Exact where w >= 1/2 (Sterbenz), else rounded to the nearest, on the way there."""

    exact = False

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        return [tensor - 1 for tensor in native]

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        return [tensor + 1 for tensor in theirs]


@dataclass(frozen=True)
class Expert:
    """One expert of a stack, its rows cut into equal parts: [1, parts * f, h] and `parts` matrices [f, h]."""

    parts: int
    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        (stack,) = native
        return list(stack.squeeze(0).chunk(self.parts))

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        rows = theirs[0] if len(theirs) == 1 else torch.cat(list(theirs))  # one matrix is not copied
        return [rows.unsqueeze(0)]


@dataclass(frozen=True)
class QueryAndGate:
    """The query projection and the gate's in one matrix: for each head its d query rows, then its d gate rows.

    Our gate has d rows per head, or one, which is repeated; or there is none, and the rows are 0, so that every score is 1/2.

    Shapes: q [n d, h] and gate [n d, h] or [n, h] -> [2 n d, h].
    Source: Qwen3NextAttention of transformers.
    """

    heads: int
    rows: int
    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        query = native[0].unflatten(0, (self.heads, -1))  # [n, d, h]
        gate = native[1].unflatten(0, (self.heads, self.rows)).expand_as(query) if self.rows else torch.zeros_like(query)
        return [torch.cat([query, gate], dim=1).flatten(0, 1)]

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        query, gate = theirs[0].unflatten(0, (self.heads, -1)).chunk(2, dim=1)
        kept = gate[:, : self.rows]
        if not torch.equal(kept.expand_as(gate) if self.rows else torch.zeros_like(gate), gate):
            what = "one row per head, repeated" if self.rows else "0"
            raise CheckpointError(
                f"{where}: by the config the gate's rows are {what}, and these are not; it is not the config of these tensors"
            )
        return [query.flatten(0, 1), *([kept.flatten(0, 1)] if self.rows else [])]


@dataclass(frozen=True)
class GroupedQueryAndGate:
    """The query projection and the gate's in one matrix, by key/value head: the d query rows of each of its query heads, then their gates'.

    Shapes: q [n d, h] and gate [n r, h], of r = d rows per head or 1 -> [n (d + r), h].
    Source: the code released with arXiv 2505.06708, whose layout is that of `QueryAndGate` only where n = g and r = d.
    """

    kv_heads: int
    heads: int
    rows: int
    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        groups = [tensor.unflatten(0, (self.kv_heads, -1)) for tensor in native]  # [g, n/g d, h] and [g, n/g r, h]
        return [torch.cat(groups, dim=1).flatten(0, 1)]

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        groups = theirs[0].unflatten(0, (self.kv_heads, -1))
        gates = self.heads // self.kv_heads * self.rows
        return [part.flatten(0, 1) for part in groups.split([groups.shape[1] - gates, gates], dim=1)]


@dataclass(frozen=True)
class Zeros:
    """What their class has and our model has not: zeros of these shapes."""

    shapes: tuple[Shape, ...]
    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        # Of one number each: a config may ask for any size, and is refused by the shapes alone.
        return [torch.zeros(1).expand(shape) for shape in self.shapes]

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        if any(tensor.count_nonzero() for tensor in theirs):
            raise CheckpointError(f"{where}: by the config this is 0, and it is not; it is not the config of these tensors")
        return []


@dataclass(frozen=True)
class LeftOut:
    """What our model has and theirs has not, and no output depends on: the rows that pad the vocabulary. Zeros on the way back."""

    shape: Shape
    exact = True

    def to_hf(self, native: Sequence[Tensor]) -> list[Tensor]:
        return []

    def from_hf(self, theirs: Sequence[Tensor], *, where: str) -> list[Tensor]:
        return [torch.zeros(self.shape)]


ELEMENTWISE = (Same, Scaled, LessOne)
"""Ops of one tensor whose every element depends on the same one: a part of the one gives that part of the other (`table.Row.parts`)."""
