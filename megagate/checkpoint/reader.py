"""Reading a complete checkpoint: any box of any logical tensor, however the ranks that wrote it had cut it."""

import difflib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from megagate.checkpoint.box import Box, Shape, find_flaw
from megagate.checkpoint.folders import resolve
from megagate.checkpoint.index import Index, StoredPiece, StoredTensor, read_index
from megagate.checkpoint.rankfile import PieceFile
from megagate.errors import CheckpointError

_FEW = 32  # pieces, which are looked at one after the other


class Checkpoint:
    """A complete checkpoint, open for reading; close it, or use it as a context manager. Build it with `open`.

    Args:
        folder: The step folder.
        index: Its index.
        max_open_files: Data files that are kept open at a time.
    """

    def __init__(self, folder: Path, index: Index, *, max_open_files: int) -> None:
        self.folder = folder
        self._index = index
        self._max_open_files = max_open_files
        self._files: OrderedDict[str, PieceFile] = OrderedDict()
        self._ordered: dict[str, tuple[list[StoredPiece], list[int], int]] = {}

    @classmethod
    def open(cls, path: Path, *, max_open_files: int = 16) -> "Checkpoint":
        """Open the checkpoint that `path` means (`resolve`) and check its index, and that every file has its size.

        Raises:
            CheckpointError: there is none, or the index or a file is missing, damaged or truncated.
        """
        folder = resolve(path)
        index = read_index(folder)
        index.contents.require_files(folder)
        return cls(folder, index, max_open_files=max_open_files)

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._index.step

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON values that were given to `publish`."""
        return self._index.metadata

    @property
    def files(self) -> Mapping[str, int]:
        """The bytes of every data file, by its name."""
        return MappingProxyType(self._index.contents.files)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every logical tensor by name: its full shape, dtype and pieces."""
        return MappingProxyType(self._index.contents.tensors)

    def stored(self, name: str) -> StoredTensor:
        """The shape, dtype and pieces of the logical tensor `name`.

        Raises:
            CheckpointError: there is no such tensor.
        """
        tensor = self._index.contents.tensors.get(name)
        if tensor is None:
            nearest = difflib.get_close_matches(name, self._index.contents.tensors, n=1, cutoff=0.0)
            hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}{hint}; it was saved from another model or by another version")
        return tensor

    def read(self, name: str, offset: Shape, out: torch.Tensor) -> None:
        """Fill `out` with the box of the logical tensor `name` that begins at `offset` and has the shape of `out`.

        Streams from the files, on any device, into any strides; only the parts of pieces that overlap the box are read.

        Raises:
            CheckpointError: no such tensor, another dtype, a box that leaves the tensor, or a file that does not hold its pieces.
        """
        stored = self.stored(name)
        wanted = Box(tuple(offset), tuple(out.shape))
        if out.dtype != stored.dtype:
            raise CheckpointError(f"{name} is stored as {stored.dtype}, not {out.dtype}; read it as that and convert it afterwards")
        if not wanted.fits(stored.shape):
            raise CheckpointError(f"{name}: the box {wanted} asked for does not lie in its shape {stored.shape} in {self.folder}")
        target = out.detach()
        found = [(piece, common) for piece in self._near(name, wanted) if (common := piece.box.overlap(wanted)) is not None]
        self._require_each_once(name, wanted, found)
        for piece, common in found:
            source = self._file(piece.file).tensor(name, piece.box, stored.dtype)
            target[common.slices_of(wanted)] = source[common.slices_of(piece.box)]

    def read_whole(self, name: str) -> torch.Tensor:
        """The whole logical tensor `name`, on the CPU.

        Raises:
            CheckpointError: as `read`.
        """
        stored = self.stored(name)
        out = torch.empty(stored.shape, dtype=stored.dtype)
        self.read(name, (0,) * out.dim(), out)
        return out

    def mapped(self, name: str, piece: StoredPiece) -> torch.Tensor:
        """One stored piece of the logical tensor `name` as a view of its file, to read; it takes no memory of the process's own.

        Raises:
            CheckpointError: no such tensor, or the file does not hold the piece.
        """
        dtype = self.stored(name).dtype
        return self._file(piece.file).tensor(name, piece.box, dtype) if piece.box.volume else torch.empty(piece.box.shape, dtype=dtype)

    def verify(self, *, rank: int = 0, world_size: int = 1, names: Collection[str] | None = None) -> int:
        """Digest the bytes on the disk again and compare; rank r of the world takes every world-th piece from the r-th on.

        Args:
            rank: This rank.
            world_size: Ranks that share the work.
            names: The logical tensors to check; None for all.

        Returns:
            The number of pieces that this rank checked.

        Raises:
            CheckpointError: the first damaged piece, by tensor, offset and file.
        """
        wanted = self._index.contents.tensors if names is None else names
        pieces = [(piece, name) for name in wanted for piece in self.stored(name).pieces]
        # By file, so that each is opened once however many there are.
        mine = sorted(pieces, key=lambda item: item[0].file)[rank::world_size]
        for piece, name in mine:
            self.verify_piece(name, piece)
        return len(mine)

    def verify_piece(self, name: str, piece: StoredPiece) -> None:
        """Digest the bytes of one piece of the tensor `name` again.

        Raises:
            CheckpointError: They are not those that were saved.
        """
        actual = self._file(piece.file).digest(name, piece.box, self.stored(name).dtype)
        if actual != piece.digest:
            raise CheckpointError(
                f"{name}, piece at {list(piece.box.offset)} in {self.folder / piece.file}: its bytes have the digest {actual}, "
                f"{piece.digest} was recorded when it was saved; the file is damaged, load another step"
            )

    def close(self) -> None:
        """Close all files."""
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _near(self, name: str, wanted: Box) -> Sequence[StoredPiece]:
        """The pieces of a tensor that may overlap a box: of thousands, those that begin near its first dim's range."""
        pieces = self._index.contents.tensors[name].pieces
        if len(pieces) < _FEW or not wanted.shape:
            return pieces
        if name not in self._ordered:
            ordered = sorted(pieces, key=lambda piece: piece.box.offset[0])
            self._ordered[name] = ordered, [piece.box.offset[0] for piece in ordered], max(piece.box.shape[0] for piece in ordered)
        ordered, starts, longest = self._ordered[name]
        low, size = wanted.offset[0], wanted.shape[0]
        return ordered[bisect_right(starts, low - longest) : bisect_left(starts, low + size)]

    def _require_each_once(self, name: str, wanted: Box, found: Sequence[tuple[StoredPiece, Box]]) -> None:
        """Refuse a box of which the index has no piece, or several, for some element."""
        flaw = find_flaw(wanted.shape, [common.within(wanted) for _, common in found])
        if flaw is not None:
            files = [found[holder][0].file for holder in flaw.holders]
            held = f"{len(files)} pieces (in {', '.join(files[:4])})" if files else "no piece"
            region = Box(tuple(a + b for a, b in zip(flaw.region.offset, wanted.offset, strict=True)), flaw.region.shape)
            raise CheckpointError(
                f"{name}: elements {region} are held by {held} in {self.folder}, each must be held by exactly one; the index is damaged, "
                "load another step"
            )

    def _file(self, name: str) -> PieceFile:
        """The open data file `name`; the one unused for longest is closed when too many are open."""
        if name not in self._files:
            if len(self._files) >= self._max_open_files:
                self._files.popitem(last=False)
            self._files[name] = PieceFile(self.folder / name)
        self._files.move_to_end(name)
        return self._files[name]
