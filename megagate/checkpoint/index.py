"""The index of a checkpoint: which logical tensors it holds, and which piece of each lies in which file.

    {"digest": blake3 of the rest, "format": 1, "step": 100, "metadata": {...}, "files": {"rank-00000.safetensors": bytes, ...},
     "tensors": {"master/embed.weight": {"shape": [512, 64], "dtype": "F32", "pieces": [{"file", "offset", "shape", "digest"}, ...]}}}

A piece's key in its file is not stored: `piece_key` gives it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from megagate.checkpoint.box import Box, Shape
from megagate.checkpoint.folders import INDEX_NAME
from megagate.errors import CheckpointError

FORMAT = 1

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Every dtype that the store holds, by its safetensors name."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_DIGEST_START = b'{"digest":"'
_DIGEST_END = b'",'


@dataclass(frozen=True)
class StoredPiece:
    """One box of a logical tensor on the disk.

    Args:
        file: Name of the file in the step folder.
        box: Which elements of the logical tensor.
        digest: blake3 of its bytes, hexadecimal.
    """

    file: str
    box: Box
    digest: str


@dataclass(frozen=True)
class StoredTensor:
    """One logical tensor: its full shape, its dtype and the pieces that hold it."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True)
class Contents:
    """What a set of files holds: their sizes in bytes, and the logical tensors whose pieces lie in them."""

    files: dict[str, int]
    tensors: dict[str, StoredTensor]

    def to_json(self) -> dict[str, Any]:
        """JSON values, sorted so that equal contents give equal bytes."""
        return {
            "files": dict(sorted(self.files.items())),
            "tensors": {
                name: {
                    "shape": tensor.shape,
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "pieces": [
                        {"file": piece.file, "offset": piece.box.offset, "shape": piece.box.shape, "digest": piece.digest}
                        for piece in sorted(tensor.pieces, key=lambda piece: (piece.file, piece.box))
                    ],
                }
                for name, tensor in sorted(self.tensors.items())
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Contents":
        """The inverse of `to_json`."""
        return cls(
            files=dict(values["files"]),
            tensors={
                name: StoredTensor(
                    shape=tuple(tensor["shape"]),
                    dtype=_DTYPES[tensor["dtype"]],
                    pieces=tuple(
                        StoredPiece(piece["file"], Box(tuple(piece["offset"]), tuple(piece["shape"])), piece["digest"])
                        for piece in tensor["pieces"]
                    ),
                )
                for name, tensor in values["tensors"].items()
            },
        )

    def require_files(self, folder: Path) -> None:
        """Require each file in `folder` to be there and to have its recorded size.

        Raises:
            CheckpointError: the first file that is missing or of another size.
        """
        for name, size in self.files.items():
            path = folder / name
            try:
                actual = path.stat().st_size
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is missing, {size} bytes are recorded; restore it or load another step") from error
            if actual != size:
                raise CheckpointError(f"{path} has {actual} bytes, {size} are recorded: it was cut or changed; load another step")


@dataclass(frozen=True)
class Index:
    """The content of a complete checkpoint: the step, the caller's own JSON values, and the tensors."""

    step: int
    metadata: dict[str, Any]
    contents: Contents


def piece_key(name: str, box: Box) -> str:
    """The name of a piece in its safetensors file, such as `master/embed.weight@0,32`."""
    return f"{name}@{','.join(map(str, box.offset))}"


def encode_index(index: Index) -> bytes:
    """The bytes of an index file; the digest at their head is that of all that follows it.

    Raises:
        CheckpointError: the metadata is not JSON.
    """
    values = {"format": FORMAT, "step": index.step, "metadata": index.metadata, **index.contents.to_json()}
    try:
        rest = b"{" + json.dumps(values, separators=(",", ":")).encode()[1:]
    except TypeError as error:
        raise CheckpointError(f"metadata of step {index.step} is not JSON ({error}); give dicts, lists, strings, numbers only") from error
    return _DIGEST_START + blake3(rest).hexdigest().encode() + _DIGEST_END + rest[1:]


def read_index(folder: Path) -> Index:
    """Read and check the index of the step folder `folder`.

    Raises:
        CheckpointError: the index is missing, damaged, or of a newer format.
    """
    path = folder / INDEX_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} is no complete checkpoint; load another step") from error
    head, mark, tail = content.partition(_DIGEST_END)
    rest = b"{" + tail
    actual = blake3(rest).hexdigest()
    if not mark or head != _DIGEST_START + actual.encode():
        recorded = head.removeprefix(_DIGEST_START)[:64].decode(errors="replace")
        raise CheckpointError(
            f"{path} is damaged or was edited: its content has the digest {actual}, it records {recorded!r}; load another step"
        )
    values = json.loads(rest)
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {values['format']}, and this megagate reads format {FORMAT}; load it with the version that wrote it"
        )
    return Index(values["step"], values["metadata"], Contents.from_json(values))
