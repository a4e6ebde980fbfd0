"""A copy of a rank's pieces in host memory, so that a thread can write them while training goes on."""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.rankfile import Piece
from megagate.errors import RunError


class HostCopy:
    """One set of host buffers, one per dtype, reused by every save; page-locked where the pieces lie on a GPU, for its full speed.

    It takes as much host memory as the rank's pieces, from the first copy on.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._held: dict[tuple[str, Shape], Piece] = {}

    @property
    def pieces(self) -> list[Piece]:
        """What was copied last, on the host."""
        return list(self._held.values())

    def take(self, pieces: Iterable[Piece]) -> None:
        """Copy the pieces; what was copied before is overwritten, so nobody may still be reading it.

        Raises:
            RunError: There is not as much host memory.
        """
        pieces = list(pieces)
        self._held = {}
        self._grow(pieces)
        used = dict.fromkeys(self._buffers, 0)
        for piece in pieces:
            dtype, size = piece.tensor.dtype, piece.tensor.numel()
            start = used[dtype]
            used[dtype] = start + size
            target = self._buffers[dtype][start : start + size].view(piece.tensor.shape)
            target.copy_(piece.tensor.detach(), non_blocking=True)
            self._held[piece.name, piece.offset] = Piece(piece.name, piece.full_shape, piece.offset, target)
        for device in {piece.tensor.device for piece in pieces if piece.tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def find(self, name: str, offset: Shape) -> Tensor | None:
        """The piece of the tensor `name` that begins at `offset`, as it was copied; None where none was."""
        piece = self._held.get((name, offset))
        return None if piece is None else piece.tensor

    def _grow(self, pieces: list[Piece]) -> None:
        """Make the buffers large enough; the old ones go first, so that there are never two sets."""
        pinned = any(piece.tensor.device.type == "cuda" for piece in pieces)
        for dtype in {piece.tensor.dtype for piece in pieces}:
            wanted = sum(prod(piece.tensor.shape) for piece in pieces if piece.tensor.dtype == dtype)
            if dtype not in self._buffers or self._buffers[dtype].numel() < wanted:
                self._buffers.pop(dtype, None)
                try:
                    self._buffers[dtype] = torch.empty(wanted, dtype=dtype, pin_memory=pinned)
                except RuntimeError as error:
                    needed, reason = f"{wanted * dtype.itemsize / 1e6:,.0f} MB", str(error).splitlines()[0]
                    raise RunError(
                        f"checkpoint.asynchronous needs {needed} of host memory in this rank for a copy of the state, which are not there "
                        f"({reason}); set --checkpoint.asynchronous false, which writes without a copy, or use more ranks"
                    ) from None
