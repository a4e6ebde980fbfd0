"""What is saved comes back exactly; what is damaged, missing, doubled or does not fit is refused by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from checkpoint_helpers import numbered, save_pieces
from safetensors import safe_open

from megagate.checkpoint import rankfile, reader, safefile, store
from megagate.checkpoint.index import DTYPE_NAMES, encode_index, read_index
from megagate.checkpoint.store import Box, Checkpoint, Piece, StoredTensor
from megagate.errors import CheckpointError, RunError


def whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_and_rank_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    cases = {
        "scalar": numbered((), dtype) + torch.ones((), dtype=dtype) if dtype is torch.float32 else numbered((), dtype),
        "odd": numbered((3,), dtype),
        "matrix": numbered((5, 3), dtype),
        "transposed": numbered((5, 3), dtype).t(),
        "strided": numbered((4, 6), dtype)[:, 1::2],
        "expanded": numbered((4, 1), dtype).expand(4, 3),
        "empty": numbered((0, 4), dtype),
        "leaf": numbered((2,), dtype).requires_grad_(dtype.is_floating_point),
    }
    folder = save_pieces(tmp_path, 1, [[whole(name, tensor) for name, tensor in cases.items()]])
    with Checkpoint.open(folder) as checkpoint, safe_open(folder / "rank-00000.safetensors", "pt") as stock:
        assert checkpoint.verify() == len(cases) == len(list(stock.keys()))
        for name, tensor in cases.items():
            expected = tensor.detach()
            got = checkpoint.read_whole(name)
            assert (got.dtype, got.shape, bits(got)) == (dtype, expected.shape, bits(expected))
            other = stock.get_tensor(f"{name}@{','.join('0' * expected.dim())}")
            assert (other.dtype, other.shape, bits(other)) == (dtype, expected.shape, bits(expected))


def test_mixed_item_sizes_stay_aligned(tmp_path: Path) -> None:
    dtypes = {"a": torch.uint8, "b": torch.float32, "c": torch.bfloat16, "d": torch.float64}
    tensors = {name: numbered((3,), dtype) for name, dtype in dtypes.items()}
    folder = save_pieces(tmp_path, 1, [[whole(name, tensor) for name, tensor in tensors.items()]])
    content = (folder / "rank-00000.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[f"{name}@0"]["data_offsets"][0]) % tensor.element_size() == 0


def test_properties_and_metadata(tmp_path: Path) -> None:
    metadata = {"config": {"lr": 1e-3}, "cursor": 2**60, "rng": [1, 2], "best": float("inf"), "note": "ünïcode"}
    folder = save_pieces(tmp_path, 123, [[whole("w", numbered((2, 3)))], []], metadata)
    with Checkpoint.open(folder) as checkpoint:
        assert (checkpoint.step, checkpoint.metadata, checkpoint.folder) == (123, metadata, folder)
        assert (checkpoint.tensors["w"].shape, checkpoint.tensors["w"].dtype) == ((2, 3), torch.float32)
        assert checkpoint.tensors["w"].pieces[0].digest == blake3(bits(numbered((2, 3)))).hexdigest()
    assert folder.name == "step-00000123" and store.resolve(tmp_path) == folder


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="metadata of step 1 is not JSON"):
        save_pieces(tmp_path, 1, [[whole("w", numbered((2,)))]], {"x": torch.zeros(1)})


def test_read_fills_strided_targets_and_nothing_else(saved: Path) -> None:
    full = numbered((6, 5))
    corner, side, top = full[2:, 3:], full[2:, :3], full[:2]
    cut = [[Piece("w", (6, 5), (2, 3), corner), Piece("w", (6, 5), (0, 0), top)], [Piece("w", (6, 5), (2, 0), side)]]
    save_pieces(saved, 40, cut)
    buffer = torch.full((5, 4), -1.0)
    with Checkpoint.open(saved) as checkpoint:
        checkpoint.read("w", (1, 2), buffer.t()[:3, 1:4])
    assert torch.equal(buffer.t()[:3, 1:4], full[1:4, 2:5])
    assert (buffer == -1).sum() == 20 - 9


def test_wrong_reads_are_refused(saved: Path) -> None:
    with Checkpoint.open(saved) as checkpoint:
        with pytest.raises(CheckpointError, match=r"no tensor 'v'; the nearest name is 'w'"):
            checkpoint.read("v", (0, 0), torch.zeros(4, 6))
        with pytest.raises(CheckpointError, match=r"w is stored as torch.float32, not torch.bfloat16"):
            checkpoint.read("w", (0, 0), torch.zeros(4, 6, dtype=torch.bfloat16))
        with pytest.raises(CheckpointError, match=r"the box \[1:5, 0:6\] asked for does not lie in its shape \(4, 6\)"):
            checkpoint.read("w", (1, 0), torch.zeros(4, 6))
        with pytest.raises(CheckpointError, match="does not lie in its shape"):
            checkpoint.read("w", (0,), torch.zeros(4))


def test_handles_are_bounded_and_closed(tmp_path: Path) -> None:
    full = numbered((9, 2))
    save_pieces(tmp_path, 1, [[Piece("w", (9, 2), (rank, 0), full[rank : rank + 1])] for rank in range(9)])

    def mapped() -> int:
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    with Checkpoint.open(tmp_path, max_open_files=3) as checkpoint:
        assert torch.equal(checkpoint.read_whole("w"), full) and torch.equal(checkpoint.read_whole("w"), full)
        assert mapped() == 3
    assert mapped() == 0


def test_the_handle_unused_for_longest_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pieces(tmp_path, 1, [[whole(name, torch.zeros(1))] for name in "abc"])
    opened = []

    class Counted(rankfile.PieceFile):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(reader, "PieceFile", Counted)
    with Checkpoint.open(tmp_path, max_open_files=2) as checkpoint:
        for name in "abacab":
            checkpoint.read_whole(name)
    assert opened == [f"rank-0000{rank}.safetensors" for rank in (0, 1, 2, 1)]


def test_closing_does_not_pull_the_file_from_under_a_tensor(saved: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), Checkpoint.open(saved) as checkpoint:
        held = checkpoint._file("rank-00000.safetensors").tensor("w", Box((0, 0), (3, 6)), torch.float32)
        raise RuntimeError("boom")
    assert (held == 30).all()


def test_an_index_with_a_gap_is_found_at_once(saved: Path) -> None:
    folder = saved / "step-00000030"
    index = read_index(folder)
    tensor = index.contents.tensors["w"]
    index.contents.tensors["w"] = StoredTensor(tensor.shape, tensor.dtype, tensor.pieces[:1])
    (folder / "index.json").write_bytes(encode_index(index))
    with pytest.raises(CheckpointError, match=r"index.json is damaged .*: the pieces of w hold 18 elements, its shape \(4, 6\) has 24"):
        Checkpoint.open(saved)


def test_an_index_with_a_gap_and_as_large_an_overlap_is_found_where_it_is_read(saved: Path) -> None:
    state = numbered((4, 6))
    folder = save_pieces(saved, 40, [[Piece("w", (4, 6), (row, 0), state[row : row + 1])] for row in range(4)])
    index = read_index(folder)
    tensor = index.contents.tensors["w"]
    index.contents.tensors["w"] = StoredTensor(tensor.shape, tensor.dtype, (*tensor.pieces[:3], tensor.pieces[1]))
    (folder / "index.json").write_bytes(encode_index(index))
    out = torch.full((2, 6), -1.0)
    with Checkpoint.open(saved) as checkpoint:
        with pytest.raises(CheckpointError, match=r"w: elements \[3:4, 1:6\] are held by no piece in .*step-00000040"):
            checkpoint.read("w", (2, 1), out[:, 1:])
        with pytest.raises(CheckpointError, match=r"w: elements \[1:2, 0:6\] are held by 2 pieces \(in rank-00001.safetensors, rank-00001"):
            checkpoint.read("w", (0, 0), out)
        assert (out == -1).all()
        checkpoint.read("w", (2, 0), out[:1])
    assert torch.equal(out[0], state[2])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_is_found_and_named_by_the_rank_that_checks_it(saved: Path) -> None:
    path = saved / "step-00000030" / "rank-00001.safetensors"
    flip(path, -5)
    with Checkpoint.open(saved) as checkpoint:
        with pytest.raises(CheckpointError, match=r"w, piece at \[3, 0\] in .*step-00000030/rank-00001.safetensors: .*the file is damaged"):
            checkpoint.verify()
        assert checkpoint.verify(rank=0, world_size=2) == 1
        with pytest.raises(CheckpointError, match=r"w, piece at \[3, 0\]"):
            checkpoint.verify(rank=1, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_the_ranks_of_a_world_verify_every_piece_once(tmp_path: Path, world_size: int) -> None:
    full = numbered((7, 2))
    rows = [Piece("w", (7, 2), (row, 0), full[row : row + 1]) for row in range(7)]
    folder = save_pieces(tmp_path, 1, [rows[rank::3] for rank in range(3)])
    with Checkpoint.open(folder) as checkpoint:
        assert sum(checkpoint.verify(rank=rank, world_size=world_size) for rank in range(world_size)) == 7
    damaged = 0
    flip(folder / "rank-00002.safetensors", -1)
    for rank in range(world_size):
        with Checkpoint.open(folder) as checkpoint:
            try:
                checkpoint.verify(rank=rank, world_size=world_size)
            except CheckpointError:
                damaged += 1
    assert damaged == 1


def test_missing_and_truncated_files_are_named_at_open(saved: Path) -> None:
    path = saved / "step-00000030" / "rank-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError, match=f"rank-00001.safetensors has {size - 1} bytes, {size} are recorded"):
        Checkpoint.open(saved)
    path.write_bytes(path.read_bytes() + b"12")
    with pytest.raises(CheckpointError, match=f"rank-00001.safetensors has {size + 1} bytes, {size} are recorded"):
        Checkpoint.open(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"rank-00001.safetensors is missing, {size} bytes are recorded"):
        Checkpoint.open(saved)


def test_any_flipped_bit_of_the_index_is_found(saved: Path) -> None:
    index = saved / "step-00000030" / "index.json"
    content = index.read_bytes()
    assert json.loads(content)["step"] == 30
    for position in range(0, len(content), 7):
        flip(index, position)
        with pytest.raises(CheckpointError, match=r"index.json is damaged or was edited"):
            Checkpoint.open(saved)
        index.write_bytes(content)
    Checkpoint.open(saved).close()


def test_a_newer_format_is_refused(saved: Path) -> None:
    index = saved / "step-00000030" / "index.json"
    rest = b"{" + index.read_bytes().partition(b'",')[2].replace(b'"format":1', b'"format":2')
    index.write_bytes(b'{"digest":"' + blake3(rest).hexdigest().encode() + b'",' + rest[1:])
    with pytest.raises(CheckpointError, match="format 2, and this megagate reads format 1"):
        Checkpoint.open(saved)


def test_any_flipped_bit_of_a_header_is_harmless_or_found(saved: Path) -> None:
    path = saved / "step-00000030" / "rank-00000.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = 0
    for position in range(8 + length):
        flip(path, position)
        with Checkpoint.open(saved) as checkpoint:
            try:
                checkpoint.verify()
                assert (checkpoint.read_whole("w") == 30).all()
            except CheckpointError as error:
                assert "rank-00000.safetensors" in str(error) and "damaged" in str(error)
                found += 1
        path.write_bytes(content)
    assert found > length // 2


def test_a_header_that_points_behind_the_file_is_found(saved: Path) -> None:
    path = saved / "step-00000030" / "rank-00000.safetensors"
    content = path.read_bytes()
    assert content.count(b"[0,72]") == 1
    path.write_bytes(content.replace(b"[0,72]", b"[9,81]"))
    with Checkpoint.open(saved) as checkpoint, pytest.raises(CheckpointError, match="begins at byte 9, what stands before it ends at 0"):
        checkpoint.read_whole("w")


def test_read_fills_a_leaf_that_requires_grad(saved: Path) -> None:
    out = torch.zeros(4, 6, requires_grad=True)
    with Checkpoint.open(saved) as checkpoint:
        checkpoint.read("w", (0, 0), out)
    assert out.requires_grad and out.grad_fn is None and (out == 30).all()


full = numbered((4, 6))


@pytest.mark.parametrize(
    "ranks, message",
    [
        ([[Piece("w", (4, 6), (0, 0), full[:3])], []], r"w: elements \[3:4, 0:6\] of the full shape \(4, 6\) are held by no piece"),
        (
            [[Piece("w", (4, 6), (0, 0), full[:3])], [Piece("w", (4, 6), (2, 0), full[2:])]],
            r"w: elements \[2:3, 0:6\] .* are held by 2 pieces \(in rank-0000[01].safetensors, rank-0000[01].safetensors\)",
        ),
        (
            [[whole("exp_avg/w", full), Piece("master/w", (4, 6), (0, 0), full[:2])], [Piece("master/w", (4, 6), (3, 0), full[3:])]],
            r"master/w: elements \[2:3, 0:6\] .* are held by no piece",
        ),
        ([[whole("w", full)], [whole("w", full)]], r"are held by 2 pieces .*replicate"),
        ([[whole("s", torch.tensor(1.0))], [whole("s", torch.tensor(1.0))]], r"s: elements \[\] .* are held by 2 pieces"),
        ([[Piece("w", (4, 6), (0, 0), full[:2])], [Piece("w", (4, 7), (2, 0), full[2:])]], r"w: rank 1 gives it shape \(4, 7\)"),
        ([[Piece("w", (4, 6), (0, 0), full[:2])], [Piece("w", (4, 6), (2, 0), full[2:].double())]], r"w: rank 1 .* torch.float64"),
    ],
)
def test_publish_refuses_what_is_not_held_exactly_once(saved: Path, ranks: list[list[Piece]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_pieces(saved, 40, ranks)
    assert store.complete_steps(saved) == [10, 20, 30] and store.resolve(saved).name == "step-00000030"


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([Piece("w", (4, 6), (0, 0), full), Piece("w", (4, 6), (0, 0), full[:1])], r"w: two pieces of one rank begin at \[0, 0\]"),
        ([Piece("w", (4, 6), (0, 0), full[:1]), Piece("w", (5, 6), (1, 0), full[:1])], r"w: pieces of one rank give it the shape"),
    ],
)
def test_pieces_of_one_rank_that_contradict_each_other_are_refused(tmp_path: Path, pieces: list[Piece], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        store.write_rank(store.begin(tmp_path, 1), 0, pieces)


def test_pieces_that_cannot_be_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"w: a piece of shape \(4, 6\) at offset \(1, 0\) does not lie in the full shape \(4, 6\)"):
        Piece("w", (4, 6), (1, 0), full)
    with pytest.raises(CheckpointError, match="w: torch.complex64 cannot be saved"):
        whole("w", full.to(torch.complex64))


def test_publish_needs_every_rank_whole(tmp_path: Path) -> None:
    staging = store.begin(tmp_path, 1)
    store.write_rank(staging, 0, [whole("w", full)])
    with pytest.raises(CheckpointError, match=r"ranks \[1, 2\] of 3 left no finished part"):
        store.publish(tmp_path, 1, world_size=3, metadata={})
    store.write_rank(staging, 1, [whole("v", full)])
    with pytest.raises(CheckpointError, match=r"holds \['rank-00001.json', 'rank-00001.safetensors'\], which none of the 1 ranks"):
        store.publish(tmp_path, 1, world_size=1, metadata={})
    os.truncate(staging / "rank-00001.safetensors", 100)
    with pytest.raises(CheckpointError, match="rank-00001.safetensors has 100 bytes"):
        store.publish(tmp_path, 1, world_size=2, metadata={})
    assert store.complete_steps(tmp_path) == []


def test_a_write_that_takes_only_a_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:11]))
    folder = save_pieces(tmp_path, 1, [[whole("w", full)]])
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.verify() == 1 and torch.equal(checkpoint.read_whole("w"), full)


VIEWS = [full, full.t(), full[:, ::2], full[1:3, 1:4], full[0], full[:, 0], torch.tensor(3.0), full[:0], full[:, :0]]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("limit", [1, 4, 8, 20, 48, 10**6])
def test_chunks_are_small_and_in_order(view: torch.Tensor, limit: int) -> None:
    parts = []
    for part in safefile.chunks(view, limit):
        assert part.dim() == 1 and part.is_contiguous() and part.nbytes <= max(4, limit)
        parts.append(part.clone())
    assert torch.equal(torch.cat(parts), view.reshape(-1))


def test_chunks_do_not_copy_what_is_contiguous() -> None:
    flat = torch.zeros(100)
    assert [part.data_ptr() for part in safefile.chunks(flat, 40)] == [flat.data_ptr() + 40 * i for i in range(10)]


def test_a_large_tensor_goes_through_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankfile, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(safefile.chunks, "__defaults__", (1 << 12,))
    tensor = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    folder = save_pieces(tmp_path, 1, [[whole("w", tensor), whole("v", tensor.t())]])
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors["w"].pieces[0].digest == blake3(bits(tensor)).hexdigest()
        assert checkpoint.verify() == 2
        assert torch.equal(checkpoint.read_whole("w"), tensor) and torch.equal(checkpoint.read_whole("v"), tensor.t())


def full_disk(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """From now on the disk takes `budget` more bytes."""
    write, left = os.write, [budget]

    def limited(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        taken = write(descriptor, data[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", limited)


@pytest.mark.parametrize("budget", [0, 5, 300, 500])
def test_no_space_says_so_and_leaves_no_trace(saved: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    staging = store.begin(saved, 40)
    full_disk(monkeypatch, budget)  # 500 bytes: the data fits, the manifest does not
    with pytest.raises(RunError, match=r"no space for its .* are free there.*untouched; free space or quota, lower checkpoint.keep"):
        store.write_rank(staging, 0, [whole("w", full), whole("v", full)])
    monkeypatch.undo()
    assert list(staging.iterdir()) == [], "the folder itself is the other ranks' too"
    with Checkpoint.open(saved) as checkpoint:
        assert checkpoint.step == 30 and checkpoint.verify() == 2


def test_no_space_on_one_rank_leaves_the_others_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = store.begin(saved, 40)
    store.write_rank(staging, 0, [whole("w", full)])
    with monkeypatch.context() as context, pytest.raises(RunError):
        full_disk(context, 10)
        store.write_rank(staging, 1, [whole("v", full)])
    assert sorted(path.name for path in staging.iterdir()) == ["rank-00000.json", "rank-00000.safetensors"]
    store.discard(saved, 40)
    assert not staging.exists() and store.complete_steps(saved) == [10, 20, 30]


@pytest.mark.parametrize("budget", [0, 100])
def test_no_space_for_the_index(saved: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    staging = store.begin(saved, 40)
    store.write_rank(staging, 0, [whole("w", full)])
    with monkeypatch.context() as context, pytest.raises(RunError, match="index.json: no space"):
        full_disk(context, budget)
        store.publish(saved, 40, world_size=1, metadata={})
    assert not staging.exists() and store.resolve(saved).name == "step-00000030"


def test_no_space_for_the_pointer_keeps_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context, pytest.raises(RunError, match="latest: no space"):
        full_disk(context, 0)
        store.set_pointer(saved, "latest", 10)
    assert store.read_pointer(saved, "latest") == 30 and not (saved / "latest.tmp").exists()


def test_other_errors_are_not_called_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = store.begin(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        store.write_rank(staging, 0, [whole("w", full)])
    assert list(staging.iterdir()) == []
