"""The embedded text: clean, the same for everybody, without leaks, and prepared whole or not at all."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megagate.data import embedded
from megagate.data.corpus import Corpus, divide, library_sha256, read_corpus, shingles_of, without_duplicates
from megagate.data.dataset import open_dataset
from megagate.data.embedded import embedded_folder, prepare_embedded
from megagate.data.manifest import MANIFEST_NAME, open_shards, read_manifest, verify
from megagate.data.tokenizer import Tokenizer
from megagate.errors import DataError

REPOSITORY = Path(__file__).parents[2]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "pi", "rho"]


def prose(seed: int, words: int = 60) -> str:
    """Text of its own."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library, in the place of Python's own."""
    root = tmp_path / "lib"
    for name in ("pydoc_data", "package/test", "site-packages"):
        (root / name).mkdir(parents=True)
    (root / "pydoc_data/topics.py").write_text(f"# Comment\ntopics = {{'b': {prose(1)!r}, 'a': {prose(2)!r}, 'short': 'x'}}\n")
    functions = "".join(f'def f{i}():\n    """{prose(i, 200)}"""\n' for i in range(100, 280))
    method = f'    async def f(self):\n        """{prose(4)}"""\n'
    (root / "module.py").write_text(f'"""{prose(3)}"""\nclass A:\n    """Too short."""\n{method}{functions}')
    (root / "package/broken.py").write_text(f'"""{prose(5)}""" print')
    (root / "package/test/test_it.py").write_text(f'"""{prose(6)}"""')
    (root / "site-packages/other.py").write_text(f'"""{prose(7)}"""')
    (root / "package/surrogate.py").write_text(f'"""{prose(8)} \\ud800"""')
    monkeypatch.setattr(embedded, "library_folder", lambda: root)
    return root


def test_the_documents_are_docstrings_and_topics(library: Path) -> None:
    corpus = read_corpus(library)
    documents = set(corpus.train) | set(corpus.valid)
    assert {prose(1), prose(2), prose(3), prose(4), prose(8) + " ?", prose(100, 200)} <= documents
    assert not {"x", "Too short.", prose(5), prose(6), prose(7)} & documents
    assert len(documents) == 5 + 180
    assert corpus == read_corpus(library)


def test_a_python_without_sources_is_refused(library: Path) -> None:
    (library / "module.py").unlink()
    with pytest.raises(DataError, match=f"library at {library} holds .* characters of text; at least 100000 are needed"):
        read_corpus(library)


def test_the_hash_of_the_library_knows_every_file(library: Path) -> None:
    digests = [library_sha256(library)]
    (library / "package/test/test_it.py").write_text("")
    assert library_sha256(library) == digests[0]
    (library / "package/broken.py").write_text("x = 1")
    digests.append(library_sha256(library))
    (library / "package/broken.py").rename(library / "package/renamed.py")
    digests.append(library_sha256(library))
    assert len(set(digests)) == 3


def test_duplicates_are_dropped_and_the_longest_kept() -> None:
    long, other = prose(1, 300), prose(2, 100)
    words = long.split()
    shouted = "\n".join(long.upper().split())
    inside = " ".join(words[50:120])
    mostly = " ".join([*words[:40], *prose(9, 20).split()])
    a_little = " ".join([*words[:14], *prose(10, 80).split()])
    assert without_duplicates([inside, other, shouted, long, mostly, a_little, other]) == [other, shouted, a_little]
    assert without_duplicates(["...", "a b", "..."]) == ["...", "a b"]
    assert without_duplicates([]) == []


def test_the_division_is_by_each_document_alone() -> None:
    documents = [prose(seed) for seed in range(2_000)]
    train, valid = divide(documents)
    assert 0.045 < len(valid) / 2_000 < 0.075
    assert sorted(train + valid) == sorted(documents)
    assert divide(documents[::3])[1] == [document for document in documents[::3] if document in set(valid)]
    assert divide([document.upper() for document in documents])[1] == [document.upper() for document in valid]


def test_the_real_text_does_not_leak(corpus: Corpus) -> None:
    assert len(corpus.train) > 1_000 and len(corpus.valid) > 50
    assert sum(map(len, corpus.train)) > 1_000_000
    assert sum(map(len, corpus.valid)) > 50_000
    seen = set().union(*map(shingles_of, corpus.train))
    shares = [len(shingles_of(document) & seen) / len(shingles_of(document)) for document in corpus.valid]
    assert max(shares) <= 0.4
    assert np.mean(shares) < 0.03


def test_two_processes_at_once_made_one_data_set(embedded_directory: Path, embedded_vocabulary: int) -> None:
    place = embedded_folder(embedded_directory, embedded_vocabulary)
    assert list(embedded_directory.iterdir()) == [place]
    verify(place)


def test_the_data_set_holds_the_corpus(embedded_directory: Path, embedded_vocabulary: int, corpus: Corpus, tmp_path: Path) -> None:
    data = open_dataset("embedded", vocab_size=embedded_vocabulary, directory=embedded_directory)
    assert data.tokenizer is not None
    assert data.vocab_size == data.tokenizer.vocab_size == embedded_vocabulary
    manifest = read_manifest(embedded_folder(embedded_directory, embedded_vocabulary))
    for split, texts in (("train", corpus.train), ("valid", corpus.valid)):
        (shard,) = open_shards(embedded_folder(embedded_directory, embedded_vocabulary), manifest, split=split)
        documents = [shard.document(index) for index in range(shard.documents)]
        assert all(document[-1] == data.tokenizer.eod_id for document in documents)
        assert all(np.count_nonzero(document == data.tokenizer.eod_id) == 1 for document in documents)
        decoded = [data.tokenizer.decode(document) for document in documents]
        assert sorted(decoded) == sorted(texts)
        assert decoded != list(texts)
    assert manifest.source["corpus_sha256"] == corpus.sha256
    # The tokenizer has seen the training documents and nothing else, and another process makes the same of them.
    again = Tokenizer.train(corpus.train, vocab_size=embedded_vocabulary).save(tmp_path / "again.json")
    assert again.sha256 == manifest.tokenizer.sha256


def test_who_comes_second_discards_his(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, winners = embedded._build, []

    def build_after_another(folder: Path, vocab_size: int) -> None:
        monkeypatch.setattr(embedded, "_build", build)
        winner = prepare_embedded(tmp_path / "data", vocab_size)
        winners.append((winner / MANIFEST_NAME).stat().st_ino)
        build(folder, vocab_size)

    monkeypatch.setattr(embedded, "_build", build_after_another)
    place = prepare_embedded(tmp_path / "data", 300)
    assert winners == [(place / MANIFEST_NAME).stat().st_ino]
    assert list((tmp_path / "data").iterdir()) == [place]
    verify(place)


def test_a_complete_data_set_is_not_built_again(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = prepare_embedded(tmp_path / "data", 300)

    def fail(folder: Path, vocab_size: int) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_build", fail)
        assert prepare_embedded(tmp_path / "data", 300) == place
        with pytest.raises(AssertionError):
            prepare_embedded(tmp_path / "data", 301)
        (library / "package/broken.py").write_text("")
        with pytest.raises(AssertionError):
            prepare_embedded(tmp_path / "data", 300)
    assert list((tmp_path / "data").iterdir()) == [place]
    assert prepare_embedded(tmp_path / "data", 300) != place


def test_a_damaged_data_set_is_not_taken_and_not_removed(library: Path, tmp_path: Path) -> None:
    place = prepare_embedded(tmp_path / "data", 300)
    (place / MANIFEST_NAME).write_text("{}")
    with pytest.raises(DataError, match="format_version is missing"):
        prepare_embedded(tmp_path / "data", 300)
    (place / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match=f"{place} has no dataset.json; .* remove that folder"):
        prepare_embedded(tmp_path / "data", 300)
    assert (place / "train-00000.bin").exists()


def test_a_full_disk_leaves_nothing(library: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megagate.data import embedded; from megagate.errors import DataError\n"
        "embedded.library_folder = lambda: Path(sys.argv[2])\n"
        "try: embedded.prepare_embedded(Path(sys.argv[1]), 300)\n"
        "except DataError as error: sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "data"), str(library)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert "cannot write" in done.stderr and "train-00000.bin: File too large; free some space" in done.stderr
    assert done.returncode == 1
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(library: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"cannot write {tmp_path / 'file/data'}: Not a directory; check the path"):
        prepare_embedded(tmp_path / "file/data", 300)


def test_a_vocabulary_too_small_for_bytes_is_refused(library: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer of 257 tokens cannot be made; it needs at least 258 .* raise model.vocab_size"):
        prepare_embedded(tmp_path / "data", 257)
    assert list((tmp_path / "data").iterdir()) == []
    prepare_embedded(tmp_path / "data", 258)
