"""Real English that every Python carries: the language reference of `pydoc_data` and the docstrings of the standard library.

About 1.5 MB in 2,000 documents. It is read where it lies at run time (the text is the Python Software Foundation's, under the PSF
licence); its bytes differ between versions of Python, so data sets made of it record a sha256.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagate.data.files import clean_errors
from megagate.errors import DataError

CORPUS_VERSION = 1  # raise it when the same Python would give other documents
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_TOPICS = "pydoc_data/topics.py"
_SHORTEST = 200  # characters, exclusive
_SHINGLE = 8  # words
_MOST_SEEN = 0.2  # share of a document's shingles that longer documents may have
_VALID_SHARE = 0.06
_SMALLEST_CORPUS = 100_000  # characters
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Corpus:
    """Documents without near-duplicates, divided by their hash.

    Attributes:
        train: To learn from.
        valid: To measure on; shares no document with `train` and hardly an eight-word phrase.
        sha256: Of all documents and their division (hex).
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    sha256: str


def library_folder() -> Path:
    """Where the running Python keeps its standard library (not that of a virtual environment)."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(library: Path) -> Corpus:
    """Reads the documents of a standard library; the same files give the same corpus.

    Raises:
        DataError: There is not enough text, as where Python was installed without its sources.
    """
    documents = without_duplicates(list(_documents(library)))
    size = sum(map(len, documents))
    if size < _SMALLEST_CORPUS:
        raise DataError(
            f"data.path embedded: the Python library at {library} holds {size} characters of text; at least {_SMALLEST_CORPUS} are"
            " needed; use a Python installed with its sources, or set data.path to a prepared data set"
        )
    train, valid = divide(documents)
    digest = hashlib.sha256()
    for part in (train, valid):
        for document in part:
            digest.update(document.encode() + b"\x00")
        digest.update(b"\x01")
    return Corpus(train=tuple(train), valid=tuple(valid), sha256=digest.hexdigest())


def library_sha256(library: Path) -> str:
    """sha256 (hex) of all the files that the corpus is read from: much faster than reading the corpus itself."""
    digest = hashlib.sha256()
    with clean_errors("read", library):
        for path in _source_files(library):
            digest.update(path.relative_to(library).as_posix().encode() + b"\x00")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def without_duplicates(documents: list[str]) -> list[str]:
    """Drops documents that occur again up to white space and case, and those mostly contained in others.

    Longer documents are kept first: a document is dropped when more than a fifth of its eight-word phrases stand in longer ones. A
    docstring and its revised copy would otherwise come to lie on both sides of the division into train and validation.
    """
    seen: set[tuple[str, ...]] = set()
    kept: list[int] = []
    for index in sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i)):
        shingles = shingles_of(documents[index])
        if len(shingles & seen) <= _MOST_SEEN * len(shingles):
            kept.append(index)
            seen |= shingles
    return [documents[index] for index in sorted(kept)]


def shingles_of(document: str) -> set[tuple[str, ...]]:
    """All runs of eight words, or the whole document where it has fewer; words are compared without case and punctuation."""
    words = _WORD.findall(document.lower()) or document.split()
    return {tuple(words[first : first + _SHINGLE]) for first in range(max(1, len(words) - _SHINGLE + 1))}


def divide(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, valid), about 6 % valid, by each document's own hash: adding documents moves none to the other side."""
    train: list[str] = []
    valid: list[str] = []
    for document in documents:
        normal = " ".join(document.lower().split())
        draw = int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "little") / 2**64
        (valid if draw < _VALID_SHARE else train).append(document)
    return train, valid


def _source_files(library: Path) -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(library).as_posix())


def _documents(library: Path) -> Iterator[str]:
    with clean_errors("read", library):
        for path in _source_files(library):
            source = path.read_bytes()
            if b'"""' not in source and b"'''" not in source and path != library / _TOPICS:
                continue  # parsing is the slow part
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # old escapes in old sources
                    tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue  # the library keeps some files of other versions of Python
            texts = _topics(tree) if path == library / _TOPICS else _docstrings(tree)
            # A docstring may spell lone surrogates, which no encoding of text has.
            yield from (text.encode(errors="replace").decode() for text in texts if len(text) > _SHORTEST)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _topics(tree: ast.Module) -> Iterator[str]:
    """The values of the file's one dictionary, topic -> text."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            yield from (topics[name] for name in sorted(topics))
