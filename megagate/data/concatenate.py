"""Documents of finished shards, block by block, and several shards made into one: for publishing, merging and looking at data sets."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagate.data.files import clean_errors, file_sha256
from megagate.data.hashing import IntArray
from megagate.data.shards import Shard, ShardStats, ShardWriter, bin_path, idx_path
from megagate.errors import DataError

_BLOCK_DOCUMENTS = 1 << 18
_BLOCK_TOKENS = 1 << 22  # unless a document is longer


@dataclass(frozen=True)
class Promise:
    """What a record or a manifest says of a finished shard; who takes it over must not pass damage on with new hashes that hide it.

    Args:
        stats: Counts, sizes and sha256.
        by: Who says so, for messages.
        remedy: What to do where it is not true.
    """

    stats: ShardStats
    by: str
    remedy: str

    def check_sizes(self, shard: Shard) -> None:
        """Compares what costs no reading.

        Raises:
            DataError: Counts or sizes of the files differ.
        """
        with clean_errors("read", idx_path(shard.prefix)):
            idx_bytes = idx_path(shard.prefix).stat().st_size
        size = shard.tokens * shard.dtype.itemsize
        found = {"tokens": shard.tokens, "documents": shard.documents, "bin_bytes": size, "idx_bytes": idx_bytes}
        for key, value in found.items():
            if value != getattr(self.stats, key):
                raise DataError(f"{shard.prefix}: {key} is {value}, and {self.by} says {getattr(self.stats, key)}; {self.remedy}")

    def check_sha256(self, prefix: Path, *, bin_sha256: str) -> None:
        """Compares the bytes of a shard whose `.bin` was just read, and reads its `.idx` for that.

        Raises:
            DataError: A file is damaged.
        """
        with clean_errors("read", idx_path(prefix)):
            idx_sha256 = file_sha256(idx_path(prefix))
        for path, found, said in [
            (bin_path(prefix), bin_sha256, self.stats.bin_sha256),
            (idx_path(prefix), idx_sha256, self.stats.idx_sha256),
        ]:
            if found != said:
                raise DataError(f"{path} is damaged: its sha256 is {found}, and {self.by} says {said}; {self.remedy}")


def document_offsets(shard: Shard, first: int, last: int) -> IntArray:
    """[last - first + 1] the token at which each of these documents begins, and the end of the last; of an index that was checked."""
    borders = shard.borders[first : last + 1]
    offsets = np.full(borders.size, shard.tokens, dtype=np.int64)
    inside = borders < shard.starts.size
    offsets[inside] = shard.starts[borders[inside]] // shard.dtype.itemsize
    return offsets


def document_blocks(shard: Shard, first: int = 0, last: int | None = None) -> Iterator[tuple[int, npt.NDArray[Any], IntArray]]:
    """Documents [first, last) of a shard whose index was checked, in blocks of a few million tokens or one long document.

    Yields:
        The token at which the block begins, its ids [tokens] as a view of the map, and the lengths [documents] of its documents.
    """
    last = shard.documents if last is None else last
    for begin in range(first, last, _BLOCK_DOCUMENTS):
        offsets = document_offsets(shard, begin, min(begin + _BLOCK_DOCUMENTS, last))
        at = 0
        while at < offsets.size - 1:
            reach = int(np.searchsorted(offsets, offsets[at] + _BLOCK_TOKENS, side="right")) - 1
            end = max(reach, at + 1)
            yield int(offsets[at]), shard.stream[int(offsets[at]) : int(offsets[end])], np.diff(offsets[at : end + 1])
            at = end


def check_ids(shard: Shard, ids: npt.NDArray[Any], *, begin: int, vocab_size: int) -> int:
    """The largest of some ids (-1 of none), which must all be of the vocabulary; `begin` is the token of the shard where they begin.

    Raises:
        DataError: One is not; names the file, the token and its byte.
    """
    if not ids.size:
        return -1
    high = int(ids.max())
    if high >= vocab_size or int(ids.min()) < 0:
        token = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise DataError(
            f"{bin_path(shard.prefix)} holds id {int(ids[token])} at token {begin + token} (byte {(begin + token) * shard.dtype.itemsize});"
            f" ids must be in [0, {vocab_size}); it was made by another tokenizer, or is damaged: give the right one, or leave it out"
        )
    return high


def append_documents(
    writer: ShardWriter,
    shard: Shard,
    first: int,
    last: int,
    *,
    vocab_size: int,
    promise: Promise | None = None,
    report: Callable[[int], None] | None = None,
) -> None:
    """Adds documents [first, last) of a shard to a writer; a document of several sequences becomes one.

    Args:
        writer: To add to; finish it only if this raises nothing.
        shard: Its index was checked.
        first: The first document.
        last: The one after the last.
        vocab_size: Ids are below this.
        promise: Of the shard, whose bytes are compared with it on the way; only where all documents are taken.
        report: Told the bytes read since it was last called.

    Raises:
        DataError: An id is not of the vocabulary, the shard is not the promised one, or the writer fails.
    """
    assert promise is None or (first, last) == (0, shard.documents), "a part of a shard cannot be compared with the sha256 of all of it"
    digest = hashlib.sha256()
    for begin, ids, lengths in document_blocks(shard, first, last):
        check_ids(shard, ids, begin=begin, vocab_size=vocab_size)
        writer.add_many(ids, lengths=lengths)
        if promise is not None:
            digest.update(ids)
        if report is not None:
            report(ids.nbytes)
    if promise is not None:
        promise.check_sha256(shard.prefix, bin_sha256=digest.hexdigest())


def small_runs(tokens: Sequence[int], full: int) -> Iterator[range]:
    """Runs of neighbours, each to become one shard of at least `full` tokens where possible; a full one stays alone, and is never copied.

    Args:
        tokens: Of each shard.
        full: Tokens from which a shard is large enough.
    """
    begin, held = 0, 0
    for index, own in enumerate(tokens):
        held += own
        last = index + 1 == len(tokens)
        # A full one that follows begins a run of its own.
        if last or held >= full or tokens[index + 1] >= full:
            yield range(begin, index + 1)
            begin, held = index + 1, 0
