"""Loading takes a rank's own shard and a few MB, however the checkpoint was cut; saving takes one chunk."""

from pathlib import Path

import pytest
import torch
from own_memory import growth, in_fresh_process

from megagate.checkpoint import inspection, reshard, store
from megagate.checkpoint.safefile import CHUNK_BYTES

MB = 1 << 20
ROWS, COLUMNS, EXPERTS = 4096, 4096, 8
SHAPES = {"master/w": (ROWS, COLUMNS), "exp_avg/w": (ROWS, COLUMNS), "master/experts": (EXPERTS, 1024, 1024), "state/b": (3,)}
NUMEL = {"master/w": ROWS * COLUMNS, "exp_avg/w": ROWS * COLUMNS, "master/experts": EXPERTS << 20, "state/b": 3}
PIECE = 4 * ROWS * COLUMNS // 8
"""The smallest piece of `w` on the disk, 8 MB: what a reader would hold that copies one before it cuts out its part."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return in_fresh_process(measured, tmp_path_factory.mktemp("memory"))


def test_loading_takes_the_shard_and_little_more(grown: dict[str, int]) -> None:
    loads = {name: size for name, size in grown.items() if name.startswith(("all", "columns", "flat"))}
    assert len(loads) == 6
    assert all(-MB < size < PIECE * 3 // 4 for size in loads.values()), loads


def test_digests_take_little(grown: dict[str, int]) -> None:
    assert max(grown["verify rows"], grown["verify columns"]) < PIECE * 3 // 4, grown


def test_comparing_takes_a_few_blocks(grown: dict[str, int]) -> None:
    assert grown["compare"] < 48 * MB, grown


def test_saving_takes_a_chunk(grown: dict[str, int]) -> None:
    assert grown["write"] < CHUNK_BYTES + 3 * MB, grown


# ---- in a process of its own: 200 MB are saved, loaded and compared


def save(root: Path, world: int, *, by_columns: bool) -> None:
    """Shards of `w` by rows or columns, of experts, over so many ranks, written one rank after the other."""
    staging = store.begin(root, 1)
    full = {name: torch.ones(()).expand(shape) for name, shape in SHAPES.items()}
    for rank in range(world):
        pieces = [store.Piece("state/b", (3,), (0,), full["state/b"])] if rank == 0 else []
        for name in ("master/w", "exp_avg/w"):
            dim, size = (1, COLUMNS // world) if by_columns else (0, ROWS // world)
            offset = (0, rank * size) if dim else (rank * size, 0)
            pieces.append(store.Piece(name, SHAPES[name], offset, full[name].narrow(dim, 0, size)))
        share = EXPERTS // world
        pieces.append(store.Piece("master/experts", SHAPES["master/experts"], (rank * share, 0, 0), full["master/experts"][:share]))
        store.write_rank(staging, rank, pieces)
    store.publish(root, 1, world_size=world, metadata={})


def load_columns(root: Path) -> list[torch.Tensor]:
    """What rank 1 of 4 holds when `w` is cut by dim 1."""
    with store.Checkpoint.open(root) as checkpoint:
        shards = [torch.empty(ROWS, COLUMNS // 4) for _ in range(2)]
        for name, shard in zip(("master/w", "exp_avg/w"), shards, strict=True):
            checkpoint.read(name, (0, COLUMNS // 4), shard)
        return shards


def load_flat(root: Path) -> list[torch.Tensor]:
    """What a rank of ZeRO holds: a ragged range of a shard by columns."""
    size = ROWS * COLUMNS // 2 // 3
    with store.Checkpoint.open(root) as checkpoint:
        flats = [torch.empty(size) for _ in range(2)]
        for name, flat in zip(("master/w", "exp_avg/w"), flats, strict=True):
            shard = {"shard_offset": (0, COLUMNS // 2), "shard_shape": (ROWS, COLUMNS // 2)}
            reshard.read_flat(checkpoint, name, full_shape=(ROWS, COLUMNS), **shard, start=size + 17, flat=flat)
        return flats


def load_all(root: Path) -> list[torch.Tensor]:
    """Everything, as one rank."""
    with store.Checkpoint.open(root) as checkpoint:
        return [checkpoint.read_whole(name) for name in SHAPES]


def verify(root: Path) -> None:
    """Every digest."""
    with store.Checkpoint.open(root) as checkpoint:
        checkpoint.verify()


def compare(root: Path, other: Path) -> None:
    """Two checkpoints of other layouts."""
    with store.Checkpoint.open(root) as a, store.Checkpoint.open(other) as b:
        assert inspection.compare(a, b, report=lambda size: None).same


def write(root: Path) -> int:
    """What a save takes beside its pieces, which are views of a buffer, one of them not contiguous."""
    buffer = torch.ones(ROWS, COLUMNS)
    pieces = [
        store.Piece("master/w", (ROWS, COLUMNS), (0, 0), buffer.t()),
        store.Piece("exp_avg/w", (ROWS, COLUMNS), (0, 0), buffer),
        store.Piece("half", (ROWS, COLUMNS // 2), (0, 0), buffer[:, ::2]),
    ]
    staging = store.begin(root, 1)
    return growth(lambda: store.write_rank(staging, 0, pieces))


def measured(root: str) -> dict[str, int]:
    """{what: bytes that it took beside what it must hold}"""
    folder = Path(root)
    save(folder / "warm", 1, by_columns=False)
    load_all(folder / "warm")
    found = {"write": write(folder / "write")}
    save(folder / "rows", 8, by_columns=False)
    save(folder / "columns", 4, by_columns=True)
    everything = 4 * sum(NUMEL.values())
    for name in ("rows", "columns"):
        found[f"all of {name}"] = growth(lambda name=name: load_all(folder / name)) - everything
        found[f"columns of {name}"] = growth(lambda name=name: load_columns(folder / name)) - 2 * ROWS * COLUMNS
        found[f"flat of {name}"] = growth(lambda name=name: load_flat(folder / name)) - 8 * (ROWS * COLUMNS // 6)
        found[f"verify {name}"] = growth(lambda name=name: verify(folder / name))
    found["compare"] = growth(lambda: compare(folder / "rows", folder / "columns"))
    return found
