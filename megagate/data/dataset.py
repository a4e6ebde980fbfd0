"""`data.path` to a data set: `synthetic`, `embedded`, or a folder with a manifest."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megagate.data.embedded import embedded_folder, prepare_embedded
from megagate.data.manifest import SplitName, TokenizerIdentity, check_vocabulary, promised_shards, read_manifest
from megagate.data.shards import find_prefix
from megagate.data.split import ShardSplit, Split
from megagate.data.synthetic import SyntheticSplit
from megagate.data.tokenizer import AnyTokenizer, check_tokenizer, load_tokenizer
from megagate.errors import DataError

SYNTHETIC = "synthetic"
EMBEDDED = "embedded"


@dataclass(frozen=True)
class DataSet:
    """An open data set.

    Attributes:
        name: The `data.path` that was opened.
        train: To learn from.
        valid: To measure on; may have no tokens.
        identity: Which tokenizer made the ids.
        vocab_size: Ids are below this.
        fingerprint: Equal ones are of equal tokens in equal order (hex).
        folder: Where its files lie; None where it has none.
    """

    name: str
    train: Split
    valid: Split
    identity: TokenizerIdentity
    vocab_size: int
    fingerprint: str
    folder: Path | None

    @cached_property
    def tokenizer(self) -> AnyTokenizer | None:
        """Loaded when it is first asked for, which training does not need; None where ids have no text.

        Raises:
            DataError: Its file was changed since the data set was opened.
        """
        return None if self.folder is None else load_tokenizer(self.folder, self.identity)

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"{self.name}: {self.train.tokens:,} training and {self.valid.tokens:,} validation tokens, vocabulary {self.vocab_size:,},"
            f" fingerprint {self.fingerprint[:12]}"
        )


def prepare(path: str, *, vocab_size: int, directory: Path) -> None:
    """Writes what `open_dataset` will read: the shards of `embedded`, and nothing for other data sets.

    One process per machine calls it, before any calls `open_dataset`.

    Raises:
        DataError: See `prepare_embedded`.
    """
    if path == EMBEDDED:
        prepare_embedded(directory, vocab_size)


def open_dataset(path: str, *, vocab_size: int, directory: Path) -> DataSet:
    """Opens a data set without reading or writing its tokens.

    Args:
        path: `synthetic`, `embedded`, or a folder with a `dataset.json`.
        vocab_size: The model's.
        directory: Where `prepare` put `embedded`.

    Raises:
        DataError: It is missing, damaged, not prepared, or was made for a larger vocabulary.
    """
    if path == SYNTHETIC:
        return _open_synthetic(vocab_size)
    if path == EMBEDDED:
        folder = embedded_folder(directory, vocab_size)
        if not folder.exists():
            raise DataError(f"data.path embedded is not prepared: {folder} does not exist; one process per machine must prepare it first")
        return _open_folder(folder, name=EMBEDDED, vocab_size=vocab_size)
    if not os.path.isdir(path):  # unlike Path's own, takes any text
        if (prefix := find_prefix(path)) is not None:
            raise DataError(
                f"data.path is {path!r}, a shard without a manifest, which would say who made its ids; make a data set of it with"
                f" tools/merge_data.py --input {prefix} --tokenizer NAME --output FOLDER, and give that folder (nothing is copied)"
            )
        raise DataError(
            f"data.path is {path!r}, and there is no such folder; it must be {EMBEDDED}, {SYNTHETIC}, a folder with a prepared data set, or"
            ' a blend, as in "0.7 /data/a 0.3 /data/b"; check the path'
        )
    return _open_folder(Path(path), name=path, vocab_size=vocab_size)


def _open_synthetic(vocab_size: int) -> DataSet:
    train = SyntheticSplit("train", vocab_size=vocab_size)
    valid = SyntheticSplit("valid", vocab_size=vocab_size)
    # A kind of its own: nobody else's ids mean the same.
    identity = TokenizerIdentity(kind=SYNTHETIC, file="", sha256="", vocab_size=vocab_size, eod_id=-1, pad_id=-1)
    return DataSet(
        name=SYNTHETIC, train=train, valid=valid, identity=identity, vocab_size=vocab_size, fingerprint=train.fingerprint, folder=None
    )


def _open_folder(folder: Path, *, name: str, vocab_size: int) -> DataSet:
    manifest = read_manifest(folder)
    check_vocabulary(manifest, vocab_size=vocab_size, where=folder)
    check_tokenizer(folder, manifest.tokenizer)

    def split(split_name: SplitName) -> ShardSplit:
        return ShardSplit(
            split_name,
            shards=promised_shards(folder, manifest, split=split_name),
            vocab_size=manifest.tokenizer.vocab_size,
            fingerprint=manifest.fingerprint,
        )

    return DataSet(
        name=name,
        train=split("train"),
        valid=split("valid"),
        identity=manifest.tokenizer,
        vocab_size=manifest.tokenizer.vocab_size,
        fingerprint=manifest.fingerprint,
        folder=folder,
    )
