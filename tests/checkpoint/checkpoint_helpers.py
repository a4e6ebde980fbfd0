"""Helpers of the checkpoint tests: how a small state is cut over ranks, saved, and compared."""

import random
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from megagate.checkpoint import reshard, store
from megagate.checkpoint.box import Box


class Fragment(NamedTuple):
    """A flat range of a shard (a box) of a logical tensor, as ZeRO gives it to one rank."""

    name: str
    full_shape: tuple[int, ...]
    shard: Box
    start: int
    stop: int


class Layouts:
    """Random layouts of logical tensors over a world: grids of shards (rows, columns, experts), each cut flat at ragged places."""

    @staticmethod
    def draw(shapes: Mapping[str, tuple[int, ...]], world_size: int, rng: random.Random) -> list[list[Fragment]]:
        """The fragments of each rank; together they hold every element exactly once."""
        ranks: list[list[Fragment]] = [[] for _ in range(world_size)]
        for name, shape in shapes.items():
            for shard in Layouts.grid(shape, rng):
                cuts = sorted(rng.randint(0, shard.volume) for _ in range(rng.randint(0, 3)))
                for start, stop in zip([0, *cuts], [*cuts, shard.volume], strict=True):
                    ranks[rng.randrange(world_size)].append(Fragment(name, shape, shard, start, stop))
        return ranks

    @staticmethod
    def grid(shape: tuple[int, ...], rng: random.Random) -> list[Box]:
        """Shards of one tensor: a grid with random, uneven lines."""
        boxes = [Box((), ())]
        for size in shape:
            lines = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 2)))})
            ranges = list(zip(lines, lines[1:]))  # noqa: B905
            boxes = [Box((*box.offset, low), (*box.shape, high - low)) for box in boxes for low, high in ranges]
        return boxes

    @staticmethod
    def local(fragment: Fragment, full: torch.Tensor) -> torch.Tensor:
        """The true elements of a fragment, cut from the full tensor."""
        slices = tuple(slice(a, a + n) for a, n in zip(fragment.shard.offset, fragment.shard.shape, strict=True))
        return full[slices].reshape(-1)[fragment.start : fragment.stop]


def save_pieces(root: Path, step: int, ranks: list[list[store.Piece]], metadata: Mapping[str, object] | None = None) -> Path:
    """Save as a world of `len(ranks)` does, one rank after the other."""
    staging = store.begin(root, step)
    for rank, pieces in enumerate(ranks):
        store.write_rank(staging, rank, pieces)
    return store.publish(root, step, world_size=len(ranks), metadata=metadata or {})


def save_layout(
    root: Path,
    step: int,
    state: Mapping[str, torch.Tensor],
    layout: list[list[Fragment]],
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Save `state` cut by `layout`; fragments are views of one flat buffer per rank, as in an optimizer."""
    ranks = []
    for fragments in layout:
        pieces = []
        for fragment in fragments:
            flat = Layouts.local(fragment, state[fragment.name])
            buffer = torch.cat([torch.zeros(3, dtype=flat.dtype), flat, torch.zeros(2, dtype=flat.dtype)])
            pieces += reshard.flat_pieces(
                fragment.name,
                full_shape=fragment.full_shape,
                shard_offset=fragment.shard.offset,
                shard_shape=fragment.shard.shape,
                start=fragment.start,
                flat=buffer[3 : 3 + flat.numel()],
            )
        ranks.append(pieces)
    return save_pieces(root, step, ranks, metadata)


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file under a folder, by its path; folders are empty."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose elements differ from one another."""
    return torch.arange(prod(shape)).to(dtype).reshape(shape)
