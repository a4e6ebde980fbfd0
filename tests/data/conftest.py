"""Small data sets for the tests of the data floor."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megagate.data.corpus import Corpus, library_folder, read_corpus
from megagate.data.manifest import Manifest, ShardEntry, TokenizerIdentity, write_manifest
from megagate.data.shards import ShardWriter, token_dtype

MakeDataSet = Callable[..., Path]
Documents = Sequence[Sequence[int]]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataSet:
    """A function that writes a data set without a tokenizer; shards are lists of documents."""

    def make(
        train: Sequence[Documents],
        valid: Sequence[Documents] = (),
        *,
        vocab_size: int = 60_000,
        name: str = "set",
        eod_id: int = -1,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        dtype = token_dtype(vocab_size)
        entries = []
        for split, shards in (("train", train), ("valid", valid)):
            for number, documents in enumerate(shards):
                with ShardWriter(folder / f"{split}-{number:05d}", dtype=dtype) as writer:
                    for document in documents:
                        writer.add(document)
                entries.append(ShardEntry.of(f"{split}-{number:05d}", split=split, stats=writer.finish()))
        identity = TokenizerIdentity(kind="none", file="", sha256="", vocab_size=vocab_size, eod_id=eod_id, pad_id=-1)
        write_manifest(folder, Manifest(tokenizer=identity, dtype=dtype.name, shards=tuple(entries), source={"name": name}))
        return folder

    return make


@pytest.fixture
def counted(make_dataset: MakeDataSet) -> Path:
    """Two train shards and one of validation whose tokens count up, so that a token tells its place: 1,003 + 517 and 300 tokens."""
    numbers = np.arange(5_000).tolist()
    train = [[numbers[0:400], numbers[400:1003]], [numbers[2000:2517]]]
    return make_dataset(train=train, valid=[[numbers[3000:3100], numbers[3100:3300]]], vocab_size=5_000)


@pytest.fixture(scope="session")
def embedded_vocabulary() -> int:
    """Of the data set in `embedded_directory`."""
    return 1024


@pytest.fixture(scope="session")
def embedded_directory(tmp_path_factory: pytest.TempPathFactory, embedded_vocabulary: int) -> Path:
    """A directory in which `embedded` is prepared, by two processes at once: `test_data_embedded.py` looks at the result."""
    directory = tmp_path_factory.mktemp("embedded") / "new/place"
    program = "import sys, pathlib; from megagate.data.embedded import *; prepare_embedded(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-c", program, str(directory), str(embedded_vocabulary)]
    processes = [
        subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": "1"})
        for seed in ("1", "2")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return directory


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """The text of this Python."""
    return read_corpus(library_folder())
