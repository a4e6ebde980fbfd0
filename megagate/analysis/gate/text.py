"""What the models of an analysis read: windows of one stream of tokens, from text or from a prepared data set."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megagate.analysis.gate.source import Source
from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.dataset import DataSet, open_dataset
from megagate.data.hashing import IntArray
from megagate.data.loader import IGNORE_INDEX
from megagate.data.manifest import MANIFEST_NAME
from megagate.data.preprocess.readers import BadDocument, Kind, Part, kind_of, open_parquet, read_part, suffixes
from megagate.data.tokenizer import AnyTokenizer
from megagate.errors import ConfigError, DataError

DEFAULT_LENGTH = 4096
_LONGEST = 1 << 30
"""Bytes of one document."""
_HEAD = 16
"""Characters of a long text for each token that is wanted, which are encoded first."""
_NAME_ONE = "--tokenizer PATH names one for all models"


class Windows(NamedTuple):
    """What is read.

    Args:
        tokens: [sequences, s] int64.
        labels: [sequences, s] int64, the token after each; `IGNORE_INDEX` has no target.
        eod_id: Of the token that ends documents; None where there is none.
        tokenizer: To spell tokens; None where ids have no text.
        described: Of what they are the first, in words.
    """

    tokens: Tensor
    labels: Tensor
    eod_id: int | None
    tokenizer: AnyTokenizer | None
    described: str

    def without_targets_after_documents(self) -> "Windows":
        """The same, but that no document's first token is predicted from the one before.

        Raises:
            DataError: Nothing is left to predict.
        """
        labels = self.labels.masked_fill(self.tokens == self.eod_id, IGNORE_INDEX)
        if not (labels != IGNORE_INDEX).any():
            raise DataError(f"--data {self.described} has documents without a token; give text")
        return self._replace(labels=labels)

    def spelled(self, count: int) -> tuple[str, ...]:
        """The first tokens of the first sequence, as text; a token that ends documents by its name."""
        return tuple(_spelling(self.tokenizer, index) for index in self.tokens[0, :count].tolist())


def default_length(sources: Sequence[Source]) -> int:
    """No longer than any of the models has been trained on."""
    return min([DEFAULT_LENGTH, *(source.length for source in sources if source.length)])


def read_windows(
    data: Path, sources: Sequence[Source], *, seq_len: int, samples: int, tokenizer: AnyTokenizer | None = None, text_key: str = "text"
) -> Windows:
    """The first windows of `data`: number i is the tokens [i s, i s + s] of its stream, the last of them the target of the one before.

    Args:
        data: A file of text, or the folder of a prepared data set.
        sources: The models; their tokenizers and vocabularies must be the same.
        seq_len: Tokens of each (s).
        samples: How many, where there are so many.
        tokenizer: In the place of the models' own.
        text_key: Of the text in JSON lines and Parquet.

    Raises:
        ConfigError: The models do not belong together.
        DataError: The data cannot be read, is of another tokenizer, or shorter than one window.
    """
    _require_one_vocabulary(sources)
    if os.path.isdir(data):
        return _of_dataset(data, sources, seq_len=seq_len, samples=samples, tokenizer=tokenizer)
    if not os.path.isfile(data):
        raise DataError(f"--data {data!s:.300}: there is no such file; give text ({suffixes()}, .md), or the folder of a prepared data set")
    if not os.path.getsize(data):
        raise DataError(f"--data {data} is empty; give text")
    words = tokenizer or _common_tokenizer(sources)
    size = sources[0].model.vocab_size
    if words.vocab_size > size:
        raise ConfigError(
            f"the tokenizer has {words.vocab_size:,} tokens and the models have {size:,}; it is not theirs; name theirs with --tokenizer"
        )
    stream = _stream(_documents(data, text_key), words, enough=samples * seq_len + 1)
    if len(stream) < seq_len + 1:
        raise DataError(_too_short(data, len(stream), seq_len))
    count = min(samples, (len(stream) - 1) // seq_len)
    windows = np.stack([stream[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])
    return _windows(windows, words.eod_id, words, str(data))


def _require_one_vocabulary(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.model.vocab_size != first.model.vocab_size:
            raise ConfigError(
                f"--models: {first.name} has a vocabulary of {first.model.vocab_size:,} tokens and {other.name} one of "
                f"{other.model.vocab_size:,}; figures of different vocabularies do not compare; analyze them apart"
            )


def _common_tokenizer(sources: Sequence[Source]) -> AnyTokenizer:
    """The one that all models have."""
    for source in sources:
        if source.tokenizer is None:
            raise DataError(
                f"--models {source.name}: its tokenizer is needed to read text, and is not here ({source.tokenizer_origin}); {_NAME_ONE}"
            )
    first = sources[0]
    for other in sources[1:]:
        if found := _difference(first.tokenizer, other.tokenizer):
            raise ConfigError(
                f"--models: {first.name} and {other.name} have different tokenizers ({found}); perplexities of different tokens do not "
                f"compare; analyze them apart, or, if they are the same after all, {_NAME_ONE}"
            )
    return first.tokenizer


def unlike(source: Source, tokenizer: AnyTokenizer) -> bool:
    """Whether a model is known to have another tokenizer than this one."""
    return source.tokenizer is not None and bool(_difference(source.tokenizer, tokenizer))


def _difference(first: AnyTokenizer, other: AnyTokenizer, *, ends: bool = True) -> str:
    """In what two tokenizers give different ids; empty where they do not. Files that spell the same otherwise are the same.

    Args:
        first: The one.
        other: The other.
        ends: They are to end documents alike, too.
    """
    listed = first.identity().difference(other.identity())
    if not listed or first.vocab_size != other.vocab_size or (ends and first.eod_id != other.eod_id):
        return listed
    if isinstance(first, ByteTokenizer) or isinstance(other, ByteTokenizer):
        return listed
    mine, theirs = _rules(first.to_json()), _rules(other.to_json())
    return ", ".join(sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)))


def _rules(text: str) -> dict[str, Any]:
    """What decides ids in a `tokenizer.json`."""
    found = json.loads(text)
    return {key: found.get(key) for key in ("normalizer", "pre_tokenizer", "model")} | {
        "added_tokens": [(token.get("id"), token.get("content")) for token in found.get("added_tokens") or []]
    }


def _of_dataset(folder: Path, sources: Sequence[Source], *, seq_len: int, samples: int, tokenizer: AnyTokenizer | None) -> Windows:
    """Of the validation split, or of the training split where that one is empty."""
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError(f"--data {folder}: the folder has no {MANIFEST_NAME}; give a file of text, or the folder of a prepared data set")
    data = open_dataset(str(folder), vocab_size=sources[0].model.vocab_size, directory=folder)
    theirs = [(f"--models {source.name}", source.tokenizer) for source in sources]
    for name, words in [("--tokenizer", tokenizer)] if tokenizer else theirs:
        if words is not None and (found := _difference_from(data, words)):
            raise ConfigError(f"{name}: its tokenizer is not that of --data {folder} ({found}); give text, or data of the same tokenizer")
    split = data.valid if data.valid.tokens else data.train
    windows = split.windows(seq_len, movable=False)
    if not windows.count:
        raise DataError(_too_short(folder, split.tokens, seq_len))
    read = windows.read(np.arange(min(samples, windows.count)))
    eod_id = data.identity.eod_id if data.identity.eod_id >= 0 else None
    return _windows(read, eod_id, data.tokenizer, f"{folder}, {'validation' if split is data.valid else 'training'} split")


def _difference_from(data: DataSet, words: AnyTokenizer) -> str:
    listed = data.identity.difference(words.identity())
    return "" if not listed or data.tokenizer is None else _difference(data.tokenizer, words, ends=False)


def _windows(windows: IntArray, eod_id: int | None, tokenizer: AnyTokenizer | None, name: str) -> Windows:
    rows = torch.from_numpy(windows.astype(np.int64))
    return Windows(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), eod_id, tokenizer, name)


def _too_short(data: Path, tokens: int, seq_len: int) -> str:
    remedy = f"give more text, or --seq-len {tokens - 1} at most" if tokens > 2 else "give more text"
    needs = f"one sequence takes {seq_len + 1:,} (--seq-len {seq_len:,} and the token after it)"
    return f"--data {data} has {tokens:,} tokens, and {needs}; {remedy}"


def _documents(path: Path, text_key: str) -> Iterator[str]:
    """The texts of a file.

    Raises:
        DataError: It cannot be read, or something in it is no text.
    """
    kind: Kind | None = "txt" if path.suffix.lower() == ".md" else kind_of(path)
    if kind is None:
        raise DataError(f"--data {path}: unknown kind of file; names must end in {suffixes()}, .md; convert or rename it")
    end = open_parquet(path).metadata.num_row_groups if kind == "parquet" else path.stat().st_size
    for document in read_part(Part(str(path), kind, 0, end), text_key=text_key, longest=_LONGEST):
        if isinstance(document, BadDocument):
            message = document.message.removesuffix(", or raise --max-document-bytes")  # which is an option of preparing data
            remedy = "" if message.endswith(("choose another --text-key", "split it")) else "; mend the file, or give another"
            raise DataError(f"--data {message}{remedy}")
        yield document.text


def _stream(documents: Iterator[str], tokenizer: AnyTokenizer, *, enough: int) -> IntArray:
    """Their tokens, each document with its end, until there are enough."""
    found: list[IntArray] = []
    have = 0
    for text in documents:
        ids = _encoded(text, tokenizer, enough=enough - have)
        found.append(ids)
        have += len(ids)
        if have >= enough:
            break
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _encoded(text: str, tokenizer: AnyTokenizer, *, enough: int) -> IntArray:
    """A document, or so much of a long one that it is enough."""
    size = _HEAD * enough
    while size < len(text):
        # Whole lines, or words, of which the tokens do not depend on what follows; where there is neither, those of the last word do.
        end = next((cut for mark in "\n " if (cut := text.rfind(mark, size // 2, size)) > 0), size)
        (ids,) = tokenizer.encode_batch([text[:end]])
        if len(ids) >= enough:
            return ids[:enough].astype(np.int64)
        size *= _HEAD
    (ids,) = tokenizer.encode_documents([text])
    return ids


def _spelling(tokenizer: AnyTokenizer | None, index: int) -> str:
    if tokenizer is None:
        return str(index)
    text = tokenizer.decode([index])
    if text:
        return text
    return (None if isinstance(tokenizer, ByteTokenizer) else tokenizer.spelling(index)) or str(index)
