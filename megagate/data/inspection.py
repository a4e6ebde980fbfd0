"""Looking at what was tokenized: counts, lengths of documents, documents as text; of data sets and of bare Megatron shards."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagate.data.concatenate import check_ids, document_blocks, document_offsets
from megagate.data.hashing import IntArray
from megagate.data.manifest import MANIFEST_NAME, SPLITS, Manifest, open_shards, read_manifest, verify
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.shards import Shard, find_prefix
from megagate.data.tokenizer import AnyTokenizer, load_tokenizer
from megagate.errors import DataError

BARE = "all"
"""The one split of a bare prefix."""
_BLOCK = 1 << 20  # documents whose lengths are held at once
_EXACT = 1 << 17  # tokens; lengths below are counted one by one
_OCTAVES = 33  # bars of a histogram: 0, 1, 2-3, 4-7, ...
Report = Callable[[int], None]


@dataclass(frozen=True)
class Opened:
    """A data set, or a bare shard, that is looked at.

    Attributes:
        name: As it was given.
        folder: Of the data set; None for a bare shard.
        manifest: Of the data set; None for a bare shard.
        shards: Of each split, in order.
        tokenizer: To decode with; None where there is none.
    """

    name: str
    folder: Path | None
    manifest: Manifest | None
    shards: dict[str, tuple[Shard, ...]]
    tokenizer: AnyTokenizer | None

    @property
    def files(self) -> int:
        """Bytes that `check_all` reads: of all shards and the tokenizer."""
        tokenizer = self.folder / self.manifest.tokenizer.file if self.folder and self.manifest and self.manifest.tokenizer.file else None
        own = tokenizer.stat().st_size if tokenizer is not None else 0
        return own + sum(shard.stream.nbytes + _idx_bytes(shard) for shards in self.shards.values() for shard in shards)

    def select(self, split: str | None) -> list[Shard]:
        """The shards of one split, or of all.

        Raises:
            DataError: There is no such split.
        """
        if split is not None and split not in self.shards:
            raise DataError(f"{self.name} has no split {split}; it has {', '.join(self.shards)}")
        return [shard for name, shards in self.shards.items() for shard in shards if split in (None, name)]


def open_input(name: str, *, tokenizer: AnyTokenizer | None = None) -> Opened:
    """Opens a folder with a manifest, or a prefix of a shard, with or without `.bin` or `.idx`.

    Args:
        name: Folder or prefix.
        tokenizer: Of a bare shard; a data set has its own.

    Raises:
        DataError: It does not exist or is damaged.
    """
    folder = Path(name)
    if os.path.isdir(folder):
        if not (folder / MANIFEST_NAME).is_file():
            bare = sorted(path.stem for path in folder.glob("*.idx"))
            raise DataError(
                f"{folder} has no {MANIFEST_NAME}"
                + (f", but {len(bare)} shards: name their prefixes, as {folder / bare[0]}" if bare else "; check the path")
            )
        manifest = read_manifest(folder)
        shards = {split: open_shards(folder, manifest, split=split) for split in SPLITS if manifest.of_split(split)}
        return Opened(name, folder, manifest, shards, load_tokenizer(folder, manifest.tokenizer))
    prefix = find_prefix(name)
    if prefix is None:
        raise DataError(f"{name} is neither a folder nor a shard ({name}.bin and .idx do not exist); check the path")
    return Opened(name, None, None, {BARE: (Shard(prefix),)}, tokenizer)


def named_tokenizer(name: str, *, eod: str | None = None) -> AnyTokenizer | None:
    """A tokenizer by its name, see `find_tokenizer`, or that of a prepared data set by its folder."""
    if os.path.isfile(Path(name) / MANIFEST_NAME):
        return load_tokenizer(Path(name), read_manifest(Path(name)).tokenizer)
    return find_tokenizer(name, eod=eod)


@dataclass(frozen=True)
class Lengths:
    """How long documents are, in tokens.

    Attributes:
        documents: Their number.
        tokens: Of all.
        shortest: 0 of no documents.
        longest: 0 of no documents.
        octaves: [33] documents of length 0, 1, 2-3, 4-7, ...
        exact: [131,073] documents of each length, all from 131,072 on in the last.
        longer: Documents longer than the window asked about.
    """

    documents: int
    tokens: int
    shortest: int
    longest: int
    octaves: IntArray
    exact: IntArray
    longer: int

    def quantile(self, share: float) -> int | None:
        """The length that this share of documents does not exceed; None where it is 131,072 or more."""
        if not self.documents:
            return 0
        length = int(np.searchsorted(np.cumsum(self.exact), share * self.documents))
        return length if length < _EXACT else None


def lengths_of(shards: Sequence[Shard], *, window: int) -> Lengths:
    """Reads the indices of shards, in blocks.

    Args:
        shards: Opened; their indices are checked first.
        window: Tokens of a training sample.

    Raises:
        DataError: An index is damaged.
    """
    octaves, exact = np.zeros(_OCTAVES, dtype=np.int64), np.zeros(_EXACT + 1, dtype=np.int64)
    shortest, longest, longer = np.iinfo(np.int64).max, 0, 0
    for shard in shards:
        shard.check_index()
        for first in range(0, shard.documents, _BLOCK):
            lengths = np.diff(document_offsets(shard, first, min(first + _BLOCK, shard.documents)))
            exact += np.bincount(np.minimum(lengths, _EXACT), minlength=_EXACT + 1)
            # frexp's exponent is that of the next power of two: 0 for 0, 1 for 1, 2 for 2 and 3.
            octaves += np.bincount(np.frexp(lengths)[1], minlength=_OCTAVES)
            shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
            longer += int((lengths > window).sum())
    documents = int(octaves.sum())
    tokens = sum(shard.tokens for shard in shards)
    return Lengths(documents, tokens, shortest if documents else 0, longest, octaves, exact, longer)


def bars(lengths: Lengths, *, width: int = 40) -> list[str]:
    """A histogram in text, one line for each octave between the shortest and the longest."""
    there = np.flatnonzero(lengths.octaves)
    if not there.size:
        return []
    top = int(lengths.octaves.max())
    lines = []
    for octave in range(int(there[0]), int(there[-1]) + 1):
        count = int(lengths.octaves[octave])
        low, high = octave_range(octave)
        bar = "#" * max(round(width * count / top), 1 if count else 0)
        name = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        lines.append(f"{name:>27} {bar:<{width}} {count:,}")
    return lines


def octave_range(octave: int) -> tuple[int, int]:
    """The shortest and the longest length of a bar."""
    return (0, 0) if octave == 0 else (1 << (octave - 1), (1 << octave) - 1)


def plot(lengths: Lengths, path: Path, *, title: str) -> None:
    """Draws the histogram as a PNG.

    Raises:
        DataError: The package matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  heavy, and only needed here
    except ImportError as error:
        raise DataError(f"--plot {path} needs the package matplotlib ({error}); install it, or leave the option out") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    there = np.flatnonzero(lengths.octaves)
    span = range(int(there[0]), int(there[-1]) + 1) if there.size else range(0)
    edges = [octave_range(octave)[0] for octave in span]
    axes.bar(range(len(edges)), [int(lengths.octaves[octave]) for octave in span], align="edge", width=1, edgecolor="white")
    axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=45)
    axes.set(xlabel="tokens of a document, from", ylabel="documents", title=f"{title}: {lengths.documents:,} documents")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another --plot") from error


@dataclass(frozen=True)
class Sample:
    """A document: its number within the shards asked for, where it lies, its length, its first ids, and their text (None without one)."""

    number: int
    shard: str
    document: int
    tokens: int
    ids: list[int]
    text: str | None


def sample(opened: Opened, shards: Sequence[Shard], numbers: Sequence[int], *, most: int) -> list[Sample]:
    """Some documents, by their numbers within these shards; at most `most` tokens of each are read.

    Raises:
        DataError: There is no such document, or its ids are not of the tokenizer.
    """
    ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    found = []
    for number in numbers:
        if not 0 <= number < (int(ends[-1]) if ends.size else 0):
            raise DataError(f"document {number} does not exist; {opened.name} has {int(ends[-1]) if ends.size else 0}, counted from 0")
        owner = int(np.searchsorted(ends, number, side="right"))
        shard, own = shards[owner], number - (int(ends[owner - 1]) if owner else 0)
        document = shard.document(own)
        ids = document[:most]
        if opened.tokenizer is not None:
            begin = int(shard.starts[int(shard.borders[own])]) // shard.dtype.itemsize if ids.size else 0
            check_ids(shard, ids, begin=begin, vocab_size=opened.tokenizer.vocab_size)
        text = None if opened.tokenizer is None else opened.tokenizer.decode(_ints(ids))
        found.append(Sample(number, str(shard.prefix), own, document.size, _ints(ids).tolist(), text))
    return found


def chosen(documents: int, count: int, *, seed: int | None) -> list[int]:
    """Numbers of the first documents, or of random ones (each at most once, in order)."""
    count = min(count, documents)
    if seed is None:
        return list(range(count))
    draw = np.random.default_rng(seed)
    numbers: set[int] = set()
    while len(numbers) < count:
        numbers.add(int(draw.integers(documents)))
    return sorted(numbers)


def check_all(opened: Opened, *, report: Report) -> int:
    """Reads every byte: against the manifest, or, of a bare shard, its index and whether ids are of the tokenizer's vocabulary.

    Returns:
        The largest id.

    Raises:
        DataError: At the first file that is damaged.
    """
    if opened.folder is not None:
        manifest = verify(opened.folder, report=report)
        return max((entry.max_id for entry in manifest.shards), default=-1)
    high = -1
    for shard in opened.select(None):
        shard.check_index()
        report(_idx_bytes(shard))
        limit = int(np.iinfo(shard.dtype).max) + 1 if opened.tokenizer is None else opened.tokenizer.vocab_size
        for begin, ids, _ in document_blocks(shard):
            high = max(high, check_ids(shard, ids, begin=begin, vocab_size=limit))
            report(ids.nbytes)
    return high


def visible(text: str) -> str:
    """A text in which nothing can steer a terminal: what cannot be printed is escaped, but for ends of lines and tabs."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


def facts(opened: Opened) -> dict[str, Any]:
    """What is known without reading tokens, as JSON values."""
    value: dict[str, Any] = {"name": opened.name}
    manifest = opened.manifest
    if manifest is not None:
        body = manifest.body()
        value |= {key: body[key] for key in ("tokenizer", "dtype", "source")} | {"fingerprint": manifest.fingerprint}
    value["splits"] = {
        split: {"tokens": sum(one.tokens for one in shards), "documents": sum(one.documents for one in shards), "shards": len(shards)}
        for split, shards in opened.shards.items()
    }
    value["shards"] = [
        {"split": split, "prefix": str(one.prefix), "tokens": one.tokens, "documents": one.documents, "dtype": one.dtype.name}
        for split, shards in opened.shards.items()
        for one in shards
    ]
    return value


def _idx_bytes(shard: Shard) -> int:
    return 34 + shard.lengths.nbytes + shard.starts.nbytes + shard.borders.nbytes


def _ints(ids: npt.NDArray[Any]) -> IntArray:
    return ids.astype(np.int64)
