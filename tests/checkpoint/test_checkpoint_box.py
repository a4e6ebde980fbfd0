"""find_flaw against counting every element; boxes cut and overlap as slices do."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.checkpoint.box import Box, find_flaw


def counted(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How many boxes hold each element."""
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))] += 1
    return counts


@st.composite
def shape_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A cover made by cutting the whole again and again; then a box may be dropped, doubled, moved or grown."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.shape[dim]))
        for low, size in ((0, cut), (cut, box.shape[dim] - cut)):
            offset, extent = list(box.offset), list(box.shape)
            offset[dim] += low
            extent[dim] = size
            boxes.append(Box(tuple(offset), tuple(extent)))
    for _ in range(draw(st.integers(0, 2))):
        victim = draw(st.integers(0, len(boxes) - 1)) if boxes else None
        change = draw(st.sampled_from(["drop", "double", "other"]))
        if victim is not None and change == "drop":
            boxes.pop(victim)
        elif victim is not None and change == "double":
            boxes.append(boxes[victim])
        else:
            low = [draw(st.integers(0, n)) for n in shape]
            boxes.append(Box(tuple(low), tuple(draw(st.integers(0, n - a)) for a, n in zip(low, shape, strict=True))))
    return shape, draw(st.permutations(boxes))


@settings(max_examples=400, deadline=None)
@given(shape_and_boxes())
def test_find_flaw_is_counting(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    counts = counted(shape, boxes)
    flaw = find_flaw(shape, boxes)
    assert (flaw is None) == bool((counts == 1).all())
    if flaw is not None:
        assert flaw.region.volume > 0
        inside = counts[tuple(slice(a, a + n) for a, n in zip(flaw.region.offset, flaw.region.shape, strict=True))]
        assert (inside == len(flaw.holders)).all() and len(flaw.holders) != 1
        assert all(boxes[i].overlap(flaw.region) == flaw.region for i in flaw.holders)


def test_equal_volume_is_not_enough() -> None:
    overlap_and_gap = [Box((0, 0), (2, 4)), Box((1, 0), (1, 4)), Box((3, 0), (1, 4))]
    assert sum(box.volume for box in overlap_and_gap) == 16
    assert find_flaw((4, 4), overlap_and_gap) is not None


def test_pinwheel_has_no_straight_cut() -> None:
    boxes = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
    assert find_flaw((3, 3), boxes) is None
    flaw = find_flaw((3, 3), boxes[:-1])
    assert flaw is not None
    assert flaw == (Box((1, 1), (1, 1)), ())


def test_empty_and_scalar_tensors() -> None:
    assert find_flaw((0, 3), []) is None
    assert find_flaw((), [Box((), ())]) is None
    assert find_flaw((), []) is not None
    assert find_flaw((), [Box((), ())] * 2) is not None


@pytest.mark.parametrize("rows, columns", [(8192, 1), (1, 8192), (90, 90)])
def test_thousands_of_pieces_are_not_quadratic(rows: int, columns: int) -> None:
    boxes = [Box((4 * i, 4 * j), (4, 4)) for i in range(rows) for j in range(columns)]
    random.Random(0).shuffle(boxes)
    start = time.perf_counter()
    assert find_flaw((4 * rows, 4 * columns), boxes) is None
    missing = boxes.pop()
    flaw = find_flaw((4 * rows, 4 * columns), boxes)
    assert time.perf_counter() - start < 10, "about 0.5 s on one core; quadratic takes minutes"
    assert flaw is not None
    assert flaw == (missing, ())


@given(st.data())
def test_overlap_and_slices_are_those_of_sets(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))

    def box() -> Box:
        low = tuple(data.draw(st.integers(0, n)) for n in shape)
        return Box(low, tuple(data.draw(st.integers(0, n - a)) for a, n in zip(low, shape, strict=True)))

    a, b = box(), box()
    both = (counted(shape, [a]) + counted(shape, [b])) == 2
    common = a.overlap(b)
    assert (common is not None) == bool(both.any())
    if common is not None:
        assert (counted(shape, [common]) == both).all()
        assert counted(a.shape, [])[common.slices_of(a)].shape == common.shape
        whole = Box((0,) * len(shape), shape)
        in_a = np.arange(int(np.prod(shape))).reshape(shape)[a.slices_of(whole)]
        assert (in_a[common.slices_of(a)] == np.arange(int(np.prod(shape))).reshape(shape)[common.slices_of(whole)]).all()


@pytest.mark.parametrize(
    "offset, shape, fits",
    [
        ((0, 0), (2, 3), True),
        ((1, 0), (1, 3), True),
        ((2, 3), (0, 0), True),
        ((1, 0), (2, 3), False),
        ((-1, 0), (1, 1), False),
        ((0,), (2,), False),
    ],
)
def test_fits(offset: tuple[int, ...], shape: tuple[int, ...], fits: bool) -> None:
    assert Box(offset, shape).fits((2, 3)) is fits


def test_a_box_prints_as_a_slice() -> None:
    assert str(Box((0, 8), (4, 8))) == "[0:4, 8:16]"
