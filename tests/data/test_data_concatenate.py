"""Documents in blocks, and runs of small shards."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagate.data import concatenate
from megagate.data.concatenate import append_documents, check_ids, document_blocks, small_runs
from megagate.data.shards import Shard, ShardWriter
from megagate.errors import DataError


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 12), max_size=12), first=st.integers(0, 12), last=st.integers(0, 12))
def test_blocks_hold_every_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], first: int, last: int
) -> None:
    monkeypatch.setattr(concatenate, "_BLOCK_DOCUMENTS", 5)
    monkeypatch.setattr(concatenate, "_BLOCK_TOKENS", 8)
    ids = np.arange(sum(sizes))
    with ShardWriter(tmp_path / "a", dtype=np.dtype("<u2")) as writer:
        writer.add_many(ids, lengths=sizes)
    shard = Shard(tmp_path / "a")
    first, last = sorted((min(first, len(sizes)), min(last, len(sizes))))
    blocks = list(document_blocks(shard, first, last))
    assert [size for _, _, lengths in blocks for size in lengths.tolist()] == sizes[first:last]
    begin, end = sum(sizes[:first]), sum(sizes[:last])
    assert [token for _, found, _ in blocks for token in found.tolist()] == list(range(begin, end))
    for at, found, lengths in blocks:
        assert found.size == lengths.sum() and (not found.size or found[0] == at)
        assert lengths.size <= 5 and (found.size <= 8 or lengths.size == 1)
    with ShardWriter(tmp_path / "b", dtype=np.dtype("<u2")) as writer:
        append_documents(writer, shard, first, last, vocab_size=1000)
    copy = Shard(tmp_path / "b")
    assert copy.lengths.tolist() == sizes[first:last] and copy.stream.tolist() == list(range(begin, end))


def test_ids_are_judged_by_their_place(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", dtype=np.dtype("<i4")) as writer:
        writer.add([1, 5, 9])
    shard = Shard(tmp_path / "a")
    assert check_ids(shard, shard.stream, begin=0, vocab_size=10) == 9 and check_ids(shard, shard.stream[:0], begin=0, vocab_size=1) == -1
    with pytest.raises(DataError, match=r"a.bin holds id 9 at token 102 \(byte 408\); ids must be in \[0, 9\)"):
        check_ids(shard, shard.stream, begin=100, vocab_size=9)
    with pytest.raises(DataError, match=r"holds id -2 at token 1 "):
        check_ids(shard, np.array([0, -2], dtype=np.int64), begin=0, vocab_size=9)


@pytest.mark.parametrize(
    ("tokens", "full", "expected"),
    [
        ([], 5, []),
        ([1, 2], 0, [[1], [2]]),
        ([1, 2, 3, 1], 3, [[1, 2], [3], [1]]),
        ([1, 9, 1, 1], 5, [[1], [9], [1, 1]]),
        ([9, 9], 5, [[9], [9]]),
        ([0, 0, 6], 5, [[0, 0], [6]]),
    ],
)
def test_runs_of_small_shards(tokens: list[int], full: int, expected: list[list[int]]) -> None:
    assert [[tokens[index] for index in run] for run in small_runs(tokens, full)] == expected
