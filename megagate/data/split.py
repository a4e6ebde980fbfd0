"""What a loader reads: a split is a stream of tokens that is cut into windows, from shards or made up."""

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megagate.data.hashing import IntArray
from megagate.data.shards import bin_path
from megagate.errors import DataError


class Windows(Protocol):
    """A split cut into windows of seq_len + 1 tokens; neighbours share one token, the last target of one and first input of the next.

    Attributes:
        count: Number of windows.
    """

    count: int

    def read(self, index: IntArray, *, shift: int = 0) -> IntArray:
        """[rows] window numbers -> [rows, seq_len + 1] tokens, int64.

        Args:
            index: In [0, count).
            shift: Tokens by which all borders move to the right, in [0, seq_len); 0 unless the windows are movable.
        """
        ...

    def rows(self, index: IntArray, *, shift: int = 0) -> Iterator[npt.NDArray[Any]]:
        """The rows of `read` one by one, [seq_len + 1] of any type of integers, without a copy where there need be none."""
        return iter(self.read(index, shift=shift))


class Split(Protocol):
    """A part of a data set.

    Attributes:
        name: `train` or `valid`.
        tokens: Its length.
        vocab_size: Its ids are below this.
        fingerprint: Of the whole data set.
    """

    name: str
    tokens: int
    vocab_size: int
    fingerprint: str

    def ends_with(self, token: int) -> bool:
        """Whether this is the last token of the first shard that has any, and therefore of its last document; reads that one."""
        ...

    def windows(self, seq_len: int, *, movable: bool) -> Windows:
        """The windows of a length; movable ones leave room at the end, so that their number is the same for every shift."""
        ...


_MOST_STREAMS, _FEWEST_STREAMS = 4096, 16
_STREAM_SHARE = 32  # one part in so many of a process's files for the shards of one split: a blend has several


class TokenStream(Protocol):
    """What windows need of a shard: a `Shard`, or a `PromisedShard` that is opened when it is first read."""

    @property
    def prefix(self) -> Path:
        """Of its files, for messages."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        ...

    @property
    def stream(self) -> npt.NDArray[Any]:
        """[tokens] ids, mapped; each map holds a file open."""
        ...


class ShardSplit:
    """A split over shards, in their order. Windows run over borders of documents and never over borders of shards.

    Args:
        name: `train` or `valid`.
        shards: May be none.
        vocab_size: Ids must be below this.
        fingerprint: Of the data set.
    """

    def __init__(self, name: str, *, shards: Sequence[TokenStream], vocab_size: int, fingerprint: str) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.tokens = sum(shard.tokens for shard in shards)
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint

    def ends_with(self, token: int) -> bool:
        """Whether this is the last token of the first shard that has any."""
        first = next((shard for shard in self.shards if shard.tokens), None)
        return first is not None and int(first.stream[-1]) == token

    def windows(self, seq_len: int, *, movable: bool) -> "ShardWindows":
        """The windows of a length."""
        return ShardWindows(self.shards, seq_len=seq_len, movable=movable, vocab_size=self.vocab_size)


class ShardWindows:
    """Windows over shards: number i of a shard is its tokens [shift + i * seq_len, + seq_len + 1).

    Nothing is built but one number per shard, whatever the size of the data. Shards stay mapped, the longest mapped go first where a
    process may not have so many files open.
    """

    def __init__(self, shards: Sequence[TokenStream], *, seq_len: int, movable: bool, vocab_size: int) -> None:
        self._shards = tuple(shards)
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        tokens = np.array([shard.tokens for shard in shards], dtype=np.int64)
        counts = np.maximum(tokens - 1, 0) // seq_len
        if movable:
            # The largest shift is seq_len - 1. A shard of a single window keeps it and moves it as far as there is room.
            counts = np.maximum((tokens - seq_len) // seq_len, np.minimum(counts, 1))
        self._streams: dict[int, npt.NDArray[Any]] = {}
        self._most_streams = min(_MOST_STREAMS, max(_FEWEST_STREAMS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _STREAM_SHARE))
        self._ends: IntArray = np.cumsum(counts)
        self._starts: IntArray = self._ends - counts
        self._room: IntArray = tokens - 1 - counts * seq_len
        self.count = int(self._ends[-1]) if counts.size else 0

    def read(self, index: IntArray, *, shift: int = 0) -> IntArray:
        """[rows] window numbers -> [rows, seq_len + 1] tokens, int64.

        Raises:
            DataError: An id of a shard is not below the vocabulary, as after damage that keeps the size.
        """
        out = np.empty((len(index), self._seq_len + 1), dtype=np.int64)
        for row, window in enumerate(self.rows(index, shift=shift)):
            out[row] = window
        return out

    def rows(self, index: IntArray, *, shift: int = 0) -> Iterator[npt.NDArray[Any]]:
        """The rows of `read` one by one, [seq_len + 1], views of the maps.

        Raises:
            DataError: As `read`.
        """
        owners = self._ends.searchsorted(index, side="right")
        begins = (index - self._starts[owners]) * self._seq_len
        if shift:
            begins += shift % (self._room[owners] + 1)
        for owner, begin in zip(owners.tolist(), begins.tolist(), strict=True):
            window = self._stream(owner)[begin : begin + self._seq_len + 1]
            # In the stored type, which has a quarter of the bytes.
            if np.maximum.reduce(window) >= self._vocab_size or (window.dtype.kind == "i" and window.min() < 0):
                raise DataError(
                    f"{bin_path(self._shards[owner].prefix)} holds ids {int(window.min())} to {int(window.max())} near token {begin}; ids"
                    f" must be in [0, {self._vocab_size}); the shard is damaged: prepare the data set again"
                )
            yield window

    def _stream(self, owner: int) -> npt.NDArray[Any]:
        found = self._streams.get(owner)
        if found is None:
            if len(self._streams) >= self._most_streams:
                self._streams.pop(next(iter(self._streams)))
            found = self._streams[owner] = self._shards[owner].stream
        return found
