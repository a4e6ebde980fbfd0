"""Flat ranges of sharded tensors as boxes, so that what ZeRO cuts anywhere is saved and loaded as ordinary pieces.

An optimizer that shards its state flattens the rank's local shard and gives each data-parallel rank a range of it. Such a range of
a row-major n-D tensor is at most 2n - 1 boxes, and each is contiguous *in the range*, hence a view: no padding, no gather, no copy.
"""

from collections.abc import Iterator
from math import prod

import torch

from megagate.checkpoint.box import Box, Shape
from megagate.checkpoint.rankfile import Piece
from megagate.checkpoint.reader import Checkpoint
from megagate.errors import CheckpointError


def boxes(shape: Shape, start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a row-major tensor of `shape`, as boxes in their order.

    Returns:
        At most max(1, 2n - 1) boxes for n dims; one after the other they enumerate the range. None for an empty range.

    Raises:
        CheckpointError: the range leaves the tensor.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise CheckpointError(f"the flat range [{start}, {stop}) does not lie in a tensor of shape {shape} with {prod(shape)} elements")
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _in_row(shape, first, start - first * row, stop - first * row)
    head = [] if start == first * row else _in_row(shape, first, start - first * row, row)
    tail = [] if stop == (last + 1) * row else _in_row(shape, last, 0, stop - last * row)
    low, high = first + bool(head), last + 1 - bool(tail)
    body = [Box((low,) + (0,) * (len(shape) - 1), (high - low,) + tuple(shape[1:]))] if low < high else []
    return head + body + tail


def flat_pieces(name: str, *, full_shape: Shape, shard_offset: Shape, shard_shape: Shape, start: int, flat: torch.Tensor) -> list[Piece]:
    """The pieces of a flat fragment of a rank's shard.

    Args:
        name: The logical tensor.
        full_shape: Its shape.
        shard_offset: Where the rank's shard, a box, begins in it.
        shard_shape: Shape of the shard.
        start: Position of the fragment's first element in the flattened shard.
        flat: The fragment, [elements], without the optimizer's padding; the pieces are views of it.

    Raises:
        CheckpointError: the fragment leaves the shard, or the shard the tensor.
    """
    return [
        Piece(name, full_shape, box.offset, view)
        for box, view in _fragment(name, full_shape=full_shape, shard=Box(tuple(shard_offset), tuple(shard_shape)), start=start, flat=flat)
    ]


def read_flat(
    checkpoint: Checkpoint, name: str, *, full_shape: Shape, shard_offset: Shape, shard_shape: Shape, start: int, flat: torch.Tensor
) -> None:
    """Fill a flat fragment of a rank's shard in place; the inverse of `flat_pieces`, under any layout.

    Args:
        checkpoint: Where to read.
        name: The logical tensor.
        full_shape: Its shape in this run.
        shard_offset: Where the rank's shard, a box, begins in it.
        shard_shape: Shape of the shard.
        start: Position of the fragment's first element in the flattened shard.
        flat: The fragment to fill, [elements], without the optimizer's padding.

    Raises:
        CheckpointError: the checkpoint's tensor has another shape or dtype, or the fragment leaves the shard.
    """
    stored = checkpoint.stored(name).shape
    if stored != tuple(full_shape):
        raise CheckpointError(
            f"{name} has the shape {stored} in {checkpoint.folder} and {tuple(full_shape)} in this run, so it is of another model; "
            "start with the model's own config"
        )
    for box, view in _fragment(name, full_shape=full_shape, shard=Box(tuple(shard_offset), tuple(shard_shape)), start=start, flat=flat):
        checkpoint.read(name, box.offset, view)


def _fragment(name: str, *, full_shape: Shape, shard: Box, start: int, flat: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Each box of the full tensor that a fragment holds, and the view of the fragment that holds it."""
    if flat.dim() != 1 or start < 0 or start + flat.numel() > shard.volume or not shard.fits(tuple(full_shape)):
        raise CheckpointError(
            f"{name}: a fragment of shape {tuple(flat.shape)} from element {start} on does not lie in the shard {shard} ({shard.volume} "
            f"elements) of the full shape {tuple(full_shape)}; give it 1-D and without padding"
        )
    flat = flat.detach()
    position = 0
    for box in boxes(shard.shape, start, start + flat.numel()):
        offset = tuple(a + b for a, b in zip(shard.offset, box.offset, strict=True))
        yield Box(offset, box.shape), flat[position : position + box.volume].view(box.shape)
        position += box.volume


def _in_row(shape: Shape, row: int, start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of one row of a tensor of `shape`."""
    return [Box((row, *box.offset), (1, *box.shape)) for box in boxes(shape[1:], start, stop)]
