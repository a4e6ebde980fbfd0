"""Interchange with Megatron: `megatron-core` reads what is written here, and what its builder writes is read here."""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.manifest import open_shards, read_manifest, verify
from megagate.data.merge.plan import cuts
from megagate.data.shards import Shard, ShardWriter, bin_path, idx_path, token_dtype

Sequences = list[list[int]]
TOOLS = Path(__file__).parents[2] / "tools"
PLAIN: list[Sequences] = [[[5, 6, 7]], [[1]], [[120, 2]], [list(range(100))]]
ODD: list[Sequences] = [[[]], *PLAIN, [[]], [[1, 2], [3, 4, 5]], [[], [9], []], []]  # the last has no sequence at all
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """Their module; importing it takes ten seconds."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def build(megatron: ModuleType, prefix: Path, documents: Sequence[Sequences], dtype: Any) -> None:
    """A shard by Megatron's own builder."""
    import torch

    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.dtype(dtype).type)
    for sequences in documents:
        joined = sum(sequences, [])
        builder.add_document(torch.tensor(joined, dtype=torch.int64), [len(one) for one in sequences])
    builder.finalize(str(idx_path(prefix)))


def theirs(megatron: ModuleType, prefix: Path) -> list[Sequences]:
    """What Megatron reads: sequences by document."""
    data = megatron.IndexedDataset(str(prefix))
    borders = data.document_indices.tolist()
    return [[data[i].tolist() for i in range(first, last)] for first, last in zip(borders, borders[1:], strict=False)]


def ours(prefix: Path) -> list[list[int]]:
    """What is read here: documents."""
    shard = Shard(prefix)
    shard.check_index()
    return [shard.document(i).tolist() for i in range(shard.documents)]


def joined(documents: Sequence[Sequences]) -> list[list[int]]:
    return [sum(sequences, []) for sequences in documents]


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any) -> None:
    with ShardWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.asarray(document, dtype=np.int64))


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u1", "<i1", "<i2", "<i8"])
def test_their_shards_are_read(megatron: ModuleType, tmp_path: Path, dtype: str) -> None:
    for name, documents in (("plain", PLAIN), ("odd", ODD), ("none", [])):
        build(megatron, tmp_path / name, documents, dtype)
        shard = Shard(tmp_path / name)
        assert shard.dtype == np.dtype(dtype)
        assert ours(tmp_path / name) == joined(documents)
        if documents:  # their reader cannot map a file of no bytes
            assert theirs(megatron, tmp_path / name) == documents
        assert shard.stream.tolist() == sum(joined(documents), [])
        assert (shard.tokens, shard.documents) == (sum(map(len, joined(documents))), len(documents))


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_they_read_our_shards_and_write_the_same_bytes(megatron: ModuleType, tmp_path: Path, dtype: str) -> None:
    for name, documents in (("plain", PLAIN), ("empty", [[[]], [[7]], [[]]]), ("none", [])):
        write(tmp_path / name, joined(documents), dtype)
        assert not documents or theirs(megatron, tmp_path / name) == documents
        build(megatron, tmp_path / f"their-{name}", documents, dtype)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"{name}{suffix}").read_bytes() == (tmp_path / f"their-{name}{suffix}").read_bytes()


def test_the_type_of_a_vocabulary_is_theirs(megatron: ModuleType) -> None:
    for vocab_size in (1, 258, 32_000, 50_257, 65_499, 65_500, 65_536, 65_537, 151_936, 262_144):
        assert token_dtype(vocab_size).type is megatron.DType.optimal_dtype(vocab_size)


def test_the_splits_are_theirs(megatron: ModuleType) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split

    draw = random.Random(0)
    texts = ["949,50,1", "100,0,0", "0,0,1", "98,2,0", "0.9,0.05,0.05", "1,1,1"]
    texts += [",".join(str(draw.choice((0, draw.randint(1, 999), round(draw.random() + 0.001, 3)))) for _ in range(3)) for _ in range(200)]
    for text in texts:
        weights = [float(word) for word in text.split(",")]
        if not sum(weights):
            continue
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
        for documents in (0, 1, 2, 3, 7, 1000, 1001, draw.randrange(10**7)):
            expected = [None if part is None else tuple(int(round(share * float(documents))) for share in part) for part in matrix]
            found = cuts(weights, documents)
            assert [span if part is not None else None for span, part in zip(found, expected, strict=True)] == expected
            assert all(first == last for (first, last), part in zip(found, expected, strict=True) if part is None)


def run(tool: str, *arguments: object) -> None:
    command = [sys.executable, TOOLS / tool, *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, check=False, cwd=TOOLS.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A data set by the command, and its texts."""
    place = tmp_path_factory.mktemp("prepared")
    draw = random.Random(1)
    texts = [f"document {number} " + "größe, sink. " * draw.randrange(60) for number in range(400)]
    (place / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run("preprocess_data.py", "--input", place / "a.jsonl", "--tokenizer", "bytes", "--output", place / "set", "--workers", 1,
        "--split", "0.8,0.15,0.05", "--unit-bytes", 30_000)  # fmt: skip
    return place / "set", texts


def their_view(megatron: ModuleType, folder: Path, split: str) -> list[list[int]]:
    """The documents of a split of a data set, read by Megatron: each must be one sequence."""
    manifest = read_manifest(folder)
    found = [document for entry in manifest.of_split(split) for document in theirs(megatron, folder / entry.prefix)]  # type: ignore[arg-type]
    assert all(len(sequences) == 1 for sequences in found)
    return joined(found)


def our_view(folder: Path, split: str) -> list[list[int]]:
    shards = open_shards(folder, read_manifest(folder), split=split)  # type: ignore[arg-type]
    return [shard.document(i).tolist() for shard in shards for i in range(shard.documents)]


def test_they_read_what_preprocessing_writes(megatron: ModuleType, prepared: tuple[Path, list[str]]) -> None:
    folder, texts = prepared
    views = {split: their_view(megatron, folder, split) for split in ("train", "valid", "test")}
    for split, documents in views.items():
        assert documents == our_view(folder, split)
    decoded = [ByteTokenizer().decode(document) for documents in views.values() for document in documents]
    assert sorted(decoded) == sorted(texts)
    assert all(document[-1] == 256 and 256 not in document[:-1] for documents in views.values() for document in documents)


def test_they_read_what_merging_writes_of_theirs_and_of_ours(
    megatron: ModuleType, prepared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = prepared
    documents = [[[*range(number % 50), 256]] for number in range(1000)]
    build(megatron, tmp_path / "a_text_document", documents, np.uint16)
    build(megatron, tmp_path / "wide", documents[:100], np.int64)
    inputs = ["--input", folder, tmp_path / "a_text_document", tmp_path / "wide.bin", "--tokenizer", "bytes", "--split", "949,50,1"]
    for name, joins in (("apart", 0), ("joined", 10**6)):
        run("merge_data.py", *inputs, "--output", tmp_path / name, "--shard-tokens", joins)
        verify(tmp_path / name)
        spans = zip(("train", "valid", "test"), cuts((949, 50, 1), 1000), cuts((949, 50, 1), 100), strict=True)
        for split, first, second in spans:
            expected = our_view(folder, split) + joined(documents[slice(*first)]) + joined(documents[:100][slice(*second)])
            assert their_view(megatron, tmp_path / name, split) == our_view(tmp_path / name, split) == expected
    assert len(read_manifest(tmp_path / "joined").shards) == 3


def test_merging_keeps_their_sequences_where_it_links_and_their_documents_where_it_writes(megatron: ModuleType, tmp_path: Path) -> None:
    build(megatron, tmp_path / "odd", ODD, np.uint16)
    own = ["--input", tmp_path / "odd", "--vocab-size", 200]
    run("merge_data.py", *own, "--output", tmp_path / "linked")
    run("merge_data.py", *own, "--output", tmp_path / "copied", "--copy")
    run("merge_data.py", *own, "--output", tmp_path / "cut", "--split", "1,1,0")
    for name in ("linked", "copied"):
        verify(tmp_path / name)
        assert theirs(megatron, tmp_path / name / "train-00000") == ODD
        assert (tmp_path / name / "train-00000.bin").samefile(tmp_path / "odd.bin") == (name == "linked")
    verify(tmp_path / "cut")
    first, second, _ = cuts((1, 1, 0), len(ODD))
    for split, span in (("train", first), ("valid", second)):
        assert their_view(megatron, tmp_path / "cut", split) == our_view(tmp_path / "cut", split) == joined(ODD[slice(*span)])
