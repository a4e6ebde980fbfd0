"""What models read: text and data sets cut into windows, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_exports import DENSE

from megagate.analysis.gate.source import Source
from megagate.analysis.gate.text import Windows, default_length, read_windows
from megagate.data.byte_tokenizer import ByteTokenizer
from megagate.data.dataset import open_dataset
from megagate.data.loader import IGNORE_INDEX, ValidLoader
from megagate.data.manifest import Manifest, ShardEntry, SplitName, write_manifest
from megagate.data.shards import ShardWriter
from megagate.data.tokenizer import AnyTokenizer, Tokenizer
from megagate.errors import ConfigError, DataError

EOD = 256
WORDS = "Gates make attention sparse. A sink takes what no head wants; massive activations follow.\n" * 8


def source(name: str = "it", *, vocab_size: int = 300, tokenizer: AnyTokenizer | None = None, length: int = 64) -> Source:
    model = replace(DENSE, vocab_size=vocab_size)
    return Source(name, Path(name), "made up", model, length, False, tokenizer, "it is gone", lambda prefix: {})


BYTES = source(tokenizer=ByteTokenizer())


def read(path: Path, *sources: Source, seq_len: int = 8, samples: int = 3, tokenizer: AnyTokenizer | None = None) -> Windows:
    return read_windows(path, sources or [BYTES], seq_len=seq_len, samples=samples, tokenizer=tokenizer)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def dataset(folder: Path, tokenizer: AnyTokenizer, **splits: list[int]) -> Path:
    """A prepared data set of one document per split."""
    folder.mkdir()
    entries = []
    for split, ids in splits.items():
        name: SplitName = "train" if split == "train" else "valid"
        with ShardWriter(folder / split, dtype=np.dtype(np.uint16)) as writer:
            writer.add(np.array(ids))
        entries.append(ShardEntry.of(split, split=name, stats=writer.finish()))
    write_manifest(folder, Manifest(tokenizer.save(folder / "tokenizer.json"), "uint16", tuple(entries), {}))
    return folder


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_windows_follow_one_another_and_the_last_label_is_the_next_token(tmp_path: Path, name: str) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    found = read(written(tmp_path / name, text))
    stream = torch.tensor([*text.encode(), EOD])
    torch.testing.assert_close(found.tokens, stream[:24].view(3, 8))
    torch.testing.assert_close(found.labels, stream[1:25].view(3, 8))
    assert found.described == str(tmp_path / name)
    assert found.spelled(3) == ("a", "b", "c")


def test_documents_are_joined_by_their_ends(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("abc", "de", "fghi", "never read"))
    found = read(written(tmp_path / "a.jsonl", lines), samples=1)
    assert found.tokens.tolist() == [[97, 98, 99, EOD, 100, 101, EOD, 102]]
    assert found.spelled(4) == ("a", "b", "c", "256")
    apart = found.without_targets_after_documents()
    assert apart.labels.tolist() == [[98, 99, EOD, IGNORE_INDEX, 101, EOD, IGNORE_INDEX, 103]]
    empty = read(written(tmp_path / "b.jsonl", '{"text": ""}\n' * 9), samples=1)
    with pytest.raises(DataError, match=r"b\.jsonl has documents without a token; give text"):
        empty.without_targets_after_documents()


@pytest.mark.parametrize(("samples", "count"), [(1, 1), (2, 2), (9, 3)])
def test_as_many_sequences_as_are_asked_for_or_there(tmp_path: Path, samples: int, count: int) -> None:
    assert len(read(written(tmp_path / "a.txt", "x" * 27), samples=samples).tokens) == count


def test_of_a_long_text_the_beginning_is_encoded(tmp_path: Path) -> None:
    class Counting(ByteTokenizer):
        seen = 0

        def encode_batch(self, texts):
            self.seen += sum(map(len, texts))
            return super().encode_batch(texts)

    counting = Counting()
    found = read(written(tmp_path / "a.txt", WORDS * 1000), samples=2, tokenizer=counting)
    assert counting.seen < 1000
    torch.testing.assert_close(found.tokens, read(written(tmp_path / "b.txt", WORDS), samples=2).tokens)
    for text in (WORDS.replace("\n", " ") * 1000, "x" * 80_000, "A title\n" + "y" * 80_000):
        counting.seen = 0
        found = read(written(tmp_path / "c.txt", text), samples=2, tokenizer=counting)
        assert 0 < counting.seen < 1000
        assert found.tokens.flatten().tolist() == list(text[:16].encode())


def test_a_head_that_is_not_enough_is_followed_by_a_longer_one(tmp_path: Path) -> None:
    class Sparse(ByteTokenizer):
        """A token for 64 bytes."""

        seen = 0

        def encode_batch(self, texts):
            self.seen += sum(map(len, texts))
            return [ids[::64] for ids in super().encode_batch(texts)]

    sparse = Sparse()
    assert read(written(tmp_path / "a.txt", "x" * 200_000), samples=2, tokenizer=sparse).tokens.shape == (2, 8)
    assert sparse.seen == 16 * 17 + 16 * 16 * 17


def test_a_data_set_is_read_as_a_validation_reads_it(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 256, 60).tolist()
    folder = dataset(tmp_path / "set", ByteTokenizer(), train=[1, 2, 3] * 9 + [EOD], valid=[*ids, EOD])
    found = read(folder, samples=4)
    split = open_dataset(str(folder), vocab_size=300, directory=folder).valid
    batch = next(iter(ValidLoader(split, seq_len=8, micro_batch_size=4, dp_rank=0, dp_size=1, batches=1)))
    np.testing.assert_array_equal(found.tokens.numpy(), batch.tokens)
    np.testing.assert_array_equal(found.labels.numpy(), batch.labels)
    assert found.eod_id == EOD
    assert found.described == f"{folder}, validation split"
    training = dataset(tmp_path / "training", ByteTokenizer(), train=[1, 2, 3] * 9 + [EOD])
    assert "training split" in read(training).described


def test_files_that_spell_one_tokenizer_otherwise_are_one(tmp_path: Path) -> None:
    first = Tokenizer.train([WORDS], vocab_size=290)
    first.save(tmp_path / "tokenizer.json")
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    other = Tokenizer.load(written(tmp_path / "other.json", json.dumps(settings, indent=7)))
    assert first.identity().sha256 != other.identity().sha256
    text = written(tmp_path / "a.txt", WORDS)
    same = read(text, source("one", tokenizer=first), source("two", tokenizer=other))
    torch.testing.assert_close(same.tokens, read(text, source("one", tokenizer=first)).tokens)


def test_models_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", WORDS)
    first, other = Tokenizer.train([WORDS], vocab_size=290), Tokenizer.train([WORDS.upper()], vocab_size=290)
    one, two = source("one", tokenizer=first), source("two", tokenizer=other)
    with pytest.raises(ConfigError, match=r"--models: one and two have different tokenizers \(model\); .* analyze them apart"):
        read(text, one, two)
    with pytest.raises(ConfigError, match=r"one and it have different tokenizers \(kind 'tokenizers' and 'bytes'"):
        read(text, one, BYTES)
    read(text, one, two, tokenizer=first)
    folder = dataset(tmp_path / "set", first, valid=[1, 2, 3] * 9)
    read(folder, one)
    with pytest.raises(ConfigError, match=r"--models two: its tokenizer is not that of --data .*set \(model\)"):
        read(folder, one, two)
    with pytest.raises(ConfigError, match=r"--tokenizer: its tokenizer is not that of --data"):
        read(folder, one, tokenizer=ByteTokenizer())


def test_models_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", WORDS)
    with pytest.raises(ConfigError, match=r"it has a vocabulary of 300 tokens and two one of 301; .* analyze them apart"):
        read(text, BYTES, source("two", vocab_size=301, tokenizer=ByteTokenizer()))
    with pytest.raises(ConfigError, match=r"the tokenizer has 258 tokens and the models have 200"):
        read(text, source(vocab_size=200, tokenizer=ByteTokenizer()))


def test_text_needs_a_tokenizer_and_ids_do_not(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", WORDS)
    with pytest.raises(DataError, match=r"--models none: its tokenizer is needed to read text, .*\(it is gone\); --tokenizer PATH"):
        read(text, BYTES, source("none"))
    torch.testing.assert_close(read(text, source("none"), tokenizer=ByteTokenizer()).tokens, read(text).tokens)
    assert read(dataset(tmp_path / "set", ByteTokenizer(), valid=[1, 2, 3] * 9), source("none")).tokens.shape == (3, 8)


def test_too_short_a_file_is_refused_with_the_longest_sequence_that_it_has(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", "1234567")  # and the end of the document
    assert read(text, seq_len=7).tokens.shape == (1, 7)
    with pytest.raises(DataError, match=r"a\.txt has 8 tokens, and one sequence takes 9 \(--seq-len 8 .*; give more text, or --seq-len 7"):
        read(text)
    with pytest.raises(DataError, match=r"set has 8 tokens, and one sequence takes 9"):
        read(dataset(tmp_path / "set", ByteTokenizer(), valid=[1] * 8))
    with pytest.raises(DataError, match=r"a\.jsonl is empty; give text"):
        read(written(tmp_path / "a.jsonl", ""))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"a\.csv: unknown kind of file; names must end in \.jsonl"),
        ("a.jsonl", '{"txt": "x"}\n', r"a\.jsonl, byte 0: no key 'text', only 'txt'; choose another --text-key$"),
        ("a.jsonl", "{", r"a\.jsonl, byte 0: malformed JSON .*\); mend the file, or give another$"),
        ("set/a.txt", "x", r"set: the folder has no dataset\.json; give a file of text"),
        ("gone/../../none.txt", "x", r"none\.txt: there is no such file; give text"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    if name.startswith("gone"):
        path = tmp_path / "none.txt"
    else:
        path.parent.mkdir(exist_ok=True)
        written(path, text)
    with pytest.raises(DataError, match=message):
        read(path.parent if name.startswith("set") else path)


def test_sequences_are_as_long_as_all_models_were_trained_on() -> None:
    assert default_length([source(length=512), source(length=128), source(length=0)]) == 128
    assert default_length([source(length=32768)]) == 4096
