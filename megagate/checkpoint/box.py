"""Boxes of a tensor's index space, and the proof that a set of them holds every element exactly once."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """An axis-aligned box of an n-D tensor: elements `offset[i] <= index[i] < offset[i] + shape[i]`."""

    offset: Shape
    shape: Shape

    @property
    def volume(self) -> int:
        """Elements in the box; 1 for the box of a 0-d tensor."""
        return prod(self.shape)

    def fits(self, full_shape: Shape) -> bool:
        """Whether the box lies within a tensor of `full_shape` (and has as many dims)."""
        return len(self.offset) == len(self.shape) == len(full_shape) and all(
            min(offset, size) >= 0 and offset + size <= full for offset, size, full in zip(self.offset, self.shape, full_shape, strict=True)
        )

    def overlap(self, other: "Box") -> "Box | None":
        """The common part of two boxes of one tensor, or None when they share no element."""
        offset, shape = [], []
        for a, na, b, nb in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            low, high = max(a, b), min(a + na, b + nb)
            if low >= high:
                return None
            offset.append(low)
            shape.append(high - low)
        return Box(tuple(offset), tuple(shape))

    def slices_of(self, outer: "Box") -> tuple[slice, ...]:
        """The slices that cut this box out of a tensor that holds the box `outer` around it."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.offset, self.shape, outer.offset, strict=True))

    def within(self, outer: "Box") -> "Box":
        """The same box with its offset counted from the corner of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{offset}:{offset + size}" for offset, size in zip(self.offset, self.shape, strict=True)) + "]"


class Flaw(NamedTuple):
    """A region that is not held exactly once.

    Args:
        region: A box of elements that are all held by the same pieces.
        holders: Positions, in the boxes examined, of the pieces that hold it: none for a gap, two or more for an overlap.
    """

    region: Box
    holders: tuple[int, ...]


Held = list[tuple[int, Box]]


def find_flaw(full_shape: Shape, boxes: Sequence[Box]) -> Flaw | None:
    """Look for an element of a tensor of `full_shape` that no box, or more than one box, holds.

    The space is cut in two along a face of a box until each part lies in one box; the cut is the one that leaves the fewest
    boxes in the fuller half. Grids and flat ranges, whatever their number, take about n log(n) steps instead of n^2.

    Returns:
        None when every element is in exactly one box, otherwise the first flawed region.
    """
    whole = Box((0,) * len(full_shape), full_shape)
    if not whole.volume:
        return None
    pending: list[tuple[Box, Held]] = [(whole, [(i, box) for i, box in enumerate(boxes) if box.volume])]
    while pending:
        region, held = pending.pop()
        if len(held) == 1 and held[0][1] == region:
            continue
        halves = _halve(region, held)
        if halves:
            pending += halves
        elif len(held) != 1:
            return Flaw(region, tuple(i for i, _ in held))
    return None


def _halve(region: Box, held: Held) -> list[tuple[Box, Held]]:
    """Cut `region` and the boxes in it at the best face; empty when no face lies inside, so every box fills the region."""
    best: tuple[int, int, int] | None = None
    for dim, (low, size) in enumerate(zip(region.offset, region.shape, strict=True)):
        starts = sorted(box.offset[dim] for _, box in held)
        stops = sorted(box.offset[dim] + box.shape[dim] for _, box in held)
        for cut in {*starts, *stops} - {low, low + size}:
            fuller_half = max(bisect_left(starts, cut), len(held) - bisect_right(stops, cut))
            best = min(best, (fuller_half, dim, cut)) if best else (fuller_half, dim, cut)
    if best is None:
        return []
    _, dim, cut = best
    end = region.offset[dim] + region.shape[dim]
    halves = (_with_range(region, dim, region.offset[dim], cut), _with_range(region, dim, cut, end))
    return [(half, [(i, part) for i, box in held if (part := box.overlap(half))]) for half in halves]


def _with_range(box: Box, dim: int, start: int, stop: int) -> Box:
    """`box` with the range [start, stop) along `dim`."""
    return Box(box.offset[:dim] + (start,) + box.offset[dim + 1 :], box.shape[:dim] + (stop - start,) + box.shape[dim + 1 :])
