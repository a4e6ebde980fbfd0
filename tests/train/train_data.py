"""Small data sets for the tests of the job."""

from pathlib import Path

import numpy as np

from megagate.data.manifest import Manifest, ShardEntry, SplitName, TokenizerIdentity, write_manifest
from megagate.data.shards import ShardWriter, token_dtype


def make_data(
    folder: Path,
    *,
    vocab_size: int = 512,
    tokens: int = 6_000,
    splits: tuple[SplitName, ...] = ("train", "valid"),
    seed: int = 0,
    eod_id: int = -1,
    constant: int | None = None,
) -> Path:
    """A data set of arbitrary ids below `vocab_size`, by the library's own writer. Every tenth or so is `eod_id`, or each `constant`."""
    folder.mkdir()
    ids = np.random.default_rng(seed).integers(0, vocab_size, tokens)
    if constant is not None:
        ids[:] = constant
    if eod_id >= 0:
        ids[np.random.default_rng(seed + 1).random(tokens) < 0.1] = eod_id
        ids[[999, -1]] = eod_id  # both splits end with a document
    entries = []
    for split in splits:
        part = ids if split == "train" else ids[:1_000]
        with ShardWriter(folder / f"{split}-00000", dtype=token_dtype(vocab_size)) as writer:
            writer.add_many(part, lengths=[part.size])
        entries.append(ShardEntry.of(f"{split}-00000", split=split, stats=writer.finish()))
    identity = TokenizerIdentity(kind="none", file="", sha256="", vocab_size=vocab_size, eod_id=eod_id, pad_id=-1)
    manifest = Manifest(tokenizer=identity, dtype=token_dtype(vocab_size).name, shards=tuple(entries), source={"name": folder.name})
    write_manifest(folder, manifest)
    return folder
