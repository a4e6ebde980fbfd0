"""Text documents out of files: lines of JSON, Parquet, plain text, and data sets of the `datasets` package.

A part is what is read in one go: bytes of a file of lines, row groups of a Parquet file, rows or shards of a data set, or a whole
file. Parts are read independently; a line belongs to the part in which its first byte lies, so that any cutting gives every line once.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from megagate.data.files import clean_errors
from megagate.errors import DataError

Kind = Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "lines", "saved", "datasets"]
BadReason = Literal["malformed JSON", "missing key", "invalid UTF-8", "too long", "damaged"]
BY_BYTES: tuple[Kind, ...] = ("jsonl", "lines")  # kinds that are cut at any byte
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".txt": "txt",
}
_BLOCK = 1 << 16  # bytes
_ROWS = 64  # of a batch of Parquet or `datasets`
_WINDOW = 1 << 31  # bytes: the largest of `zstd --long`; the package's own limit is 1/16 of it
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document: its text, the same in UTF-8, and the bytes of the input that it took (0 where unknown)."""

    text: str
    data: bytes
    consumed: int


class BadDocument(NamedTuple):
    """Something of the input that cannot be used: why, and a sentence that names file and place."""

    reason: BadReason
    message: str
    consumed: int


@dataclass(frozen=True)
class Part:
    """A part of an input.

    Args:
        path: File, folder, or name of a data set.
        kind: How it is read.
        begin: First byte, row group, row or shard.
        end: Behind the last.
        config: For `datasets`: NAME:CONFIG:SPLIT without the name.
    """

    path: str
    kind: Kind
    begin: int
    end: int
    config: str = ""


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by its name; None for other files."""
    return next((kind for suffix, kind in _SUFFIXES.items() if path.name.lower().endswith(suffix)), None)


def suffixes() -> str:
    """The endings of names that can be read, for messages."""
    return ", ".join(_SUFFIXES)


def read_part(part: Part, *, text_key: str, longest: int) -> Iterator[Document | BadDocument]:
    """The documents of a part, in constant memory.

    Args:
        part: What to read.
        text_key: Key of the JSON objects, or column, that holds the text.
        longest: Bytes of the longest document (of its line, for lines); a longer one is bad.

    Raises:
        DataError: The input cannot be read at all.
    """
    path = Path(part.path)
    if part.kind in ("saved", "datasets"):
        yield from _read_rows(_dataset_rows(part, text_key), str(part.path), longest=longest)
        return
    if part.kind == "parquet":
        yield from _read_rows(_parquet_rows(part, text_key), str(path), longest=longest)
        return
    with clean_errors("read", path):
        if part.kind == "txt":
            yield _whole_file(path, longest)
        elif part.kind in BY_BYTES:
            parse = _parse_json(text_key) if part.kind == "jsonl" else _parse_text
            with open(path, "rb") as stream:
                yield from _read_range(stream, part, parse=parse, longest=longest)
        else:
            with open(path, "rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if part.kind == "jsonl.gz" else io.BufferedReader(_ZstdStream(raw), _BLOCK)
                yield from _read_compressed(stream, raw, path, parse=_parse_json(text_key), longest=longest)


Parse = Callable[[bytes], str]


class _BadError(Exception):
    """Why a line is no document."""

    def __init__(self, reason: BadReason, detail: str) -> None:
        super().__init__(detail)
        self.reason: BadReason = reason


def _parse_json(text_key: str) -> Parse:
    def parse(line: bytes) -> str:
        text = _parse_text(line)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _BadError("malformed JSON", f"malformed JSON ({error})") from error
        if not isinstance(value, dict):
            raise _BadError("malformed JSON", f"a JSON {type(value).__name__} instead of an object")
        return _text_of(value.get(text_key), text_key, present=text_key in value, keys=list(value))

    return parse


def _parse_text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _BadError("invalid UTF-8", _spoiled(error)) from error


def _spoiled(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 ({error.reason} at its byte {error.start})"


def _text_of(value: Any, key: str, *, present: bool, keys: list[str]) -> str:
    if isinstance(value, str):
        return value
    if present:
        raise _BadError("missing key", f"{key!r} is of type {type(value).__name__}, not a string; choose another --text-key")
    raise _BadError("missing key", f"no key {key!r}, only {', '.join(map(repr, keys[:8])) or 'none'}; choose another --text-key")


def _document(parse: Parse, line: bytes, consumed: int, where: str) -> Document | BadDocument:
    try:
        text = parse(line)
        data = text.encode()
    except _BadError as error:
        return BadDocument(error.reason, f"{where}: {error}", consumed)
    except UnicodeEncodeError as error:
        return BadDocument("invalid UTF-8", f"{where}: invalid text ({error.reason} at character {error.start})", consumed)
    return Document(text, data, consumed)


def _too_long(where: str, size: int, longest: int) -> BadDocument:
    return BadDocument("too long", f"{where}: {size} bytes; at most {longest} are allowed; split it, or raise --max-document-bytes", size)


def _lines(stream: BinaryIO, *, longest: int) -> Iterator[tuple[bytes | None, int]]:
    """(line, its bytes with the end of line); None in place of one that is too long."""
    while line := stream.readline(longest + 1):
        if len(line) <= longest or line.endswith(b"\n"):
            yield line, len(line)
            continue
        size = len(line)
        while more := stream.readline(_BLOCK):
            size += len(more)
            if more.endswith(b"\n"):
                break
        yield None, size


def _read_range(stream: BinaryIO, part: Part, *, parse: Parse, longest: int) -> Iterator[Document | BadDocument]:
    position = part.begin
    if position:
        # From the byte before: a line that begins exactly here is ours, and what is left of one that began earlier is not.
        stream.seek(position - 1)
        position -= 1
        while more := stream.readline(_BLOCK):
            position += len(more)
            if more.endswith(b"\n"):
                break
    lines = _lines(stream, longest=longest)
    while position < part.end:
        line, size = next(lines, (b"", 0))
        if not size:
            break
        where = f"{part.path}, byte {position}"
        if line is None:
            yield _too_long(where, size, longest)
        else:
            content = (line.removeprefix(_BOM) if position == 0 else line).rstrip(b"\r\n")
            if content and not content.isspace():
                yield _document(parse, content, size, where)
        position += size


def _read_compressed(stream: BinaryIO, raw: BinaryIO, path: Path, *, parse: Parse, longest: int) -> Iterator[Document | BadDocument]:
    """`consumed` is of the compressed bytes in `raw`, as they are read."""
    number = told = 0
    lines = _lines(stream, longest=longest)
    while True:
        try:
            line, size = next(lines, (b"", 0))
        except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
            yield BadDocument("damaged", f"{path}, after line {number}: the compressed file is truncated or damaged ({error})", 0)
            return
        if not size:
            return
        number += 1
        where = f"{path}, line {number}"
        consumed, told = raw.tell() - told, raw.tell()
        if line is None:
            yield _too_long(where, size, longest)._replace(consumed=consumed)
        elif content := (line.removeprefix(_BOM) if number == 1 else line).strip():
            yield _document(parse, content, consumed, where)


def _whole_file(path: Path, longest: int) -> Document | BadDocument:
    size = path.stat().st_size
    if size > longest:
        return _too_long(str(path), size, longest)
    return _document(_parse_text, path.read_bytes().removeprefix(_BOM), size, str(path))


def _read_rows(rows: Iterator[tuple[Any, str, int]], path: str, *, longest: int) -> Iterator[Document | BadDocument]:
    for value, place, consumed in rows:
        where = f"{path}, {place}"
        if isinstance(value, UnicodeDecodeError):
            yield BadDocument("invalid UTF-8", f"{where}: {_spoiled(value)}", consumed)
            continue
        if not isinstance(value, str):
            yield BadDocument("missing key", f"{where}: the text is {value!r:.40}, not a string", consumed)
            continue
        found = _document(lambda _, value=value: value, b"", consumed, where)
        if isinstance(found, Document) and len(found.data) > longest:
            found = _too_long(where, len(found.data), longest)._replace(consumed=consumed)
        yield found


def _parquet_rows(part: Part, column: str) -> Iterator[tuple[Any, str, int]]:
    file = open_parquet(Path(part.path))
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"{part.path}: no column {column!r}, only {', '.join(map(repr, names[:8]))}; choose another --text-key")
    for group in range(part.begin, part.end):
        found = file.metadata.row_group(group)
        row, about = 0, found.total_byte_size // max(found.num_rows, 1)  # bytes of the plan per row
        batches = file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column], use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else _values(batch.column(0))
            except (OSError, ValueError) as error:  # errors of pyarrow are of both kinds
                raise DataError(f"{part.path}, row group {group}, after row {row}: damaged ({error}); copy it again") from error
            if batch is None:
                break
            for offset, value in enumerate(values):
                yield value, f"row group {group}, row {row + offset}", about
            row += len(values)


def _values(column: Any) -> list[Any]:
    """The values of an arrow column; in place of a text that is not UTF-8 (arrow does not check it) the error."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: It is missing, truncated, or no Parquet.
    """
    import pyarrow.parquet as parquet  # noqa: PLC0415  heavy, and only needed here

    try:
        # Read through a buffer: the default holds a whole row group.
        return parquet.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: not a whole Parquet file ({error}); copy it again") from error


def open_dataset_source(name: str, config: str, *, saved: bool) -> Any:
    """A data set of the `datasets` package: a folder of `save_to_disk`, or a stream of a name.

    Args:
        name: Folder or name.
        config: CONFIG:SPLIT; both may be empty, and the split is then `train`.
        saved: Whether it is a folder of `save_to_disk`.

    Raises:
        DataError: The package cannot open it.
    """
    import datasets  # noqa: PLC0415  heavy, and only needed here

    subset, _, split = config.partition(":")
    try:
        if saved:
            found = datasets.load_from_disk(name)
            return found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except Exception as error:  # the package raises errors of many others
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"--input {name}: neither a file here nor a data set that the datasets package opens ({reason}); check spelling and network;"
            " data sets are written datasets:NAME:CONFIG:SPLIT"
        ) from error


def _dataset_rows(part: Part, column: str) -> Iterator[tuple[Any, str, int]]:
    data = open_dataset_source(part.path, part.config, saved=part.kind == "saved")
    names = data.column_names
    if names is not None and column not in names:
        raise DataError(f"{part.path}: no column {column!r}, only {', '.join(map(repr, names[:8]))}; choose another --text-key")
    if part.kind == "saved":
        parts = [(data.select(range(part.begin, part.end)), "row", part.begin)]
    else:
        parts = [(data.shard(num_shards=data.num_shards, index=index), f"shard {index}, row", 0) for index in range(part.begin, part.end)]
    for rows, what, row in parts:
        for batch in _batches(rows, column, f"{part.path}, {what}", row):
            for value in _values(batch[column]):
                yield value, f"{what} {row}", 0
                row += 1


def _batches(rows: Any, column: str, where: str, row: int) -> Iterator[Any]:
    """Arrow tables; as Python objects one row that is not UTF-8 would spoil its batch."""
    try:
        for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS):
            yield batch
            row += batch.num_rows
    except Exception as error:  # the package raises errors of many others
        raise DataError(
            f"{where} {row} and following: the datasets package cannot read them ({type(error).__name__}: {error}); copy a damaged file"
            " again; after an error of the network run the same command again"
        ) from error


class _ZstdError(Exception):
    """A Zstandard file ends too early, or is no such file."""


class _ZstdStream(io.RawIOBase):
    """Bytes of a file of Zstandard frames. The package's own reader takes a file that ends within a frame for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard  # noqa: PLC0415  only needed here

        self._module = zstandard
        self._raw = raw
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (chunk := self._raw.read(_BLOCK // 4)):
                if self._frame is not None:
                    raise _ZstdError("it ends within a frame")
                return 0
            elif not self._input:
                self._input = chunk
            self._frame = self._frame or self._module.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._module.ZstdError as error:
                raise _ZstdError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
