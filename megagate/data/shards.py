"""Tokenized documents on disk, byte-compatible with Megatron's indexed data sets: a `.bin` of tokens and an `.idx` of documents.

`.bin`: the tokens of all documents, little-endian, nothing else. `.idx`, little-endian: magic (9 bytes), version 1 (u64), code of the
token type (u8), sequences S (u64), document borders D (u64), lengths int32[S] in tokens, starts int64[S] in bytes of the `.bin`,
borders int64[D] in sequences, beginning with 0. Here each document is one sequence, so D = S + 1.

Source: `megatron/core/datasets/indexed_dataset.py` of megatron-core 0.16.1.
"""

import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megagate.data.files import AtomicFile, clean_errors
from megagate.data.hashing import IntArray
from megagate.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no tokens
_LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's own limit, exclusive
_LONGEST_DOCUMENT = 2**31 - 1  # tokens; lengths are int32
_INDEX_BLOCK = 1 << 20  # entries handled at once, so that memory does not grow with the index
_REMADE = "copy the shard again from its source, or prepare the data set again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores ids of a vocabulary in: uint16 below 65,500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < _LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    """The file of tokens of a shard."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of document borders of a shard."""
    return prefix.with_name(prefix.name + ".idx")


def find_prefix(name: str) -> Path | None:
    """The prefix of the shard that a path names, with or without `.bin` or `.idx`; None where neither file exists."""
    path = Path(name)
    for prefix in [path] if path.suffix not in (".bin", ".idx") else [path, path.with_name(path.name[:-4])]:
        if prefix.name and (os.path.isfile(bin_path(prefix)) or os.path.isfile(idx_path(prefix))):  # unlike Path's own, takes any text
            return prefix
    return None


@dataclass(frozen=True)
class ShardStats:
    """What a writer knows about a finished shard: counts, the largest id (-1 if it has no tokens), bytes and sha256 (hex) of both files."""

    tokens: int
    documents: int
    max_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes one shard; both files appear, complete and on the disk, at `finish`, or not at all.

    Used as a context manager it finishes at a clean end, and leaves nothing behind after an exception.

    Args:
        prefix: Path of the shard without `.bin` and `.idx`; its folder exists.
        dtype: Type of the stored ids, as given by `token_dtype`.

    Raises:
        DataError: The folder cannot be written, or has no space.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype[Any]) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in _CODES.items()}
        assert self.dtype in codes, f"{self.dtype} is no type of token shards; use token_dtype"
        self._code = codes[self.dtype]
        self._lengths = array("i")
        self._tokens = 0
        self._max_id = -1
        self._stats: ShardStats | None = None
        with clean_errors("write", bin_path(prefix)):
            self._bin = AtomicFile(bin_path(prefix))

    def add(self, document: npt.ArrayLike) -> None:
        """Appends one document of ids."""
        tokens = np.asarray(document)
        self.add_many(tokens, lengths=np.array([tokens.size], dtype=np.int64))

    def add_many(self, tokens: npt.ArrayLike, *, lengths: npt.ArrayLike) -> None:
        """Appends several documents at once.

        Args:
            tokens: [sum of lengths] ids of the documents one after another.
            lengths: [documents] tokens of each.

        Raises:
            DataError: An id does not fit the type of the shard, a document is too long, or the disk is full.
        """
        ids, sizes = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        assert ids.size == int(sizes.sum()), f"{ids.size} tokens for lengths that sum to {int(sizes.sum())}"
        if sizes.size and int(sizes.max()) > _LONGEST_DOCUMENT:
            document = len(self._lengths) + int(sizes.argmax())
            raise DataError(
                f"document {document} of {self.prefix} has {int(sizes.max())} tokens; at most {_LONGEST_DOCUMENT} fit; split it"
            )
        if ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high > np.iinfo(self.dtype).max:
                raise DataError(
                    f"token ids {low} to {high} do not fit the {self.dtype.name} of {self.prefix}; ids must be in"
                    f" [0, {np.iinfo(self.dtype).max}]; choose the type by the vocabulary that made the ids"
                )
            self._max_id = max(self._max_id, high)
        with clean_errors("write", bin_path(self.prefix)):
            self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
        self._lengths.frombytes(sizes.astype(np.intc).tobytes())
        self._tokens += ids.size

    def finish(self) -> ShardStats:
        """Publishes both files and returns what they hold."""
        if self._stats is not None:
            return self._stats
        with clean_errors("write", idx_path(self.prefix)):
            index = AtomicFile(idx_path(self.prefix))
            try:
                for block in index_blocks(np.frombuffer(self._lengths, dtype=np.intc), code=self._code, itemsize=self.dtype.itemsize):
                    index.write(block)
                # Both are complete before either gets its name; the index is last, since readers look for it first.
                index.sync()
                self._bin.publish()
                index.publish()
            except BaseException:
                index.discard()
                self.discard()
                raise
        self._stats = ShardStats(
            tokens=self._tokens,
            documents=len(self._lengths),
            max_id=self._max_id,
            bin_bytes=self._bin.bytes,
            idx_bytes=index.bytes,
            bin_sha256=self._bin.sha256,
            idx_sha256=index.sha256,
        )
        return self._stats

    def discard(self) -> None:
        """Removes an unfinished shard."""
        self._bin.discard()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def index_blocks(lengths: npt.NDArray[np.intc], *, code: int, itemsize: int) -> Iterator[bytes]:
    """The bytes of an `.idx` in which each document is one sequence."""
    count = lengths.size
    yield _HEADER.pack(_MAGIC, _VERSION, code, count, count + 1)
    for first in range(0, count, _INDEX_BLOCK):
        yield lengths[first : first + _INDEX_BLOCK].astype("<i4").tobytes()
    start = 0
    for first in range(0, count, _INDEX_BLOCK):
        ends = np.cumsum(lengths[first : first + _INDEX_BLOCK], dtype=np.int64) * itemsize + start
        yield np.concatenate(([start], ends[:-1])).astype("<i8").tobytes()
        start = int(ends[-1])
    for first in range(0, count + 1, _INDEX_BLOCK):
        yield np.arange(first, min(first + _INDEX_BLOCK, count + 1), dtype="<i8").tobytes()


class Shard:
    """One shard, read through memory maps: opening costs the same for any size.

    Opening checks the header, the sizes of both files and the ends of the index; `check_index` reads the whole index.

    Attributes:
        tokens: Number of tokens.
        documents: Number of documents.
        stream: [tokens] ids of all documents one after another, in the stored type, mapped read-only.
        lengths: [sequences] tokens of each sequence, mapped.
        starts: [sequences] byte of the `.bin` where each begins, mapped.
        borders: [documents + 1] sequence where each document begins, and the end; mapped.

    Raises:
        DataError: A file is missing, truncated, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index, tokens = idx_path(prefix), bin_path(prefix)
        with clean_errors("read", index):
            with open(index, "rb") as stream:
                header = stream.read(_HEADER.size)
            idx_bytes = index.stat().st_size
        with clean_errors("read", tokens):
            bin_bytes = tokens.stat().st_size
        code, sequences, borders = _parse_header(header, index)
        _check_idx_bytes(index, idx_bytes, sequences=sequences, borders=borders)
        self.dtype = np.dtype(_CODES[code])
        with clean_errors("read", index):
            raw = np.asarray(np.memmap(index, dtype=np.uint8, mode="r"))
        cuts = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * borders])
        self.lengths: npt.NDArray[np.int32] = raw[cuts[0] : cuts[1]].view("<i4")
        self.starts: IntArray = raw[cuts[1] : cuts[2]].view("<i8")
        self.borders: IntArray = raw[cuts[2] : cuts[3]].view("<i8")
        self.documents = borders - 1
        expected = int(self.starts[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if bin_bytes != expected:
            raise DataError(
                f"{tokens} is {'truncated' if bin_bytes < expected else 'too long'}: {bin_bytes} bytes, and its index promises {expected}"
                f" ({sequences} sequences of {self.dtype.name}); {_REMADE}"
            )
        if int(self.borders[0]) != 0 or int(self.borders[-1]) != sequences:
            raise DataError(f"{index} is damaged: its documents do not span its {sequences} sequences; {_REMADE}")
        self.tokens = bin_bytes // self.dtype.itemsize
        with clean_errors("read", tokens):
            # A map of an empty file is an error of the system.
            self.stream = np.asarray(np.memmap(tokens, dtype=self.dtype, mode="r")) if bin_bytes else np.empty(0, self.dtype)

    def document(self, index: int) -> npt.NDArray[Any]:
        """[tokens of the document] ids of one document, a view of the map."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.prefix}, which has {self.documents}")
        first, last = int(self.borders[index]), int(self.borders[index + 1])
        if first == last:
            return self.stream[:0]
        begin = int(self.starts[first]) // self.dtype.itemsize
        end = int(self.starts[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        return self.stream[begin:end]

    def check_index(self) -> None:
        """Reads the whole index, in blocks.

        Raises:
            DataError: A sequence does not begin where the one before ends, or document borders fall.
        """
        position = 0
        for first in range(0, self.lengths.size, _INDEX_BLOCK):
            lengths = self.lengths[first : first + _INDEX_BLOCK].astype(np.int64)
            ends = np.cumsum(lengths) * self.dtype.itemsize + position
            starts = np.concatenate(([position], ends[:-1]))
            wrong = np.flatnonzero((starts != self.starts[first : first + _INDEX_BLOCK]) | (lengths < 0))
            if wrong.size:
                sequence = first + int(wrong[0])
                raise DataError(f"{idx_path(self.prefix)} is damaged: sequence {sequence} has a wrong start or length; {_REMADE}")
            position = int(ends[-1])
        for first in range(0, self.documents, _INDEX_BLOCK):
            falls = np.flatnonzero(np.diff(self.borders[first : first + _INDEX_BLOCK + 1]) < 0)
            if falls.size:
                raise DataError(f"{idx_path(self.prefix)} is damaged: document {first + int(falls[0])} ends before it begins; {_REMADE}")


def _parse_header(header: bytes, path: Path) -> tuple[int, int, int]:
    """(code of the token type, sequences, document borders)"""
    if len(header) < _HEADER.size:
        raise DataError(f"{path} is truncated: {len(header)} bytes, and its header alone has {_HEADER.size}; {_REMADE}")
    magic, version, code, sequences, borders = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise DataError(f"{path} is not an index of a token shard: it begins with {magic!r} instead of {_MAGIC!r}; check data.path")
    if version != _VERSION:
        raise DataError(f"{path} has version {version}; only version {_VERSION} can be read; write it again with a current tool")
    if code not in _CODES:
        raise DataError(f"{path} has token type code {code}; token shards have one of {sorted(_CODES)}; {_REMADE}")
    return code, sequences, borders


def _check_idx_bytes(path: Path, size: int, *, sequences: int, borders: int) -> None:
    expected = _HEADER.size + 12 * sequences + 8 * borders
    if size == expected and borders >= 1:
        return
    if sequences and size == expected + sequences:
        raise DataError(f"{path} is of a multimodal data set ({sequences} modes follow the documents); only text can be read; convert it")
    raise DataError(
        f"{path} is {'truncated' if size < expected else 'damaged'}: {size} bytes, and its header promises {expected}"
        f" ({sequences} sequences, {borders} document borders); {_REMADE}"
    )
