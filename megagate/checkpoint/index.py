"""The index of a checkpoint: which logical tensors it holds, and which piece of each lies in which file.

    {"digest": blake3 of the rest, "format": 1, "step": 100, "metadata": {...}, "files": {"rank-00000.safetensors": bytes, ...},
     "tensors": {"master/embed.weight": {"shape": [512, 64], "dtype": "F32", "pieces": [{"file", "offset", "shape", "digest"}, ...]}}}

A piece's key in its file is not stored: `piece_key` gives it.
"""

import json
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

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
_DIGEST_LENGTH = 64
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_MOST_BYTES = 1 << 32
_MOST_ELEMENTS = (1 << 63) - 1

T = TypeVar("T")


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
        """The inverse of `to_json`.

        Raises:
            ValueError: These are not the values of any contents; it says which and why.
        """
        files = {_plain_name(name): _natural(size, name) for name, size in values["files"].items()}
        return cls(files, {name: _stored_tensor(name, tensor, files) for name, tensor in values["tensors"].items()})

    def require_files(self, folder: Path) -> None:
        """Require each file in `folder` to be there and to have its recorded size.

        Raises:
            CheckpointError: the first file that is missing or of another size.
        """
        for name, size in self.files.items():
            path = folder / name
            try:
                found = path.stat()
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is missing, {size} bytes are recorded; restore it or load another step") from error
            except OSError as error:
                raise CheckpointError(f"{path} cannot be reached ({error.strerror}); mend that, or load another step") from error
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is no file, {size} bytes are recorded under that name; restore it or load another step")
            actual = found.st_size
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
        CheckpointError: the index is missing, damaged, of a newer format, or contradicts itself.
    """
    path = folder / INDEX_NAME
    content = read_limited(path, missing=f"{folder} is no complete checkpoint; load another step")
    head, mark, tail = content.partition(_DIGEST_END)
    rest = b"{" + tail
    actual = blake3(rest).hexdigest()
    if not mark or head != _DIGEST_START + actual.encode():
        recorded = head.removeprefix(_DIGEST_START)[:64].decode(errors="replace")
        raise CheckpointError(
            f"{path} is damaged or was edited: its content has the digest {actual}, it records {recorded!r}; load another step"
        )

    def build(values: Any) -> Index:
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {values['format']!r:.40}, and this megagate reads format {FORMAT}; load it with the version that wrote it"
            )
        return _index(values)

    return decode(rest, path, build)


def read_limited(path: Path, *, missing: str) -> bytes:
    """The bytes of a JSON file of a checkpoint.

    Args:
        path: The file.
        missing: What it means that it is not there, and what to do.

    Raises:
        CheckpointError: It is missing, cannot be read, or is larger than any that is written.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, no such file has more than {_MOST_BYTES}; it is damaged, load another step")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {missing}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); mend that, or load another step") from error


def decode(content: bytes, path: Path, build: Callable[[Any], T]) -> T:
    """What `build` makes of the JSON value that `content`, of the file `path`, holds.

    Raises:
        CheckpointError: It is no JSON, or `build` does not take it.
    """
    try:
        return build(json.loads(content))
    except KeyError as error:
        reason = f"{error} is missing"
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = str(error)
    raise CheckpointError(f"{path} is damaged or was edited: {reason}; load another step")


def _index(values: Any) -> Index:
    metadata = values["metadata"]
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata is {metadata!r:.80}, not an object")
    contents = Contents.from_json(values)
    held = dict.fromkeys(contents.files, 0)
    for name, tensor in contents.tensors.items():
        volumes = [piece.box.volume for piece in tensor.pieces]
        # Whether any two overlap, `Checkpoint.read` proves for what it reads.
        if sum(volumes) != prod(tensor.shape):
            raise ValueError(f"the pieces of {name} hold {sum(volumes)} elements, its shape {tensor.shape} has {prod(tensor.shape)}")
        for piece, volume in zip(tensor.pieces, volumes, strict=True):
            held[piece.file] += volume * tensor.dtype.itemsize
    for file, size in contents.files.items():
        if held[file] > size:
            raise ValueError(f"the pieces in {file} have {held[file]} bytes, the file {size}")
    return Index(_natural(values["step"], "step"), metadata, contents)


def _stored_tensor(name: str, values: Any, files: Mapping[str, int]) -> StoredTensor:
    shape = _shape(values["shape"], name)
    if values["dtype"] not in _DTYPES:
        raise ValueError(f"the dtype of {name} is {values['dtype']!r:.80}; this megagate knows {', '.join(_DTYPES)}")
    pieces = []
    for piece in values["pieces"]:
        file, digest = piece["file"], piece["digest"]
        box = Box(_shape(piece["offset"], name), _shape(piece["shape"], name))
        if not box.fits(shape):
            raise ValueError(f"a piece of {name} is {box}, which does not lie in its shape {shape}")
        if file not in files:
            raise ValueError(f"a piece of {name} lies in {file!r:.80}, which is not among the files")
        if not isinstance(digest, str) or len(digest) != _DIGEST_LENGTH:
            raise ValueError(f"a piece of {name} has the digest {digest!r:.80}; digests have {_DIGEST_LENGTH} characters")
        pieces.append(StoredPiece(file, box, digest))
    return StoredTensor(shape, _DTYPES[values["dtype"]], tuple(pieces))


def _shape(values: Any, name: str) -> Shape:
    shape = tuple(values)
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MOST_ELEMENTS:
            raise ValueError(f"{name} has {values!r:.80} for a shape or an offset; it must be a list of whole numbers from 0 on")
    if prod(max(1, size) for size in shape) > _MOST_ELEMENTS:
        raise ValueError(f"{name} has the shape {values!r:.80}, larger than any tensor")
    return shape


def _natural(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_ELEMENTS:
        raise ValueError(f"{what} is {value!r:.80}, and must be a whole number from 0 on")
    return value


def _plain_name(name: str) -> str:
    """A file's name, which must not lead out of the folder."""
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"it names the file {name!r:.80}; files of a checkpoint lie in its folder, their names are letters, digits, . _ -")
    return name
