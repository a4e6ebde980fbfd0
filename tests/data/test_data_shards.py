"""Shards: bytes shared with Megatron, and what is refused."""

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagate.data import shards
from megagate.data.shards import Shard, ShardWriter, bin_path, idx_path, token_dtype
from megagate.errors import DataError

DOCUMENTS = [[5, 6, 7], [1], [], [65_000, 2], list(range(300))]


def write(prefix: Path, documents: list[list[int]], *, vocab_size: int = 65_499) -> shards.ShardStats:
    with ShardWriter(prefix, dtype=token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add(document)
    return writer.finish()


@pytest.mark.parametrize(("vocab_size", "name"), [(65_499, "uint16"), (65_500, "int32"), (151_936, "int32")])
def test_written_documents_are_read_back(tmp_path: Path, vocab_size: int, name: str) -> None:
    stats = write(tmp_path / "a", DOCUMENTS, vocab_size=vocab_size)
    shard = Shard(tmp_path / "a")
    assert shard.dtype.name == name
    assert [shard.document(i).tolist() for i in range(shard.documents)] == DOCUMENTS
    assert shard.stream.tolist() == sum(DOCUMENTS, [])
    assert (stats.tokens, stats.documents, stats.max_id) == (306, 5, 65_000)
    assert (shard.tokens, shard.documents) == (306, 5)
    shard.check_index()
    for path, size, digest in [(bin_path, stats.bin_bytes, stats.bin_sha256), (idx_path, stats.idx_bytes, stats.idx_sha256)]:
        raw = path(tmp_path / "a").read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, digest)


def test_documents_added_at_once_give_the_same_bytes_and_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", DOCUMENTS)
    monkeypatch.setattr(shards, "_INDEX_BLOCK", 2)
    with ShardWriter(tmp_path / "many", dtype=token_dtype(65_499)) as writer:
        writer.add_many(np.concatenate([np.array(d, dtype=np.int64) for d in DOCUMENTS]), lengths=[len(d) for d in DOCUMENTS])
    assert writer.finish() == one
    Shard(tmp_path / "many").check_index()


def test_an_empty_shard_can_be_read(tmp_path: Path) -> None:
    assert write(tmp_path / "a", []).max_id == -1
    shard = Shard(tmp_path / "a")
    assert (shard.tokens, shard.documents, shard.stream.size) == (0, 0, 0)
    shard.check_index()


@pytest.mark.parametrize("path", [bin_path, idx_path])
def test_a_truncated_file_is_refused_by_name_and_size(tmp_path: Path, path: object) -> None:
    write(tmp_path / "a", DOCUMENTS)
    file = path(tmp_path / "a")  # type: ignore[operator]
    size = file.stat().st_size
    for missing in (1, 2, size - 1, size):
        raw = file.read_bytes()
        os.truncate(file, size - missing)
        with pytest.raises(DataError) as caught:
            Shard(tmp_path / "a")
        for part in (str(file), "truncated", f"{size - missing} bytes", "copy the shard again"):
            assert part in str(caught.value)
        file.write_bytes(raw)
    Shard(tmp_path / "a")
    with open(file, "ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match="too long|damaged"):
        Shard(tmp_path / "a")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    for path in (bin_path(tmp_path / "a"), idx_path(tmp_path / "a")):
        raw = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=f"cannot read {path}: No such file.*check the path"):
            Shard(tmp_path / "a")
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "not an index of a token shard"),
        (9, b"\x02", "has version 2; only version 1"),
        (17, b"\x07", "token type code 7"),
        (17, b"\x04", "a.bin is truncated: 612 bytes, and its index promises 1212 .5 sequences of int32"),
        (18, b"\x06", "promises"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    raw = bytearray(idx_path(tmp_path / "a").read_bytes())
    raw[offset : offset + 1] = value
    idx_path(tmp_path / "a").write_bytes(bytes(raw))
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "a")


def test_check_index_finds_what_opening_does_not(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    good = idx_path(tmp_path / "a").read_bytes()
    first_length, second_start, second_border = 34, 34 + 4 * 5 + 8, 34 + 12 * 5 + 8
    for offset, message in [(first_length, "sequence 1 "), (second_start, "sequence 1 "), (second_border, "document 1 ")]:
        raw = bytearray(good)
        raw[offset] += 4
        idx_path(tmp_path / "a").write_bytes(bytes(raw))
        with pytest.raises(DataError, match=message):
            Shard(tmp_path / "a").check_index()


def test_an_index_whose_parts_contradict_each_other_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4, 5]])

    def index(lengths: list[int], starts: list[int], borders: list[int]) -> None:
        parts = [np.array(lengths, "<i4"), np.array(starts, "<i8"), np.array(borders, "<i8")]
        header = idx_path(tmp_path / "a").read_bytes()[:34]
        idx_path(tmp_path / "a").write_bytes(header + b"".join(part.tobytes() for part in parts))

    index([3, 2], [0, 6], [0, 1, 2])
    Shard(tmp_path / "a").check_index()
    for borders in ([0, 1, 1], [1, 1, 2], [0, 1, 3]):
        index([3, 2], [0, 6], borders)
        with pytest.raises(DataError, match="its documents do not span its 2 sequences"):
            Shard(tmp_path / "a")
    index([-1, 6], [0, -2], [0, 1, 2])
    with pytest.raises(DataError, match="sequence 0 has a wrong start or length"):
        Shard(tmp_path / "a").check_index()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 141), st.integers(0, 255)), max_size=4), cut=st.integers(0, 142))
def test_no_index_makes_the_reader_fail_otherwise(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    if not bin_path(tmp_path / "a").exists():
        write(tmp_path / "a", DOCUMENTS)
        (tmp_path / "good").write_bytes(idx_path(tmp_path / "a").read_bytes())
    raw = bytearray((tmp_path / "good").read_bytes())
    assert len(raw) == 142
    for offset, value in changes:
        raw[offset] = value
    idx_path(tmp_path / "a").write_bytes(bytes(raw[: cut or None]))
    try:
        shard = Shard(tmp_path / "a")
        shard.check_index()
    except DataError as error:
        assert str(tmp_path / "a") in str(error)
    else:
        assert sum(shard.document(i).size for i in range(shard.documents)) == shard.tokens


@pytest.mark.parametrize(("vocab_size", "document"), [(100, [1, -1]), (100, [65_536]), (70_000, [2**31])])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, vocab_size: int, document: list[int]) -> None:
    with pytest.raises(DataError, match="do not fit the u?int"), ShardWriter(tmp_path / "a", dtype=token_dtype(vocab_size)) as writer:
        writer.add(document)
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_before_the_end_or_after_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", dtype=token_dtype(100))
    writer.add([1, 2])
    assert not bin_path(tmp_path / "a").exists()
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "b", dtype=token_dtype(100)) as writer:
        writer.add([1, 2])
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_shards_can_be_read_by_others(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(tmp_path / "a", DOCUMENTS)
    finally:
        os.umask(mask)
    assert bin_path(tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_one_clean_message_and_leaves_nothing(tmp_path: Path) -> None:
    # The limit of a process on the size of its files is as real an error as a full disk, and needs none.
    program = (
        "import sys; from pathlib import Path; from megagate.data.shards import *; from megagate.errors import DataError\n"
        "try:\n"
        "    with ShardWriter(Path(sys.argv[1]), dtype=token_dtype(100)) as writer: writer.add([1] * 500_000)\n"
        "except DataError as error: sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        cwd=Path(__file__).parents[2],
    )
    assert f"cannot write {tmp_path / 'a.bin'}: File too large; free some space" in done.stderr
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_document_longer_than_an_index_can_tell_is_refused(tmp_path: Path) -> None:
    ids = np.broadcast_to(np.uint16(1), 2**31)  # takes no memory
    message = f"document 1 of {tmp_path}/a has 2147483648 tokens; at most 2147483647 fit; split it"
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path / "a", dtype=token_dtype(100)) as writer:
        writer.add([1])
        writer.add(ids)
    assert list(tmp_path.iterdir()) == []
