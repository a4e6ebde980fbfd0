"""Which package makes the ids: `tokenizers`, the reference, or gigatoken, which takes a small part of its time and is held to its ids.

What gigatoken 0.10 was seen to do otherwise, and what is done about it here:
- the spelling of a special token within a text becomes the token: it is not told of special tokens;
- it knows a newer Unicode, and so other letters and another order of marks: each character that is new to a process is tried in both
  packages, and texts with one that makes a difference are given to `tokenizers`;
- it passes over options of a `tokenizer.json` that it does not know: the ids of probes and of the input's first documents are compared
  before anything is written, and those of one document in `_EVERY` after that;
- it keeps every word that it has seen: it is made anew when that takes too much memory.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megagate.data.preprocess.plan import Plan
from megagate.data.preprocess.readers import Document, read_part
from megagate.data.tokenizer import AnyTokenizer, Tokenizer
from megagate.errors import DataError

Backend = Literal["tokenizers", "gigatoken"]
BackendChoice = Literal["auto", "tokenizers", "gigatoken"]
IdArray = npt.NDArray[np.uint32]

_ASCII = bytes(range(128))
_EVERY = 256  # documents: a comparison takes some 30 times as long as gigatoken itself
_TRIED_AT_ONCE = 512  # characters
# Bytes by which a process may grow through gigatoken's memory of words, which doubles at once; and where it is large already.
_GROWTH, _GROWTH_OF_LARGE, _LARGE = 48 << 20, 20 << 20, 224 << 20
_SOURCES, _DOCUMENTS, _CHARACTERS = 8, 32, 1 << 15  # of the input: files looked at, and of each documents and characters
# Letter, digit, mark, space or sign: which one a character is decides where words around it begin and end; and marks change places with
# others under a normalizer, here with one that belongs behind nearly all (U+0345) and one that belongs before (U+0334).
_TRIAL = "e\u0345@ @\u0334 @ @the the@ing @'s @'ll '@' ...@... --@-- 12@34 @5\n@\n\n@  @@ the@@ .@the 1@a"
_PROBES = (
    "Hello, world! It's what they'd've said: DON'T, we'll, I'M. camelCase snake_case __init__ kebab-case x=y+1;\n",
    "a  b   c    d\te\t\tf \n g\n\nh\n\n\ni \r\n\r\nj\rk\x0b\x0cl \n\n  m\n   ",
    " leading\n", "   leading", "\n\nleading", "trailing ", "trailing\n\n", " ", "\n", "\r\n", "\t", "'", "'s", "''s",
    "0 1 12 123 1234 12345 1234567890 1,234.5 1e-5 0x1F ٣٤٥ ௧௨ ½ ² Ⅷ 10km 3rd",
    "Größe naïve café cafe\u0301 İstanbul ﬁn ſ ǅ ß STRASSE ΑΒΓ αβγς Привет שלום مرحبا नमस्ते ภาษาไทย 한국어 日本語テキスト。中文，标点！",
    "\u00a0\u2003\u3000\u200b\u200d\ufeff\u2028\u2029\u0085 x\u00a0y \u00a0 z\u3000w",
    "👍🏽👩‍👩‍👧‍👦🇩🇪 😀😀 x😀y ☃ ♥️ → ≤ ∑ €5 £3 §4 ¿qué? «oui» “quotes” ‘s don’t — – …",
    "!!!??? ... .... ----- ===== #### //// ((())) [[]] {{}} <<>> @@ $$ %% ^^ && ** ++ ~~ `` \\\\ || \"\" ;; ::",
    "<html><a href=\"http://x.org/?q=1&r=2#t\">T</a></html> {\"key\": [1, 2.5, null]} def f(x): return x**2  # why\n",
    "\x00\x01\x1b[0m\x7f \ufffd \U0010ffff \U000e0041 \u0300\u0301 a\u0300\u0301\u0302",
    "a" * 5_000, "ab" * 3_000, " " * 3_000, "\n" * 3_000, "1" * 3_000, "." * 3_000, "é" * 2_000, "中" * 2_000, "x " * 2_000, "A1 " * 1_000,
)  # fmt: skip


class Encoder(Protocol):
    """What makes the ids of documents."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[npt.NDArray[Any]]:
        """For each text its ids, without an end of document."""
        ...


class Gigatoken:
    """The ids of a tokenizer, made by gigatoken on the calling thread.

    Args:
        reference: The tokenizer whose ids these must be.

    Raises:
        DataError: The package is missing, or cannot read this tokenizer.
    """

    def __init__(self, reference: Tokenizer) -> None:
        try:
            from gigatoken import Tokenizer as Package  # noqa: PLC0415  optional
        except ImportError as error:
            raise DataError("gigatoken is not installed; choose --tokenizer-backend tokenizers, or pip install gigatoken") from error
        self._reference, self._package = reference, Package
        # Only this list is parsed: Python objects of a whole vocabulary take 100 MB.
        text = reference.to_json()
        begin = text.index('"added_tokens":') + len('"added_tokens":')
        tokens, end = json.JSONDecoder().raw_decode(text, begin)
        tokens = [token for token in tokens if not token["special"]]
        self._added = [str(token["content"]) for token in tokens]
        self._json = f"{text[:begin]}{json.dumps(tokens)}{text[end:]}".encode()
        self._tried: set[str] = set()
        self._different: set[str] = set()
        self._seen = 0
        self._resident = 0
        self._renew()

    def _renew(self) -> None:
        self._backend: Any = None  # its memory goes first
        try:
            self._backend = self._package.from_json(self._json).backend
        except Exception as error:  # the package raises bare ones
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"gigatoken cannot read this tokenizer ({reason}); choose --tokenizer-backend tokenizers") from error
        self._resident = 0

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """For each text its ids, without an end of document.

        Raises:
            DataError: The package made other ids than the reference.
        """
        found = self._ids(texts)
        for index in range(-self._seen % _EVERY, len(texts), _EVERY):
            _compare(texts[index], found[index], self._reference, "a document of the input")
        self._seen += len(texts)
        self._bound_memory()
        return found

    def check(self, documents: Iterable[str]) -> None:
        """Compares all ids of probes, of the tokenizer's own added tokens, and of documents.

        Raises:
            DataError: The package made other ids than the reference.
        """
        tokens = sorted({*self._added[:64], *self._reference.special_tokens()[:64]})
        spelled = [f"{token} x{token}x {token}{token} .{token}.\n{token}\n {token[:-1]} {token[1:]} {token.lower()}" for token in tokens]
        for texts, what in ((_PROBES, "a probe"), (spelled, "a spelled token"), (documents, "a document of the input")):
            for text in texts:
                (ids,) = self._ids([text])
                _compare(text, ids, self._reference, what)

    def _ids(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        found, different = self._raw(texts), self._different_in(texts)
        for index in [index for index, text in enumerate(texts) if different and not different.isdisjoint(text)]:
            (found[index],) = self._reference.encode_batch([texts[index]])
        return found

    def _raw(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        return [self._backend.encode(text.encode()) for text in texts]

    def _different_in(self, texts: Sequence[str]) -> set[str]:
        """The characters of texts on which the packages differ."""
        rare = b"".join(text.encode() for text in texts if not text.isascii()).translate(None, _ASCII)
        found = set(rare.decode())
        new = sorted(found - self._tried)
        for first in range(0, len(new), _TRIED_AT_ONCE):
            some = new[first : first + _TRIED_AT_ONCE]
            trials = [_TRIAL.replace("@", character) for character in some]
            for character, ours, theirs in zip(some, self._raw(trials), self._reference.encode_batch(trials), strict=True):
                if not np.array_equal(ours, theirs):
                    self._different.add(character)
        self._tried.update(new)
        return found & self._different

    def _bound_memory(self) -> None:
        resident = _resident_bytes()
        self._resident = self._resident or resident
        if resident - self._resident > (_GROWTH_OF_LARGE if resident > _LARGE else _GROWTH):
            self._renew()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _compare(text: str, found: npt.NDArray[Any], reference: Tokenizer, what: str) -> None:
    (expected,) = reference.encode_batch([text])
    if np.array_equal(found, expected):
        return
    size = min(found.size, expected.size)
    first = int(np.flatnonzero(np.append(found[:size] != expected[:size], True))[0])
    near = reference.decode(expected[max(0, first - 4) : first + 4].tolist())
    ours, theirs = (ids[first : first + 4].tolist() for ids in (found, expected))
    raise DataError(
        f"gigatoken makes other ids than tokenizers: of {what}, at its token {first}, near {near!r}, {ours} instead of {theirs}; choose"
        " --tokenizer-backend tokenizers, and an empty --output if gigatoken has made units of this one: they may hold others like it"
    )


def make_encoder(tokenizer: AnyTokenizer, backend: Backend) -> Encoder:
    """The encoder of a backend; the tokenizer `bytes` is its own under each."""
    return Gigatoken(tokenizer) if backend == "gigatoken" and isinstance(tokenizer, Tokenizer) else tokenizer


def choose_backend(choice: BackendChoice, tokenizer: AnyTokenizer, plan: Plan) -> tuple[Backend, str]:
    """The backend for a plan, and why `auto` has not taken the fast one (empty where it has, or was not asked).

    `auto` takes gigatoken where it is installed, reads the tokenizer and passes the check; ids are the same either way.

    Raises:
        DataError: gigatoken was asked for, and cannot be used, or makes other ids.
    """
    if choice == "tokenizers" or (choice == "auto" and not isinstance(tokenizer, Tokenizer)):
        return "tokenizers", ""
    try:
        if not isinstance(tokenizer, Tokenizer):
            raise DataError("gigatoken has no tokenizer `bytes`; leave --tokenizer-backend out")
        Gigatoken(tokenizer).check(first_documents(plan))
    except DataError as error:
        if choice == "gigatoken":
            raise
        return "tokenizers", str(error).partition("; choose")[0]
    return "gigatoken", ""


def first_documents(plan: Plan) -> Iterator[str]:
    """The beginnings of the first documents of some of a plan's inputs, spread over all."""
    firsts = {piece.source: piece for unit in reversed(plan.units) for piece in reversed(unit.pieces)}
    sources = sorted(firsts)
    for source in sources[:: -(-len(sources) // _SOURCES)]:
        left, documents = _CHARACTERS, 0
        for item in read_part(plan.part(firsts[source]), text_key=plan.settings.text_key, longest=plan.settings.max_document_bytes):
            if documents >= _DOCUMENTS or left <= 0:
                break
            if isinstance(item, Document):
                yield item.text[:left]
                left -= len(item.text)
                documents += 1
