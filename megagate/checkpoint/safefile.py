"""Plain safetensors files: 8 bytes of header length, a JSON header, the data; written in one pass.

That library's own writer would hold a whole file in memory, and need a second pass for digests.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megagate.checkpoint.box import Shape
from megagate.checkpoint.durable import start_writing_back, write_all
from megagate.checkpoint.index import DTYPE_NAMES
from megagate.errors import CheckpointError

CHUNK_BYTES = 1 << 20
"""Bytes that are copied from the device, digested and written at a time: all the memory that writing needs beside its tensors.

What was digested is still in the processor's cache when it is written: with 16 MB the same work took half as long again.
"""

LENGTH_BYTES = 8
"""Of the header's length at the head of a file, little-endian."""
_ALIGNMENT = 8
_MOST_HEADER = 100_000_000  # that library reads no larger ones
_ITEM_SIZES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


class Entry(NamedTuple):
    """One tensor of a file: its key, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: Shape


class Found(NamedTuple):
    """One tensor as a file's header has it: the name of its dtype, its shape, and the range of its bytes behind the header."""

    dtype: str
    shape: Shape
    begin: int
    end: int


class Hasher(Protocol):
    """What digests bytes while they are written."""

    def update(self, data: memoryview, /) -> object:
        """Take the next bytes."""


def encode_header(entries: Iterable[Entry], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a file whose data are the tensors of `entries`, in this order and without gaps; padded so that the data is aligned.

    The format allows no gaps: larger items first keeps every tensor aligned to its item size.

    Args:
        entries: The tensors.
        metadata: Kept as `__metadata__`; by default the `format` "pt" that transformers asks for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for key, dtype, shape in entries:
        end = position + prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def decode_header(content: bytes | mmap.mmap, path: Path, *, remedy: str = "load another step") -> tuple[int, dict[str, Found]]:
    """Where the data of a whole file begins, and its tensors by key; whatever the bytes, in memory of a few times the header.

    Args:
        content: The file.
        path: Its name, for errors.
        remedy: What to do about a damaged one, for errors.

    Raises:
        CheckpointError: The header is no header, or its tensors do not fill the data from the first byte to the last, each byte once.
    """
    length, room = int.from_bytes(content[:LENGTH_BYTES], "little"), len(content) - LENGTH_BYTES
    try:
        if not 0 <= length <= min(room, _MOST_HEADER):
            raise ValueError(f"it is said to have {length} bytes, the file has {max(room, 0)} and {_MOST_HEADER} is the most")
        values = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
        found = {key: _found(entry) for key, entry in values.items() if key != "__metadata__"}
        position = 0
        for key, entry in sorted(found.items(), key=lambda item: item[1][2:]):
            if entry.begin != position:
                raise ValueError(f"{key!r:.200} begins at byte {entry.begin}, what stands before it ends at {position}")
            position = entry.end
        if position != room - length:
            raise ValueError(f"its tensors have {position} bytes, the file {room - length}")
        return LENGTH_BYTES + length, found
    except KeyError as error:
        reason = f"{error} is missing"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise CheckpointError(f"{path}: its header is damaged ({reason}); {remedy}")


def _found(values: Any) -> Found:
    begin, end = values["data_offsets"]
    shape = tuple(values["shape"])
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (begin, end, *shape)):
        raise ValueError(f"a shape {values['shape']!r:.80} and bytes {values['data_offsets']!r:.80} must be whole numbers from 0 on")
    item = _ITEM_SIZES.get(values["dtype"])
    if item is not None and end - begin != prod(shape) * item:
        raise ValueError(f"a tensor of shape {shape} and {values['dtype']} takes {prod(shape) * item} bytes, not {end - begin}")
    return Found(values["dtype"], shape, begin, end)


def write_tensor(descriptor: int, tensor: torch.Tensor, hasher: Hasher | None = None) -> None:
    """Write the elements of `tensor` in row-major order, and give their bytes to `hasher`."""
    for chunk in chunks(tensor.detach()):
        content = memoryview(chunk.view(torch.uint8).numpy())
        if hasher is not None:
            hasher.update(content)
        begin = os.lseek(descriptor, 0, os.SEEK_CUR)
        write_all(descriptor, content)
        start_writing_back(descriptor, begin)


def chunks(tensor: torch.Tensor, limit: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
    """The elements of `tensor`, [...], in row-major order as contiguous 1-D CPU tensors of at most `limit` bytes (or one element).

    What is contiguous and on the CPU is not copied. Anything else goes through one buffer, so a chunk holds until the next is asked for.
    """
    elements = max(1, limit // tensor.element_size())
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        yield from tensor.view(-1).split(elements)
        return
    buffer = torch.empty(min(elements, tensor.numel()), dtype=tensor.dtype)
    for part in _parts(tensor, elements):
        chunk = buffer[: part.numel()]
        chunk.view(part.shape).copy_(part)
        yield chunk


def _parts(tensor: torch.Tensor, elements: int) -> Iterator[torch.Tensor]:
    """Views that give `tensor` in row-major order, each of at most `elements` elements."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(elements)
    elif (row := tensor[0].numel()) > elements:
        for rows in tensor:
            yield from _parts(rows, elements)
    else:
        yield from tensor.split(elements // row)
