"""Plain safetensors files, written in one pass: 8 bytes of header length, a JSON header, the data.

That library's own writer would hold a whole file in memory, and need a second pass for digests.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

import torch

from megagate.checkpoint.box import Shape
from megagate.checkpoint.durable import start_writing_back, write_all
from megagate.checkpoint.index import DTYPE_NAMES

CHUNK_BYTES = 1 << 20
"""Bytes that are copied from the device, digested and written at a time: all the memory that writing needs beside its tensors.

What was digested is still in the processor's cache when it is written: with 16 MB the same work took half as long again.
"""

LENGTH_BYTES = 8
"""Of the header's length at the head of a file, little-endian."""
_ALIGNMENT = 8


class Entry(NamedTuple):
    """One tensor of a file: its key, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: Shape


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
