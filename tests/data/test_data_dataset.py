"""Opening a data set by its name, and its tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagate.data.dataset import open_dataset, prepare
from megagate.data.embedded import embedded_folder
from megagate.data.manifest import TokenizerIdentity, read_manifest
from megagate.data.tokenizer import EOD, PAD, Tokenizer, load_tokenizer
from megagate.errors import DataError


def test_a_folder(counted: Path, tmp_path: Path) -> None:
    data = open_dataset(str(counted), vocab_size=6_000, directory=tmp_path / "unused")
    assert (data.train.tokens, data.valid.tokens) == (1520, 300)
    assert (data.train.name, data.valid.name) == ("train", "valid")
    assert data.tokenizer is None
    assert data.vocab_size == data.train.vocab_size == 5_000
    assert data.fingerprint == data.train.fingerprint == data.valid.fingerprint == read_manifest(counted).fingerprint
    assert data.describe() == (
        f"{counted}: 1,520 training and 300 validation tokens, vocabulary 5,000, fingerprint {data.fingerprint[:12]}"
    )
    prepare(str(counted), vocab_size=6_000, directory=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


def test_synthetic(tmp_path: Path) -> None:
    prepare("synthetic", vocab_size=100, directory=tmp_path / "unused")
    data = open_dataset("synthetic", vocab_size=100, directory=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    assert (data.tokenizer, data.vocab_size, data.name) == (None, 100, "synthetic")
    assert data.fingerprint == data.train.fingerprint == data.valid.fingerprint
    assert data.fingerprint != open_dataset("synthetic", vocab_size=101, directory=tmp_path).fingerprint
    assert [data.train.name, data.valid.name] == ["train", "valid"]


def test_embedded(embedded_directory: Path, embedded_vocabulary: int, tmp_path: Path) -> None:
    prepare("embedded", vocab_size=embedded_vocabulary, directory=embedded_directory)
    data = open_dataset("embedded", vocab_size=embedded_vocabulary, directory=embedded_directory)
    assert data.describe().startswith("embedded: ")
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.tokenizer.encode("Return the élan.\n\x00")) == "Return the élan.\n\x00"
    with pytest.raises(DataError, match="embedded is not prepared: .* one process per machine must prepare it first"):
        open_dataset("embedded", vocab_size=embedded_vocabulary, directory=tmp_path)


def test_what_cannot_be_opened_is_refused(counted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.path is 'nowhere', and there is no such folder; .* or a blend"):
        open_dataset("nowhere", vocab_size=100, directory=tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        open_dataset("x" * 5_000, vocab_size=100, directory=tmp_path)
    for name in ("train-00000", "train-00000.bin", "train-00000.idx"):
        with pytest.raises(DataError, match=f"a shard without a manifest, .*tools/merge_data.py --input {counted}/train-00000 --tokenizer"):
            open_dataset(f"{counted}/{name}", vocab_size=100, directory=tmp_path)
    with pytest.raises(DataError, match="it has no dataset.json"):
        open_dataset(str(tmp_path), vocab_size=100, directory=tmp_path)
    with pytest.raises(DataError, match="was made for a vocabulary of 5000; model.vocab_size is 4999"):
        open_dataset(str(counted), vocab_size=4_999, directory=tmp_path)


def test_a_data_set_can_be_moved(embedded_directory: Path, embedded_vocabulary: int, tmp_path: Path) -> None:
    folder = embedded_folder(embedded_directory, embedded_vocabulary)
    other = tmp_path / "moved"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    data = open_dataset(str(other), vocab_size=embedded_vocabulary, directory=tmp_path)
    assert data.fingerprint == read_manifest(folder).fingerprint
    assert data.tokenizer is not None

    tokenizer = other / "tokenizer.json"
    good = tokenizer.read_text()
    tokenizer.write_text(good.replace("{", "{ ", 1))
    with pytest.raises(DataError, match=f"{tokenizer} is not the tokenizer that made the data set: its sha256"):
        open_dataset(str(other), vocab_size=embedded_vocabulary, directory=tmp_path)
    tokenizer.unlink()
    with pytest.raises(DataError, match=f"cannot read {tokenizer}"):
        open_dataset(str(other), vocab_size=embedded_vocabulary, directory=tmp_path)


def test_documents_cannot_end_themselves() -> None:
    tokenizer = Tokenizer.train(["some text to learn from"], vocab_size=300)
    text = f"before {EOD} between {PAD} after"
    (document, empty) = tokenizer.encode_documents([text, ""])
    assert tokenizer.eod_id != tokenizer.pad_id
    assert document.tolist().count(tokenizer.eod_id) == 1 and document[-1] == tokenizer.eod_id
    assert tokenizer.pad_id not in document
    assert tokenizer.decode(document) == text
    assert empty.tolist() == [tokenizer.eod_id]
    assert tokenizer.encode(text) == document[:-1].tolist()


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some text to learn from, some text to learn"] * 3, vocab_size=270)
    identity = tokenizer.save(tmp_path / "tokenizer.json")
    assert (identity.kind, identity.file) == ("tokenizers", "tokenizer.json")
    assert (identity.eod_id, identity.pad_id) == (tokenizer.eod_id, tokenizer.pad_id)
    assert identity.vocab_size == tokenizer.vocab_size == 270
    loaded = load_tokenizer(tmp_path, identity)
    assert loaded is not None
    text = f"some text {EOD}"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert len(tokenizer.encode(text)) < len(text)
    assert loaded.save(tmp_path / "again.json").sha256 == identity.sha256


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=f"{path} is not a tokenizer.json"):
        Tokenizer.load(path)
    Tokenizer.train(["text"], vocab_size=258).save(path)
    value = json.loads(path.read_text())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != PAD]
    del value["model"]["vocab"][PAD]
    path.write_text(json.dumps(value))
    assert Tokenizer.load(path).pad_id == -1
    with pytest.raises(DataError, match=r"tokenizer.json has no token 300, which is to fill rows"):
        Tokenizer.load(path, pad=300)
    with pytest.raises(DataError, match="the tokenizer bytes is not the one that is built in .vocab_size '9' and '258'"):
        load_tokenizer(tmp_path, TokenizerIdentity(kind="bytes", file="", sha256="", vocab_size=9, eod_id=256, pad_id=257))
    other = TokenizerIdentity(kind="other", file="", sha256="", vocab_size=9, eod_id=0, pad_id=1)
    with pytest.raises(DataError, match="tokenizer kind is 'other'; it must be tokenizers, bytes or none"):
        load_tokenizer(tmp_path, other)


def test_importing_is_light() -> None:
    program = "import sys, megagate.data.dataset, megagate.data.loader; print(*({'torch', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == ""
