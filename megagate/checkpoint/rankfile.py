"""What one rank writes: its pieces of logical tensors as one safetensors file, digested while they are written, and a manifest.

The file is plain safetensors, so any safetensors reader opens it.
"""

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from megagate.checkpoint.box import Box, Shape
from megagate.checkpoint.durable import create, explaining, write_all, write_file
from megagate.checkpoint.index import DTYPE_NAMES, Contents, StoredPiece, StoredTensor, decode, piece_key, read_limited
from megagate.checkpoint.safefile import CHUNK_BYTES, Entry, decode_header, encode_header, write_tensor
from megagate.errors import CheckpointError

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has no name for it before 3.13


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of a logical tensor, as one rank holds it.

    Args:
        name: The logical tensor, such as `exp_avg/layers.0.attention.q.weight`.
        full_shape: Shape of the whole logical tensor.
        offset: Where the box begins in it, one number per dim.
        tensor: The elements, of the box's shape, on any device; may be a view. It is read when it is written, not before.

    Raises:
        CheckpointError: the box does not lie in the tensor, or the store does not hold the dtype.
    """

    name: str
    full_shape: Shape
    offset: Shape
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_shape", tuple(self.full_shape))
        object.__setattr__(self, "offset", tuple(self.offset))
        if not self.box.fits(self.full_shape):
            raise CheckpointError(
                f"{self.name}: a piece of shape {self.box.shape} at offset {self.offset} does not lie in the full shape {self.full_shape}"
            )
        if self.tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{self.name}: {self.tensor.dtype} cannot be saved; the store holds {', '.join(map(str, DTYPE_NAMES))}")

    @property
    def box(self) -> Box:
        """The elements of the logical tensor that the piece holds."""
        return Box(self.offset, tuple(self.tensor.shape))


def rank_file(rank: int) -> str:
    """The name of the data file of `rank`."""
    return f"rank-{rank:05d}.safetensors"


def manifest_path(directory: Path, rank: int) -> Path:
    """Where `rank` says what it wrote; its presence means that the data file is whole and on the disk."""
    return directory / f"rank-{rank:05d}.json"


def write_rank(directory: Path, rank: int, pieces: Iterable[Piece]) -> None:
    """Write the pieces of one rank into the folder that `begin` made; the manifest last.

    Uses no collective and, beside the pieces, at most `CHUNK_BYTES` of memory, so it may run in a thread. Pieces without elements
    of a tensor that has some are left out. When it fails it removes its own files. The folder stays, since other ranks may yet begin
    to write into it; who knows that all are through calls `discard`.

    Raises:
        CheckpointError: two pieces begin at the same offset of one tensor, or disagree on its shape or dtype.
        RunError: no space or no permission.
    """
    # Larger items first: the format allows no gaps, and this keeps every piece aligned to its item size.
    ordered = sorted(
        (piece for piece in pieces if piece.box.volume or 0 in piece.full_shape),
        key=lambda piece: (-piece.tensor.element_size(), piece.name, piece.offset),
    )
    tensors = _group(ordered)
    header = encode_header(Entry(piece_key(piece.name, piece.box), piece.tensor.dtype, piece.box.shape) for piece in ordered)
    size = len(header) + sum(piece.tensor.nbytes for piece in ordered)
    path, manifest = directory / rank_file(rank), manifest_path(directory, rank)
    try:
        with explaining(path, size), create(path) as descriptor:
            write_all(descriptor, memoryview(header))
            for piece in ordered:
                hasher = blake3()
                write_tensor(descriptor, piece.tensor, hasher)
                tensors[piece.name].append(StoredPiece(path.name, piece.box, hasher.hexdigest()))
        first = {piece.name: piece for piece in ordered}
        stored = {name: StoredTensor(first[name].full_shape, first[name].tensor.dtype, tuple(tensors[name])) for name in tensors}
        write_file(manifest, json.dumps(Contents({path.name: size}, stored).to_json(), separators=(",", ":")).encode())
    except BaseException:
        for file in (manifest, path):
            file.unlink(missing_ok=True)
        raise


def read_manifest(path: Path) -> Contents:
    """What the manifest `path` says that its rank wrote.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    return decode(read_limited(path, missing="its rank has not finished; save again"), path, Contents.from_json)


class PieceFile:
    """One data file, open for reading: memory-mapped, so that reading costs file cache and no memory of the process's own.

    There is no `close`: the mapping goes when the last reference to it does. Tensors refer to it without locking it, and to unmap it
    under one that is still alive (in the traceback of an error, say) would crash the process.

    Raises:
        CheckpointError: the file cannot be read, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                # Private and writable, since torch warns about read-only ones, though nothing is ever written to it; without a reserve
                # of memory for such writes, which the kernel would refuse for a file larger than the machine's memory.
                self._bytes = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped, which is a ValueError
            raise CheckpointError(f"{path} cannot be read ({error}); mend that, or load another step") from error
        self._start, self._entries = decode_header(self._bytes, path)

    def span(self, name: str, box: Box, dtype: torch.dtype) -> tuple[int, int]:
        """The range of bytes in the file that holds a piece.

        Raises:
            CheckpointError: the file's header says otherwise than the index.
        """
        entry = self._entries.get(piece_key(name, box))
        if entry is None or entry[:2] != (DTYPE_NAMES[dtype], box.shape):
            there = "no such tensor" if entry is None else f"{entry.dtype} and {list(entry.shape)}"
            raise CheckpointError(
                f"{name}, piece at {list(box.offset)} in {self._path}: the file's header has {there}, the index {DTYPE_NAMES[dtype]} and "
                f"{list(box.shape)}; the file is damaged, load another step"
            )
        return self._start + entry.begin, self._start + entry.end

    def tensor(self, name: str, box: Box, dtype: torch.dtype) -> torch.Tensor:
        """A piece with at least one element as a tensor of `box.shape` on the mapped file."""
        begin, _ = self.span(name, box, dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=box.volume, offset=begin).view(box.shape)

    def digest(self, name: str, box: Box, dtype: torch.dtype) -> str:
        """The blake3 digest, hexadecimal, of a piece's bytes as they are on the disk now."""
        begin, end = self.span(name, box, dtype)
        hasher = blake3()
        with memoryview(self._bytes) as content:
            for start in range(begin, end, CHUNK_BYTES):
                with content[start : min(start + CHUNK_BYTES, end)] as chunk:
                    hasher.update(chunk)
        return hasher.hexdigest()


def _group(pieces: list[Piece]) -> dict[str, list[StoredPiece]]:
    """An empty list for each tensor, after a check that its pieces agree."""
    kinds: dict[str, tuple[Shape, torch.dtype]] = {}
    keys: set[str] = set()
    for piece in pieces:
        kind = (piece.full_shape, piece.tensor.dtype)
        if kinds.setdefault(piece.name, kind) != kind:
            raise CheckpointError(f"{piece.name}: pieces of one rank give it the shape and dtype {kinds[piece.name]} and {kind}; give one")
        key = piece_key(piece.name, piece.box)
        if key in keys:
            raise CheckpointError(f"{piece.name}: two pieces of one rank begin at {list(piece.offset)}; each element is given once")
        keys.add(key)
    return {name: [] for name in kinds}
