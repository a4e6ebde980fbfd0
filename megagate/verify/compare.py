"""Pieces of logical tensors from many ranks against the whole tensors of one."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megagate.checkpoint.store import Piece


@dataclass
class Agreement:
    """How well a tensor, or a group of them, agrees with the reference; sums over elements.

    Args:
        product: Of actual and expected.
        actual: Squares of the actual elements.
        expected: Squares of the expected elements.
        squares: Squares of the differences.
        worst: Largest difference of an element, as a share of the scale of its tensor: its largest expected element, unless told otherwise.
        where: The tensor of that element.
    """

    product: float = 0.0
    actual: float = 0.0
    expected: float = 0.0
    squares: float = 0.0
    worst: float = 0.0
    where: str = ""

    @property
    def ratio(self) -> float:
        """Best factor between actual and expected (least squares); nan where nothing was expected."""
        return self.product / self.expected if self.expected else math.nan

    @property
    def distance(self) -> float:
        """Length of the difference, relative to the expected length."""
        return math.sqrt(self.squares / self.expected) if self.expected else math.inf if self.squares else 0.0

    def is_multiple(self, to: float) -> bool:
        """Whether actual is `ratio` times expected, but for a part `to` of its length."""
        if not self.actual or not self.expected:
            return False
        rest = self.actual - self.product**2 / self.expected
        return rest <= to**2 * self.actual

    def add(self, other: "Agreement") -> None:
        """Take the elements of another tensor in."""
        self.product += other.product
        self.actual += other.actual
        self.expected += other.expected
        self.squares += other.squares
        if other.worst > self.worst or math.isnan(other.worst):
            self.worst, self.where = other.worst, other.where


def whole_tensors(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """The logical tensors, put together, by name without the kind."""
    wholes: dict[str, Tensor] = {}
    for piece in pieces:
        whole = wholes.setdefault(_name(piece), torch.full(piece.full_shape, math.nan))
        whole[_place(piece)] = piece.tensor
    return wholes


def compare(pieces: Iterable[Piece], expected: Mapping[str, Tensor], *, scales: Mapping[str, float] | None = None) -> dict[str, Agreement]:
    """Every piece of every rank against its place in the expected tensor. Elements that no rank has count as not agreeing.

    Args:
        pieces: Of all ranks; several may hold the same place.
        expected: Whole tensors, by name.
        scales: Of each tensor, at the least: where it is what larger numbers leave when they cancel, it is only known to theirs.
    """
    scales = scales or {}
    results = {name: Agreement(where=name) for name in expected}
    seen = {name: torch.zeros(whole.shape, dtype=torch.bool) for name, whole in expected.items()}
    scales = {name: max(whole.abs().max().item(), scales.get(name, 0.0)) for name, whole in expected.items()}
    for piece in pieces:
        name = _name(piece)
        seen[name][_place(piece)] = True
        results[name].add(_agreement(piece.tensor, expected[name][_place(piece)], scales[name], name))
    for name, mask in seen.items():
        if not mask.all():
            results[name].add(Agreement(worst=math.inf, where=name))
    return results


def _agreement(actual: Tensor, expected: Tensor, scale: float, name: str) -> Agreement:
    actual, expected = actual.double(), expected.double()
    difference = actual - expected
    largest = difference.abs().max().item()
    worst = largest / scale if scale else math.inf if largest else 0.0
    sums = ((actual * expected).sum(), actual.square().sum(), expected.square().sum(), difference.square().sum())
    return Agreement(*(value.item() for value in sums), worst=worst, where=name)


def _name(piece: Piece) -> str:
    return piece.name.partition("/")[2]


def _place(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.tensor.shape, strict=True))
