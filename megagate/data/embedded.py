"""The data set `embedded`: the corpus of the running Python, tokenized by a BPE trained on its training documents."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megagate.data.corpus import CORPUS_VERSION, library_folder, library_sha256, read_corpus
from megagate.data.files import clean_errors, sync_folder
from megagate.data.hashing import stable_key
from megagate.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, SplitName, read_manifest, write_manifest
from megagate.data.permutation import KeyedPermutation
from megagate.data.shards import ShardWriter, token_dtype
from megagate.data.tokenizer import TOKENIZER_NAME, Tokenizer
from megagate.errors import DataError


def embedded_folder(directory: Path, vocab_size: int) -> Path:
    """Where the data set of this Python and this vocabulary lies under `directory`; it need not exist.

    Its name carries the sha256 of the library's files, so that Pythons that share a disk never read each other's text.
    """
    identity = stable_key("embedded", CORPUS_VERSION, library_sha256(library_folder()))
    return directory / f"embedded-{vocab_size}-{identity:016x}"


def prepare_embedded(directory: Path, vocab_size: int) -> Path:
    """Makes the data set unless it stands there already, and returns its folder.

    It is built in a temporary folder beside its place and moved there when complete. Several processes may do so at once, on several
    machines that share the disk: the first to finish wins and the others discard theirs, which are identical.

    Args:
        directory: Folder for prepared data sets, made if missing.
        vocab_size: Tokens of the tokenizer in total (fewer if the text has no more pairs to merge).

    Raises:
        DataError: No space, no permission, no text, a vocabulary too small for bytes, or a damaged data set in its place.
    """
    place = embedded_folder(directory, vocab_size)
    if _stands(place):
        return place
    with clean_errors("write", directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(place) as folder:
            _build(folder, vocab_size)
            sync_folder(folder)
            try:
                os.rename(folder, place)
            except OSError:
                # A folder that is not empty cannot be replaced: if it is complete, another process was faster.
                if not _stands(place):
                    raise
            sync_folder(directory)
    return place


def _stands(place: Path) -> bool:
    """Whether a complete data set is there; a damaged one is an error, since it may be in use."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    if not (place / MANIFEST_NAME).is_file():
        raise DataError(f"{place} has no {MANIFEST_NAME}; an embedded data set appears whole or not at all; remove that folder")
    read_manifest(place)
    return True


@contextmanager
def _temporary_sibling(place: Path) -> Iterator[Path]:
    folder = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build(folder: Path, vocab_size: int) -> None:
    corpus = read_corpus(library_folder())
    # Trained on the training documents only: a vocabulary fitted to the validation text would flatter the validation loss.
    tokenizer = Tokenizer.train(corpus.train, vocab_size=vocab_size)
    identity = tokenizer.save(folder / TOKENIZER_NAME)
    dtype = token_dtype(tokenizer.vocab_size)
    splits: dict[SplitName, tuple[str, ...]] = {"train": corpus.train, "valid": corpus.valid}
    entries = []
    for split, texts in splits.items():
        # Windows run over document borders in stored order, which must not be the order of the library's files.
        order = KeyedPermutation(len(texts), stable_key("embedded", split)).lookup(np.arange(len(texts)))
        documents = tokenizer.encode_documents([texts[index] for index in order])
        with ShardWriter(folder / f"{split}-00000", dtype=dtype) as writer:
            writer.add_many(np.concatenate(documents), lengths=[document.size for document in documents])
        entries.append(ShardEntry.of(f"{split}-00000", split=split, stats=writer.finish()))
    source: dict[str, str | int] = {"name": "embedded", "corpus_version": CORPUS_VERSION, "corpus_sha256": corpus.sha256}
    write_manifest(folder, Manifest(tokenizer=identity, dtype=dtype.name, shards=tuple(entries), source=source))
