"""Flat ranges as boxes, exhaustively; and states that go from any layout to any other exactly."""

import random
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import Layouts, numbered, save_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.checkpoint import reader, reshard, store
from megagate.checkpoint.box import Box
from megagate.errors import CheckpointError


def check_boxes(shape: tuple[int, ...], start: int, stop: int) -> None:
    """The boxes, read one after the other, are exactly the range, and few."""
    found = reshard.boxes(shape, start, stop)
    ids = np.arange(prod(shape)).reshape(shape)
    assert all(box.fits(shape) and box.volume for box in found)
    read = [ids[tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))].reshape(-1) for box in found]
    assert np.concatenate([*read, np.empty(0, int)]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2), (2, 3, 1, 3), (2, 2, 2, 2)])
def test_every_range_of_small_shapes(shape: tuple[int, ...]) -> None:
    for start, stop in product(range(prod(shape) + 1), repeat=2):
        if start <= stop:
            check_boxes(shape, start, stop)


@given(st.data())
def test_any_range_of_any_shape(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=5)))
    start = data.draw(st.integers(0, prod(shape)))
    check_boxes(shape, start, data.draw(st.integers(start, prod(shape))))


def test_the_whole_is_one_box_and_whole_rows_are_one_box() -> None:
    assert reshard.boxes((4, 5, 6), 0, 120) == [Box((0, 0, 0), (4, 5, 6))]
    assert reshard.boxes((4, 5, 6), 30, 90) == [Box((1, 0, 0), (2, 5, 6))]


@pytest.mark.parametrize("start, stop", [(-1, 2), (0, 13), (5, 4)])
def test_a_range_outside_is_refused(start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=r"does not lie in a tensor of shape \(3, 4\) with 12 elements"):
        reshard.boxes((3, 4), start, stop)


def test_pieces_are_views_at_the_shard_offset() -> None:
    flat = torch.arange(7.0)
    pieces = reshard.flat_pieces("w", full_shape=(10, 8), shard_offset=(4, 2), shard_shape=(3, 4), start=2, flat=flat)
    assert [(piece.offset, tuple(piece.tensor.shape)) for piece in pieces] == [((4, 4), (1, 2)), ((5, 2), (1, 4)), ((6, 2), (1, 1))]
    assert all(piece.full_shape == (10, 8) and piece.name == "w" for piece in pieces)
    flat.add_(100)
    assert torch.cat([piece.tensor.reshape(-1) for piece in pieces]).tolist() == flat.tolist()


@pytest.mark.parametrize(
    "shard_offset, start, flat",
    [
        ((4, 2), 6, torch.zeros(7)),  # longer than the shard: the optimizer's padding
        ((4, 2), -1, torch.zeros(2)),
        ((8, 2), 0, torch.zeros(2)),  # the shard leaves the tensor
        ((4, 2), 0, torch.zeros(1, 2)),
    ],
)
def test_fragments_that_do_not_fit_are_refused(shard_offset: tuple[int, int], start: int, flat: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="w: a fragment of shape .* does not lie in the shard"):
        reshard.flat_pieces("w", full_shape=(10, 8), shard_offset=shard_offset, shard_shape=(3, 4), start=start, flat=flat)


SHAPES: dict[str, tuple[int, ...]] = {
    "master/q": (12, 7),
    "master/experts": (6, 5, 4),
    "exp_avg/experts": (6, 5, 4),
    "master/norm": (11,),
    "master/scale": (),
    "master/conv": (2, 3, 2, 5),
    "ids": (9, 2),
    "half": (8, 3),
}
DTYPES = {"ids": torch.int64, "half": torch.bfloat16}
STATE = {
    name: (1000 * torch.randn(shape, generator=torch.Generator().manual_seed(i))).to(DTYPES.get(name, torch.float32))
    for i, (name, shape) in enumerate(SHAPES.items())
}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), worlds=st.tuples(st.integers(1, 6), st.integers(1, 6)))
@pytest.mark.parametrize("few", [0, 32])
def test_any_layout_to_any_layout(tmp_path_factory: pytest.TempPathFactory, few: int, seed: int, worlds: tuple[int, int]) -> None:
    rng = random.Random(seed)
    root = tmp_path_factory.mktemp("run")
    save_layout(root, 1, STATE, Layouts.draw(SHAPES, worlds[0], rng))
    with pytest.MonkeyPatch.context() as context, store.Checkpoint.open(root, max_open_files=rng.randint(1, 3)) as checkpoint:
        context.setattr(reader, "_FEW", few)
        assert set(checkpoint.tensors) == set(SHAPES)
        for fragment in sum(Layouts.draw(SHAPES, worlds[1], rng), []):
            expected = Layouts.local(fragment, STATE[fragment.name])
            buffer = torch.full((expected.numel() + 5,), 77, dtype=expected.dtype)
            flat = buffer[2 : 2 + expected.numel()]
            reshard.read_flat(
                checkpoint,
                fragment.name,
                full_shape=fragment.full_shape,
                shard_offset=fragment.shard.offset,
                shard_shape=fragment.shard.shape,
                start=fragment.start,
                flat=flat,
            )
            assert torch.equal(flat, expected)
            assert (buffer[:2] == 77).all() and (buffer[-3:] == 77).all(), "read_flat wrote outside its fragment"
        for name, full in STATE.items():
            assert torch.equal(checkpoint.read_whole(name), full)


def test_saving_what_was_loaded_under_another_layout_gives_the_same_bytes(tmp_path: Path) -> None:
    layout = Layouts.draw(SHAPES, 3, random.Random(1))
    first = save_layout(tmp_path / "a", 1, STATE, layout)
    second = save_layout(tmp_path / "b", 1, STATE, Layouts.draw(SHAPES, 5, random.Random(2)))
    with store.Checkpoint.open(second) as checkpoint:
        loaded = {name: checkpoint.read_whole(name) for name in checkpoint.tensors}
    third = save_layout(tmp_path / "c", 1, loaded, layout)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["index.json", *(f"rank-{rank:05d}.safetensors" for rank in range(3))]
    assert [(third / name).read_bytes() for name in names] == [(first / name).read_bytes() for name in names]


def test_a_fragment_of_another_model_is_refused(tmp_path: Path) -> None:
    save_layout(tmp_path, 1, {"w": numbered((4, 6))}, Layouts.draw({"w": (4, 6)}, 2, random.Random(0)))
    with store.Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"w has the shape \(4, 6\) in .* \(4, 8\)"):
        reshard.read_flat(checkpoint, "w", full_shape=(4, 8), shard_offset=(0, 0), shard_shape=(4, 6), start=0, flat=torch.zeros(24))


def test_a_leaf_that_requires_grad_is_filled_in_place(tmp_path: Path) -> None:
    save_layout(tmp_path, 1, {"w": numbered((4, 6))}, Layouts.draw({"w": (4, 6)}, 2, random.Random(0)))
    master = torch.zeros(10, requires_grad=True)
    with store.Checkpoint.open(tmp_path) as checkpoint:
        reshard.read_flat(checkpoint, "w", full_shape=(4, 6), shard_offset=(0, 0), shard_shape=(4, 6), start=5, flat=master)
    assert master.tolist() == list(range(5, 15)) and master.requires_grad
