"""`dataset.json`: what a folder of shards holds, who made the ids, and one fingerprint for all of it."""

import json
import os
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from megagate.data.files import AtomicFile, clean_errors, file_sha256
from megagate.data.hashing import canonical_sha256
from megagate.data.shards import Shard, ShardStats, bin_path, idx_path
from megagate.errors import DataError

MANIFEST_NAME = "dataset.json"
FORMAT_VERSION = 1
SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
_AGAIN = "prepare the data set again"
_LARGEST = 2**63 - 1
_TYPES = {int: "int (64 bits)", str: "str", list: "list", dict: "dict"}


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the ids.

    Args:
        kind: `tokenizers` (a `tokenizer.json` of that package), `bytes` (built in, no file), or `none` when the text cannot be had back.
        file: Its file, relative to the manifest; empty for `none`.
        sha256: Of that file (hex); empty for `none`.
        vocab_size: Ids are below this.
        eod_id: Ends each document; -1 for none.
        pad_id: Fills rows, never a target; differs from `eod_id`; -1 for none.
    """

    kind: str
    file: str
    sha256: str
    vocab_size: int
    eod_id: int
    pad_id: int

    def difference(self, other: "TokenizerIdentity") -> str:
        """In which values, but for the file's name, another tokenizer differs; empty for the same one."""
        names = [field.name for field in fields(self) if field.name != "file" and getattr(self, field.name) != getattr(other, field.name)]
        return ", ".join(f"{name} {str(getattr(self, name))[:12]!r} and {str(getattr(other, name))[:12]!r}" for name in names)


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its prefix relative to the manifest, its split, counts, largest id (-1 if empty), bytes and sha256 of both files."""

    prefix: str
    split: str
    tokens: int
    documents: int
    max_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str

    @classmethod
    def of(cls, prefix: str, *, split: SplitName, stats: ShardStats) -> "ShardEntry":
        """The entry of a shard just written."""
        return cls(prefix=prefix, split=split, **asdict(stats))

    @property
    def stats(self) -> ShardStats:
        """What its writer knew about it."""
        return ShardStats(**{field.name: getattr(self, field.name) for field in fields(ShardStats)})


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.json`.

    Args:
        tokenizer: Who made the ids.
        dtype: Type of the stored ids, as numpy names it.
        shards: In the order in which their windows are numbered.
        source: Free facts about where the text came from, part of the fingerprint.
    """

    tokenizer: TokenizerIdentity
    dtype: str
    shards: tuple[ShardEntry, ...]
    source: dict[str, str | int]

    def of_split(self, split: SplitName) -> tuple[ShardEntry, ...]:
        """The shards of one split."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def body(self) -> dict[str, Any]:
        """The manifest as JSON values, without its fingerprint."""
        totals = {
            split: {"shards": len(parts), "tokens": sum(p.tokens for p in parts), "documents": sum(p.documents for p in parts)}
            for split in SPLITS
            for parts in [self.of_split(split)]
            if parts or split != "test"  # a set without a test split reads as it did before there was one
        }
        # Not `asdict`, which copies field by field: of 1,000 shards that is most of what opening a data set costs.
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": dict(vars(self.tokenizer)),
            "dtype": self.dtype,
            "shards": [dict(vars(shard)) for shard in self.shards],
            "source": dict(self.source),
            "totals": totals,
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything else: equal fingerprints are equal tokens in equal order."""
        return canonical_sha256(self.body())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publishes the manifest; the last step of making a data set."""
    path = folder / MANIFEST_NAME
    text = json.dumps({**manifest.body(), "fingerprint": manifest.fingerprint}, indent=2) + "\n"
    with clean_errors("write", path), AtomicFile(path) as file:
        file.write(text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `dataset.json` alone; see `open_shards` and `verify` for its files.

    Raises:
        DataError: It is missing, not JSON, of an unknown version, incomplete, or contradicts itself.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder} is not a prepared data set: it has no {MANIFEST_NAME}; check data.path, or prepare it again")
    with clean_errors("read", path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: not JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: a JSON {type(value).__name__} instead of an object; {_AGAIN}")
    version = _take(value, "format_version", kind=int, where=path)
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version is {version}; this version of megagate reads {FORMAT_VERSION}; {_AGAIN}")
    manifest = _parse(value, path)
    _check_content(manifest, path)
    stored = _take(value, "fingerprint", kind=str, where=path)
    if value != {**manifest.body(), "fingerprint": stored}:
        raise DataError(f"{path} contradicts itself: unknown keys, or totals that are not the sums of its shards; {_AGAIN}")
    if stored != manifest.fingerprint:
        raise DataError(
            f"{path}: its fingerprint is {stored[:12]}, and its content has {manifest.fingerprint[:12]}; it was changed by hand; {_AGAIN}"
        )
    return manifest


def check_vocabulary(manifest: Manifest, *, vocab_size: int, where: Path) -> None:
    """Refuses ids that the model has no embedding for.

    Raises:
        DataError: The data set's vocabulary is larger than the model's.
    """
    made_for = manifest.tokenizer.vocab_size
    if made_for > vocab_size:
        raise DataError(
            f"the data set {where} was made for a vocabulary of {made_for}; model.vocab_size is {vocab_size}; the model's must be at"
            f" least as large; set model.vocab_size to {made_for}, or choose another data.path"
        )


def open_shards(folder: Path, manifest: Manifest, *, split: SplitName) -> tuple[Shard, ...]:
    """Opens the shards of a split and checks their sizes and types, without reading them.

    Raises:
        DataError: A file is missing, truncated, or is not the one that the manifest describes.
    """
    return tuple(_open_shard(folder, manifest, entry) for entry in manifest.of_split(split))


class PromisedShard:
    """A shard as its manifest describes it: the sizes of its files are checked at once, and it is opened when it is first read.

    A run opens thousands of shards in every process, and reads a few of them in its first steps: what `Shard` costs, a file opened and
    two mapped, is then paid when it is needed. The headers are compared with the manifest at that time.

    Attributes:
        prefix: Of its files.
        tokens: Number of tokens.

    Raises:
        DataError: A file is missing or has another size than the manifest says.
    """

    def __init__(self, folder: str, manifest: Manifest, entry: ShardEntry) -> None:
        self._folder, self._manifest, self._entry = folder, manifest, entry
        self.tokens = entry.tokens
        name = f"{folder}/{entry.prefix}"  # joining paths costs as much as asking for a size
        try:
            there = (os.stat(name + ".bin").st_size, os.stat(name + ".idx").st_size) == (entry.bin_bytes, entry.idx_bytes)
        except OSError:
            there = False
        if not there:
            _open_shard(Path(folder), manifest, entry)  # which says what is wrong

    @property
    def prefix(self) -> Path:
        """Path without `.bin` and `.idx`."""
        return Path(self._folder) / self._entry.prefix

    @property
    def stream(self) -> npt.NDArray[Any]:
        """[tokens] ids of all documents one after another, in the stored type, mapped read-only anew at each call.

        Raises:
            DataError: The files were changed since, or are of another data set of the same size.
        """
        return _open_shard(Path(self._folder), self._manifest, self._entry).stream


def promised_shards(folder: Path, manifest: Manifest, *, split: SplitName) -> tuple[PromisedShard, ...]:
    """The shards of a split for a reader of windows: sizes are checked now, each is opened when it is first read.

    Raises:
        DataError: A file is missing or has another size than the manifest says.
    """
    return tuple(PromisedShard(str(folder), manifest, entry) for entry in manifest.of_split(split))


def verify(folder: Path, *, report: Callable[[int], None] | None = None) -> Manifest:
    """Reads every byte of a data set and compares it with the manifest.

    Args:
        folder: Of the data set.
        report: Told the bytes read since it was last called.

    Raises:
        DataError: At the first file that differs.
    """
    manifest = read_manifest(folder)
    for entry in manifest.shards:
        _open_shard(folder, manifest, entry).check_index()
        prefix = folder / entry.prefix
        _check_sha256(bin_path(prefix), entry.bin_sha256, report)
        _check_sha256(idx_path(prefix), entry.idx_sha256, report)
    if manifest.tokenizer.file:
        _check_sha256(folder / manifest.tokenizer.file, manifest.tokenizer.sha256, report)
    return manifest


def _open_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> Shard:
    shard = Shard(folder / entry.prefix)
    if shard.dtype.name != manifest.dtype:
        raise DataError(
            f"{idx_path(shard.prefix)} stores {shard.dtype.name}, and {MANIFEST_NAME} says {manifest.dtype}; the shard is of another data"
            f" set; {_AGAIN}"
        )
    found = {"tokens": shard.tokens, "documents": shard.documents}
    for what, value in found.items():
        if value != getattr(entry, what):
            raise DataError(
                f"{shard.prefix} has {value} {what}, and {MANIFEST_NAME} says {getattr(entry, what)}; the shard is truncated or of another"
                f" data set; {_AGAIN}"
            )
    with clean_errors("read", shard.prefix):
        sizes = bin_path(shard.prefix).stat().st_size, idx_path(shard.prefix).stat().st_size
    if sizes != (entry.bin_bytes, entry.idx_bytes):
        raise DataError(
            f"{shard.prefix}: its files have other sizes than {MANIFEST_NAME} says ({entry.bin_bytes} and {entry.idx_bytes}"
            f" bytes of .bin and .idx); the shard is of another data set; {_AGAIN}"
        )
    return shard


def _check_sha256(path: Path, expected: str, report: Callable[[int], None] | None) -> None:
    with clean_errors("read", path):
        found = file_sha256(path, report=report)
    if found != expected:
        raise DataError(f"{path} is damaged: its sha256 is {found}, and {MANIFEST_NAME} says {expected}; {_AGAIN}")


def _take(value: dict[str, Any], key: str, *, kind: type | tuple[type, ...], where: Path | str) -> Any:
    found = value.get(key)
    # bool is a kind of int to Python, and not to JSON; sums and products of huge ones could not even be told.
    if not isinstance(found, kind) or isinstance(found, bool) or (isinstance(found, int) and abs(found) > _LARGEST):
        what = "missing" if key not in value else reprlib.repr(found)
        names = " or ".join(_TYPES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where} is damaged: {key if key.isprintable() else ascii(key)} is {what}; it must be of type {names}; {_AGAIN}")
    return found


def check_entry(value: dict[str, Any], where: str) -> ShardEntry:
    """The entry of a shard from JSON values.

    Raises:
        DataError: A value is missing or of a wrong type.
    """
    entry = _record(ShardEntry, value, where)
    assert isinstance(entry, ShardEntry)
    return entry


def _record(kind: type, value: dict[str, Any], where: str) -> Any:
    return kind(**{field.name: _take(value, field.name, kind=field.type, where=where) for field in fields(kind)})  # type: ignore[arg-type]


_SHARD_TYPES = {field.name: field.type for field in fields(ShardEntry)}
_SHARD_COUNTS = [field.name for field in fields(ShardEntry) if field.type is int]


def _shard_entry(value: dict[str, Any], where: str) -> ShardEntry:
    typed = {key: type(found) for key, found in value.items()} == _SHARD_TYPES
    if typed and all(-_LARGEST <= value[key] <= _LARGEST for key in _SHARD_COUNTS):
        return ShardEntry(**value)
    return _record(ShardEntry, value, where)  # which says what is wrong


def _parse(value: dict[str, Any], path: Path) -> Manifest:
    shards: Iterable[Any] = _take(value, "shards", kind=list, where=path)
    entries = []
    for index, entry in enumerate(shards):
        if not isinstance(entry, dict):
            raise DataError(f"{path} is damaged: shards[{index}] is {reprlib.repr(entry)}; it must be an object; {_AGAIN}")
        entries.append(_shard_entry(entry, f"{path} (shards[{index}])"))
    source = _take(value, "source", kind=dict, where=path)
    for key in source:
        _take(source, key, kind=(str, int), where=path)
    return Manifest(
        tokenizer=_record(TokenizerIdentity, _take(value, "tokenizer", kind=dict, where=path), f"{path} (tokenizer)"),
        dtype=_take(value, "dtype", kind=str, where=path),
        shards=tuple(entries),
        source=source,
    )


def _check_content(manifest: Manifest, path: Path) -> None:
    tokenizer = manifest.tokenizer
    itemsize = {"uint16": 2, "int32": 4}.get(manifest.dtype)
    if itemsize is None:
        raise DataError(f"{path}: dtype is {manifest.dtype!r}; it must be uint16 or int32; {_AGAIN}")
    if not 0 < tokenizer.vocab_size <= int(np.iinfo(manifest.dtype).max) + 1:
        raise DataError(f"{path}: a vocabulary of {tokenizer.vocab_size} does not fit {manifest.dtype}; {_AGAIN}")
    for name, index in (("eod_id", tokenizer.eod_id), ("pad_id", tokenizer.pad_id)):
        if not -1 <= index < tokenizer.vocab_size:
            raise DataError(f"{path}: {name} is {index}; it must be -1 (none) or an id below {tokenizer.vocab_size}; {_AGAIN}")
    if tokenizer.eod_id >= 0 and tokenizer.eod_id == tokenizer.pad_id:
        raise DataError(f"{path}: eod_id and pad_id are both {tokenizer.eod_id}; they must differ, or no end would be learned; {_AGAIN}")
    for name in [tokenizer.file or "none", *(entry.prefix for entry in manifest.shards)]:
        parts = name.split("/")
        if parts[-1] in ("", ".") or "\0" in name or not name.isascii() and name != name.encode(errors="replace").decode():
            raise DataError(f"{path}: {name!r} cannot be the name of a file; {_AGAIN}")
        if name.startswith("/") or ".." in parts:
            raise DataError(f"{path}: {name!r} lies outside of the data set; names must be relative to {MANIFEST_NAME}; {_AGAIN}")
    for entry in manifest.shards:
        if entry.split not in SPLITS:
            raise DataError(f"{path}: {entry.prefix} is of split {entry.split!r}; splits are {', '.join(SPLITS)}; {_AGAIN}")
        if entry.bin_bytes != entry.tokens * itemsize:
            raise DataError(f"{path}: {entry.prefix} has {entry.bin_bytes} bytes for {entry.tokens} tokens of {manifest.dtype}; {_AGAIN}")
        if entry.max_id >= tokenizer.vocab_size:
            raise DataError(
                f"{path}: {entry.prefix} holds id {entry.max_id}, and the tokenizer's ids are below {tokenizer.vocab_size}; {_AGAIN}"
            )
