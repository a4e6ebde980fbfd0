"""Opening a data set of many shards: sizes of all files are checked at once, headers and maps wait for the first read."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagate.data.dataset import DataSet, open_dataset
from megagate.data.loader import TrainLoader
from megagate.data.manifest import read_manifest, write_manifest
from megagate.data.shards import ShardWriter
from megagate.errors import DataError

SEQ_LEN = 8


def opened(folder: Path) -> DataSet:
    return open_dataset(str(folder), vocab_size=6_000, directory=folder)


def loader(data: DataSet) -> TrainLoader:
    options = {"seq_len": SEQ_LEN, "global_batch_size": 1, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "seed": 1}
    return TrainLoader(data.train, **options)


def mapped(folder: Path) -> set[str]:
    """Files of the folder that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(folder) in line}


def write(prefix: Path, documents: list[list[int]], dtype: str) -> None:
    with ShardWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)


def test_a_shard_is_mapped_when_it_is_first_read(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(train=[[list(range(100 * n, 100 * n + 60))] for n in range(20)], valid=[[[1] * 20]], vocab_size=5_000)
    data = opened(folder)
    train = loader(data)
    assert mapped(folder) == set()
    tokens = train.step(0).tokens
    owner = int(tokens[0, 0, 0]) // 100
    assert mapped(folder) == {f"train-{owner:05d}.bin"}, "and its index is let go"
    seen = [train.step(step).tokens for step in range(train.windows_per_epoch)]
    assert len(mapped(folder)) == 20
    assert {int(tokens[0, 0, 0]) // 100 for tokens in seen} == set(range(20))


def test_more_shards_than_a_process_may_have_files_open(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(train=[[list(range(n, n + 30))] for n in range(200)], vocab_size=5_000)
    code = f"""
import resource
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from megagate.data.dataset import open_dataset
from megagate.data.loader import TrainLoader
data = open_dataset({str(folder)!r}, vocab_size=6_000, directory=Path({str(folder)!r}))
train = TrainLoader(data.train, seq_len={SEQ_LEN}, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1, seed=1)
seen = set()
for step in range(train.windows_per_epoch):
    tokens = train.step(step).tokens[0, 0].tolist()
    assert tokens == list(range(tokens[0], tokens[0] + {SEQ_LEN}))
    seen.add(tokens[0])
print(len(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 200, done.stderr


@pytest.mark.parametrize("split", ["train-00001", "valid-00000"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(("change", "message"), [(-1, "is truncated"), (3, "(is too long|is damaged)"), (None, "cannot read")])
def test_a_file_of_a_wrong_size_is_refused_at_opening(counted: Path, split: str, suffix: str, change: int | None, message: str) -> None:
    path = counted / (split + suffix)
    if change is None:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + change)
    with pytest.raises(DataError, match=f"{path} {message}" if change else f"{message} {path}"):
        opened(counted)


def test_a_consistent_pair_of_other_sizes_is_refused_at_opening(counted: Path) -> None:
    write(counted / "train-00001", [[1] * 500], "<u2")
    with pytest.raises(DataError, match="train-00001 has 500 tokens, and dataset.json says 517"):
        opened(counted)
    write(counted / "train-00001", [[1] * 517, []], "<u2")
    with pytest.raises(DataError, match="train-00001 has 2 documents, and dataset.json says 1"):
        opened(counted)


def test_another_data_sets_files_of_the_same_sizes_are_refused_at_the_first_read(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(train=[[list(range(100))]], vocab_size=5_000)
    write(folder / "train-00000", [list(range(50))], "<i4")  # 200 bytes of one document, as before
    train = loader(opened(folder))
    with pytest.raises(DataError, match=r"train-00000.idx stores int32, and dataset.json says uint16"):
        train.step(0)


def test_a_manifest_with_wrong_sizes_of_good_files_is_refused(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(train=[[list(range(100))]], vocab_size=5_000)
    manifest = read_manifest(folder)
    wrong = replace(manifest.shards[0], idx_bytes=manifest.shards[0].idx_bytes + 1)
    write_manifest(folder, replace(manifest, shards=(wrong,)))
    with pytest.raises(DataError, match=r"train-00000: its files have other sizes than dataset.json says \(200 and 63 bytes"):
        opened(folder)


def test_training_loads_no_tokenizer(embedded_directory: Path, embedded_vocabulary: int) -> None:
    program = (
        "import sys, pathlib; from megagate.data.sources import open_sources\n"
        "from megagate.data.loader import TrainLoader\n"
        "data = open_sources('embedded', '', vocab_size=int(sys.argv[2]), directory=pathlib.Path(sys.argv[1]))\n"
        "TrainLoader(data.train, seq_len=8, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1, seed=1).step(0)\n"
        "print('tokenizers' in sys.modules, data.tokenizer.vocab_size, 'tokenizers' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(embedded_directory), str(embedded_vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["False", str(embedded_vocabulary), "True"]
