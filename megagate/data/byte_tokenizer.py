"""The tokenizer `bytes`: ids 0 to 255 are the bytes of UTF-8, 256 ends a document, 257 fills rows. It has no file and nothing to learn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagate.data.hashing import IntArray
from megagate.data.manifest import TokenizerIdentity

BYTES = "bytes"
_EOD_ID = 256
_PAD_ID = 257


class ByteTokenizer:
    """Text to bytes and back; the same members as `tokenizer.Tokenizer`.

    Attributes:
        vocab_size: 258.
        eod_id: 256, appended to each document.
        pad_id: 257.
    """

    vocab_size = 258
    eod_id = _EOD_ID
    pad_id = _PAD_ID

    def save(self, path: Path) -> TokenizerIdentity:
        """Its identity; there is nothing to write at `path`."""
        return self.identity(path.name)

    def identity(self, name: str = "") -> TokenizerIdentity:
        """Of this tokenizer, which has no file and no use for a name."""
        del name
        return TokenizerIdentity(kind=BYTES, file="", sha256="", vocab_size=self.vocab_size, eod_id=_EOD_ID, pad_id=_PAD_ID)

    def encode(self, text: str) -> list[int]:
        """Bytes of a text, without an end of document."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
        """For each text its bytes, without an end of document."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def encode_documents(self, texts: Sequence[str]) -> list[IntArray]:
        """For each text its ids [bytes + 1], the last of which is the end of document."""
        return [np.append(ids.astype(np.int64), _EOD_ID) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """The text of ids; ends and padding are left out, and bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(index) for index in ids if int(index) < _EOD_ID).decode(errors="replace")
