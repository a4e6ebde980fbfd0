"""The files that `tools/benchmark.py data` measures on: made-up data sets, and real text with a tokenizer."""

import hashlib
import json
import os
import re
import struct
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagate.data.files import clean_errors
from megagate.data.manifest import Manifest, ShardEntry, TokenizerIdentity, open_shards, read_manifest, write_manifest
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.shards import Shard, ShardWriter, bin_path, idx_path, index_blocks, token_dtype
from megagate.data.tokenizer import TOKENIZER_NAME, Tokenizer
from megagate.errors import DataError

SPARSE_VOCAB = 50_000
SHARD_TOKENS = 10**10
"""Of the data set of many shards."""
_SHARD_DOCUMENTS = 10**7
_LENGTHS = (20, 421)
"""Tokens of a made-up document, 220 in the mean: 20 documents or so in a sample of 4096."""
_CODE_UINT16, _UINT16 = 8, 2
_BLOCK = 1 << 16  # documents
_NO_HASH = "0" * 64  # of files whose bytes nobody reads
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_SUFFIXES = (".py", ".md", ".rst", ".txt")
_LONGEST = 1_000_000  # bytes of a file of the default text; longer ones are tables
_TRAINED_BYTES = 8_000_000
VOCAB = 16_384
"""Of the tokenizer that is trained on the text."""


def sparse_set(folder: Path, documents: int) -> Path:
    """One shard with a real index and a `.bin` of holes; returns its prefix, which Megatron's reader takes too."""
    folder.mkdir()
    prefix = folder / "train-00000"
    lengths = np.random.default_rng(0).integers(*_LENGTHS, size=documents, dtype=np.intc)
    with clean_errors("write", prefix), open(idx_path(prefix), "wb") as stream:
        for block in index_blocks(lengths, code=_CODE_UINT16, itemsize=_UINT16):
            stream.write(block)
    tokens = int(lengths.sum(dtype=np.int64))
    _holes(bin_path(prefix), tokens * _UINT16)
    _write_manifest(folder, [_entry(prefix, tokens, documents)])
    return prefix


def many_shards(folder: Path, shards: int) -> Path:
    """Shards of 10^10 tokens and 10^7 documents each, all holes but for the ends of the indices, which readers check."""
    folder.mkdir()
    empty = next(index_blocks(np.empty(0, np.intc), code=_CODE_UINT16, itemsize=_UINT16))  # a header, which ends with the counts
    entries = []
    for number in range(shards):
        prefix = folder / f"train-{number:05d}"
        _holes(bin_path(prefix), SHARD_TOKENS * _UINT16)
        count, header = _SHARD_DOCUMENTS, len(empty)
        _holes(idx_path(prefix), header + 20 * count + 8)
        ends = {
            0: empty[:-16] + struct.pack("<QQ", count, count + 1),
            header + 4 * (count - 1): struct.pack("<i", 1000),
            header + 4 * count + 8 * (count - 1): struct.pack("<q", (SHARD_TOKENS - 1000) * _UINT16),
            header + 20 * count: struct.pack("<q", count),
        }
        with clean_errors("write", idx_path(prefix)), open(idx_path(prefix), "r+b") as stream:
            for place, value in ends.items():
                stream.seek(place)
                stream.write(value)
        entries.append(_entry(prefix, SHARD_TOKENS, count))
    _write_manifest(folder, entries)
    return folder


def random_set(folder: Path, documents: int) -> Path:
    """One shard of random tokens; returns its prefix."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    with ShardWriter(folder / "train-00000", dtype=token_dtype(SPARSE_VOCAB)) as writer:
        for first in range(0, documents, _BLOCK):
            lengths = draw.integers(*_LENGTHS, size=min(_BLOCK, documents - first))
            writer.add_many(draw.integers(0, SPARSE_VOCAB, size=int(lengths.sum()), dtype=np.uint16), lengths=lengths)
    _write_manifest(folder, [ShardEntry.of("train-00000", split="train", stats=writer.finish())])
    return folder / "train-00000"


def _holes(path: Path, size: int) -> None:
    with clean_errors("write", path), open(path, "wb") as stream:
        stream.truncate(size)


def _entry(prefix: Path, tokens: int, documents: int) -> ShardEntry:
    sizes = {"bin_bytes": bin_path(prefix).stat().st_size, "idx_bytes": idx_path(prefix).stat().st_size}
    return ShardEntry(
        prefix=prefix.name, split="train", tokens=tokens, documents=documents, max_id=0, bin_sha256=_NO_HASH, idx_sha256=_NO_HASH, **sizes
    )


def _write_manifest(folder: Path, entries: list[ShardEntry]) -> None:
    identity = TokenizerIdentity(kind="none", file="", sha256="", vocab_size=SPARSE_VOCAB, eod_id=0, pad_id=-1)
    write_manifest(folder, Manifest(identity, dtype="uint16", shards=tuple(entries), source={"name": "made up"}))


@dataclass(frozen=True)
class Text:
    """Real text as lines of JSON, and a tokenizer for it.

    Args:
        path: The lines, `{"text": ...}`.
        tokenizer: A folder that both `tools/preprocess_data.py` and transformers can load.
        vocab_size: The tokenizer's.
        documents: Number of lines.
        text_bytes: UTF-8 of the documents themselves.
        spelled: Documents left out since they spell a special token, which Megatron takes for that token and megagate for text.
        sha256: Of the lines (hex).
    """

    path: Path
    tokenizer: Path
    vocab_size: int
    documents: int
    text_bytes: int
    spelled: int
    sha256: str


def real_text(folder: Path, *, text: Path | None, most_bytes: float, tokenizer: str | None) -> Text:
    """Takes documents from the start of a `.jsonl`, or of the files of this Python, until there are `most_bytes`.

    Raises:
        DataError: There is no text, or the tokenizer cannot be read.
    """
    folder.mkdir()
    place = folder / "tokenizer"
    place.mkdir()
    source = _lines(text) if text else text_of(installed_folders())
    first: list[str] = []
    if tokenizer is None:
        size = 0
        while size < min(_TRAINED_BYTES, most_bytes) and (document := next(source, None)) is not None:
            first.append(document)
            size += len(document.encode())
    own = Tokenizer.train(first, vocab_size=VOCAB) if tokenizer is None else find_tokenizer(tokenizer)
    if not isinstance(own, Tokenizer):
        raise DataError(f"--tokenizer is {tokenizer}, which Megatron does not have; give a tokenizer.json, or a folder with one")
    special = _place(own, place)
    digest, count, total, spelled = hashlib.sha256(), 0, 0, 0
    path = folder / "text.jsonl"
    with clean_errors("write", path), open(path, "wb") as stream:
        for document in _chain(first, source):
            if special.search(document):
                spelled += 1
                continue
            line = json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"
            stream.write(line)
            digest.update(line)
            count, total = count + 1, total + len(document.encode())
            if total >= most_bytes:
                break
    if not count:
        raise DataError(f"{text or 'the files of this Python'}: no documents; give another --text")
    return Text(path, place, own.vocab_size, count, total, spelled, digest.hexdigest())


def _chain(first: Iterable[str], rest: Iterable[str]) -> Iterator[str]:
    yield from first
    yield from rest


def _lines(path: Path) -> Iterator[str]:
    with clean_errors("read", path), open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: {error!r}; each line must be an object with a text; repair it") from error
            if document:
                yield document


def installed_folders() -> list[Path]:
    """Of this Python: its standard library and its packages."""
    return list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def text_of(folders: Sequence[Path]) -> Iterator[str]:
    """The .py, .md, .rst and .txt files below these folders, each text once, mixed: in the order of a hash of their names.

    Packages are taken where they are named as a folder of their own, and not below a standard library.
    """
    found = {}
    for root in folders:
        for place, names, files in os.walk(root):
            names[:] = [name for name in names if name not in _PACKAGE_FOLDERS]
            for name in files:
                if name.endswith(_SUFFIXES):
                    path = Path(place, name)
                    found[hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()] = path
    seen = set()
    for _, path in sorted(found.items()):
        try:
            raw = path.read_bytes()
            document = raw.decode()
        except (OSError, UnicodeDecodeError):
            continue
        key = hashlib.sha256(raw).digest()
        if document.strip() and len(raw) <= _LONGEST and key not in seen:
            seen.add(key)
            yield document


def _place(tokenizer: Tokenizer, folder: Path) -> re.Pattern[str]:
    """Writes the tokenizer as megagate and transformers read it; returns what finds special tokens in a text."""
    tokenizer.save(folder / TOKENIZER_NAME)
    added = json.loads((folder / TOKENIZER_NAME).read_text(encoding="utf-8"))["added_tokens"]
    names = {token["id"]: token["content"] for token in added}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer.eod_id]}
    if tokenizer.pad_id >= 0:
        config["pad_token"] = names[tokenizer.pad_id]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return re.compile("|".join(re.escape(token["content"]) for token in added if token["special"]))


def same_ids(folder: Path, prefix: Path) -> bool:
    """Whether the training shards of a data set hold, one after another, the tokens and documents of a Megatron shard."""
    theirs = Shard(prefix)
    shards = open_shards(folder, read_manifest(folder), split="train")
    lengths = np.concatenate([shard.lengths for shard in shards])
    if not np.array_equal(lengths, theirs.lengths) or any(shard.dtype != theirs.dtype for shard in shards):
        return False
    begin = 0
    for shard in shards:
        if not np.array_equal(shard.stream, theirs.stream[begin : begin + shard.tokens]):
            return False
        begin += shard.tokens
    return begin == theirs.tokens
