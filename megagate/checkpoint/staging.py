"""A copy of a rank's pieces in host memory, so that a thread can write them while training goes on."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.rankfile import Piece
from megagate.errors import RunError

BLOCK_BYTES = 1 << 30
"""Size of a buffer, a power of two: PyTorch rounds every request for page-locked memory up to one (33 GiB at once would take 64)."""

_ALIGN = 64  # bytes, of a cache line, and a multiple of every item size


class HostCopy:
    """Host buffers that every save uses again; page-locked where the pieces lie on a GPU, for its full speed.

    They take as much host memory as the rank's pieces, from the first copy on; page-locked ones up to the next power of two each, which is
    little where most are full. PyTorch keeps page-locked memory that is given up, for its next request.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
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
        places, sizes = place([piece.tensor.nbytes for piece in pieces])
        self._held = {}
        self._grow(sizes, pinned=any(piece.tensor.device.type == "cuda" for piece in pieces))
        for piece, (block, start) in zip(pieces, places, strict=True):
            room = self._blocks[block][start : start + piece.tensor.nbytes]
            target = room.view(piece.tensor.dtype).view(piece.tensor.shape)
            target.copy_(piece.tensor.detach(), non_blocking=True)
            self._held[piece.name, piece.offset] = Piece(piece.name, piece.full_shape, piece.offset, target)
        for device in {piece.tensor.device for piece in pieces if piece.tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def find(self, name: str, offset: Shape) -> Tensor | None:
        """The piece of the tensor `name` that begins at `offset`, as it was copied; None where none was."""
        piece = self._held.get((name, offset))
        return None if piece is None else piece.tensor

    def _grow(self, sizes: list[int], *, pinned: bool) -> None:
        """Make the buffers large enough. One that is not goes before its successor comes, and the rest stay: there are never two sets."""
        for number, size in enumerate(sizes):
            if number < len(self._blocks) and self._blocks[number].numel() >= size:
                continue
            del self._blocks[number : number + 1]
            try:
                self._blocks.insert(number, torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
            except RuntimeError as error:
                needed, reason = f"{sum(sizes) / 1e6:,.0f} MB", str(error).splitlines()[0]
                raise RunError(
                    f"checkpoint.asynchronous needs {needed} of host memory in this rank for a copy of the state, which are not there "
                    f"({reason}); set --checkpoint.asynchronous false, which writes without a copy, or use more ranks"
                ) from None


def place(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Where pieces of so many bytes go: the largest first, each where the first gap is.

    Returns:
        The buffer and the first byte of each, and the bytes of each buffer: at most `BLOCK_BYTES`, or, where one piece is larger, the next
        power of two.
    """
    places, used, room = [(0, 0)] * len(sizes), [], []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = -(-sizes[number] // _ALIGN) * _ALIGN
        block = next((block for block in range(len(used)) if used[block] + size <= room[block]), len(used))
        if block == len(used):
            used.append(0)
            room.append(max(BLOCK_BYTES, 1 << (size - 1).bit_length()))
        places[number] = block, used[block]
        used[block] += size
    return places, used
