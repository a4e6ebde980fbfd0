"""Byte-level BPE: training, encoding of documents, decoding, identity. The `tokenizers` package is imported only where it is used."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megagate.data.byte_tokenizer import BYTES, ByteTokenizer
from megagate.data.files import AtomicFile, clean_errors, file_sha256
from megagate.data.hashing import IntArray
from megagate.data.manifest import TokenizerIdentity
from megagate.data.pieces import exact_cuts
from megagate.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Model

TOKENIZER_NAME = "tokenizer.json"
EOD = "<|endoftext|>"
PAD = "<|pad|>"  # not EOD: who masks padding must not mask the ends of documents
_SMALLEST_VOCABULARY = 256 + 2  # every byte, EOD and PAD
# A text takes some 150 times its size while it is encoded, and the longer the slower: long ones are encoded in pieces where that is exact.
_PIECE = 1 << 14  # characters
_END = re.compile(r"end|eos|eot|stop|</s>", re.IGNORECASE)  # in the spelling of a token that may end documents
_NAMED = 8  # in a message


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: Ids are below this.
        eod_id: Appended to each document.
        pad_id: Never made by encoding; differs from `eod_id`; -1 for none.

    Args:
        model: Of the `tokenizers` package.
        name: For messages.
        eod: The token that ends a document, or its id.
        pad: The token that fills rows, if the tokenizer has it, or the id of one that it must have; None for none.

    Raises:
        DataError: The tokenizer has no such tokens, or one token for both.
    """

    def __init__(self, model: "_Model", *, name: str = "the tokenizer", eod: str | int = EOD, pad: str | int | None = PAD) -> None:
        self._model = model
        self._file: tuple[Path, str] | None = None  # that it was read from, and its sha256; the content of a large one would take 20 MB
        # Text that spells a special token must not become one: a document could end itself.
        self._model.encode_special_tokens = True
        # What a tokenizer.json may hold for another use: documents are neither cut nor filled, and their ids are not drawn.
        self._model.no_truncation()
        self._model.no_padding()
        if getattr(self._model.model, "dropout", None):
            self._model.model.dropout = None
        self._cuts = exact_cuts(model)
        # Not the number of tokens: ids may have holes, and all must be below this.
        self.vocab_size: int = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod_id = self._id(eod)
        self.pad_id = -1 if pad is None else self._id(pad)
        if self.eod_id < 0:
            raise DataError(f"{name} has no {eod}, and a token must end documents; name one with --eod-token ({self._likely_ends()})")
        if self.pad_id < 0 and isinstance(pad, int):
            raise DataError(f"{name} has no token {pad}, which is to fill rows; it is not the tokenizer that the id is of; take that one")
        if self.eod_id == self.pad_id:
            raise DataError(f"{name}: {eod} and {pad} are both id {self.eod_id}; they must differ; choose another token for one of them")

    def _id(self, token: str | int) -> int:
        """Of a token or an id, -1 if there is none."""
        index = token if isinstance(token, int) else self._model.token_to_id(token)
        return index if index is not None and 0 <= index < self.vocab_size else -1

    def _likely_ends(self) -> str:
        tokens = self.special_tokens()
        found = [token for token in tokens if _END.search(token)] or tokens
        return f"likely: {', '.join(map(repr, found[:_NAMED]))}" if found else "it has no special tokens"

    @classmethod
    def load(cls, path: Path, *, eod: str | int = EOD, pad: str | int | None = PAD) -> "Tokenizer":
        """Reads a `tokenizer.json`; for `eod` and `pad` see the class."""
        from tokenizers import Tokenizer as Model  # noqa: PLC0415  heavy, and only needed here

        with clean_errors("read", path):
            content = path.read_bytes()
        try:
            model = Model.from_str(content.decode(errors="replace"))
        except Exception as error:  # the package raises bare exceptions
            raise DataError(
                f"{path} is not a tokenizer.json ({error}); name a file that is one; if this is a data set's, put its own back, or"
                " prepare it again"
            ) from error
        tokenizer = cls(model, name=str(path), eod=eod, pad=pad)
        tokenizer._file = path, hashlib.sha256(content).hexdigest()
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Learns a byte-level BPE; equal texts give an equal tokenizer.

        Args:
            texts: The training documents.
            vocab_size: Tokens in total, with the two special ones and the 256 bytes; fewer when the texts have no more pairs to merge.

        Raises:
            DataError: The vocabulary is too small for bytes and special tokens.
        """
        from tokenizers import Tokenizer as Model  # noqa: PLC0415  heavy, and only needed here
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

        if vocab_size < _SMALLEST_VOCABULARY:
            raise DataError(
                f"a byte-level tokenizer of {vocab_size} tokens cannot be made; it needs at least {_SMALLEST_VOCABULARY} (256 bytes,"
                f" {EOD}, {PAD}); raise model.vocab_size"
            )
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOD, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer=trainer)
        return cls(model)

    def save(self, path: Path) -> TokenizerIdentity:
        """Writes a `tokenizer.json` and returns its identity."""
        with clean_errors("write", path), AtomicFile(path) as file:
            file.write(self._content())
        return self.identity(path.name)

    def _content(self) -> bytes:
        """What `save` writes: a file that was read stays as it is, as another version of the package would write it otherwise."""
        if self._file is None:
            return self._model.to_str(pretty=True).encode()
        path, sha256 = self._file
        with clean_errors("read", path):
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path} has changed since it was read; a data set has one tokenizer; leave the file as it is, and run again")
        return content

    def to_json(self) -> str:
        """As a `tokenizer.json`."""
        return str(self._model.to_str())

    def special_tokens(self) -> list[str]:
        """The spellings of its special tokens, by id."""
        return [token.content for _, token in sorted(self._model.get_added_tokens_decoder().items()) if token.special]

    def spelling(self, index: int) -> str | None:
        """Of the token with this id; None where there is none."""
        return None if index < 0 else self._model.id_to_token(index)

    def identity(self, name: str = TOKENIZER_NAME) -> TokenizerIdentity:
        """Of this tokenizer in a file that `save` writes under this name."""
        return TokenizerIdentity(
            kind="tokenizers",
            file=name,
            sha256=self._file[1] if self._file else hashlib.sha256(self._content()).hexdigest(),
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
            pad_id=self.pad_id,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end of document."""
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """For each text its ids [tokens], without an end of document.

        A long text is encoded in pieces, where those have the ids of the whole, see `exact_cuts`.
        """
        if max(map(len, texts), default=0) > _PIECE:
            return [np.concatenate([self._encode([piece])[0] for piece in self._pieces(text)]) for text in texts]
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[IntArray]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.fromiter(ids, dtype=np.int64, count=len(ids)) for ids in (encoding.ids for encoding in encodings)]

    def _pieces(self, text: str) -> Iterator[str]:
        begin = 0
        while self._cuts and len(text) - begin > _PIECE and (match := self._cuts.search(text, begin + _PIECE)):
            yield text[begin : match.end()]
            begin = match.end()
        yield text[begin:]

    def encode_documents(self, texts: Sequence[str]) -> list[IntArray]:
        """For each text its ids [tokens + 1], the last of which is the end of document."""
        return [np.append(ids, self.eod_id) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """The text of ids; special tokens are left out, and bytes that are not UTF-8 become U+FFFD."""
        return str(self._model.decode([int(index) for index in ids], skip_special_tokens=True))


AnyTokenizer = Tokenizer | ByteTokenizer


def check_tokenizer(folder: Path, identity: TokenizerIdentity) -> None:
    """Checks, without loading it, that the tokenizer of a data set is there: loading a large one takes 0.15 s and 60 MB.

    Raises:
        DataError: Its file is not the one that made the ids, or its kind is unknown.
    """
    if identity.kind == "none":
        return
    if identity.kind == BYTES:
        if listed := identity.difference(ByteTokenizer().identity()):
            raise DataError(f"{folder}: the tokenizer {BYTES} is not the one that is built in ({listed}); prepare the set again")
        return
    if identity.kind != "tokenizers":
        raise DataError(f"{folder}: tokenizer kind is {identity.kind!r}; it must be tokenizers, {BYTES} or none; prepare the set again")
    path = folder / identity.file
    with clean_errors("read", path):
        found = file_sha256(path)
    if found != identity.sha256:
        raise DataError(
            f"{path} is not the tokenizer that made the data set: its sha256 is {found[:12]}, the manifest says {identity.sha256[:12]};"
            " put the right file back, or prepare the data set again"
        )


def load_tokenizer(folder: Path, identity: TokenizerIdentity) -> AnyTokenizer | None:
    """The tokenizer of a data set, or None where it has none.

    Raises:
        DataError: See `check_tokenizer`.
    """
    check_tokenizer(folder, identity)
    if identity.kind == "none":
        return None
    if identity.kind == BYTES:
        return ByteTokenizer()
    return Tokenizer.load(folder / identity.file, eod=identity.eod_id, pad=None if identity.pad_id < 0 else identity.pad_id)
