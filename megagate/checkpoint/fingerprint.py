"""The fingerprint of a state: one 64-bit number per logical tensor, the same under every layout, on every device, at every moment.

Of a tensor with the bits b (each element as a whole number of its width) at the indices i:

    sum over i of b[i] * product over dims d of weight(d, i[d])   modulo 2^64,   weight(d, n) = splitmix64 of (d, n), made odd

An odd number has an inverse modulo 2^64, and so has a product of odd ones: that one element changes always shows. Two that are swapped, or
more that change, show but for an accident, of about 2^-32 and less. As weights depend on the *global* index alone, the sums of pieces add
up to that of the tensor, however it is cut: ranks join theirs by one sum of whole numbers, which is exact. It is no digest: it finds
mistakes, and does not resist an adversary.

Source: splitmix64, Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.rankfile import Piece
from megagate.errors import CheckpointError

FINGERPRINT = "fingerprint"
"""The key in a checkpoint's metadata: {tensor: 16 hexadecimal digits}."""

CHUNK_ELEMENTS = 1 << 18
"""Elements that are summed at a time: all the memory, times 8 bytes (a few more where rows are short), that it takes."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD = 1 << 64


def piece_sum(tensor: Tensor, offset: Shape) -> Tensor:
    """What a box of a logical tensor adds to its fingerprint.

    Args:
        tensor: Its elements; a strided one is copied.
        offset: Where the box begins.

    Returns:
        Tensor: [] int64 on the same device; it has wrapped.
    """
    shape = tuple(tensor.shape) or (1,)
    width = shape[-1]
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()]).view(-1, max(1, width))  # [rows, width]
    found = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for left in range(0, width, CHUNK_ELEMENTS):
        right = min(width, left + CHUNK_ELEMENTS)
        columns = _columns(offset, left, right, tensor.device)
        rows = max(1, CHUNK_ELEMENTS // (right - left))
        for top in range(0, len(bits), rows):
            part = bits[top : top + rows, left:right].to(torch.int64, copy=True).mul_(columns).sum(1)  # [rows]
            found += (part * _rows(shape, offset, top, len(part), tensor.device)).sum()
    return found


def sums(pieces: Iterable[Piece], names: Sequence[str]) -> Tensor:
    """What pieces add to the fingerprint of each tensor, [names] int64 on the CPU.

    Raises:
        CheckpointError: A piece is of none of them.
    """
    place = {name: number for number, name in enumerate(names)}
    found: dict[torch.device, Tensor] = {}
    for piece in pieces:
        if piece.name not in place:
            raise CheckpointError(f"{piece.name} is a piece of the state that the engine does not name; all ranks must know all names")
        device = piece.tensor.device
        into = found.setdefault(device, torch.zeros(len(place), dtype=torch.int64, device=device))
        into[place[piece.name]] += piece_sum(piece.tensor, piece.offset)
    total = torch.zeros(len(place), dtype=torch.int64)
    for one in found.values():
        total += one.cpu()
    return total


def digits(number: int) -> str:
    """A sum as it stands in the metadata."""
    return f"{number % _WORD:016x}"


def recorded(metadata: Mapping[str, Any]) -> dict[str, str] | None:
    """The fingerprint that a checkpoint was saved with; None where nobody took one.

    Raises:
        CheckpointError: It is none.
    """
    found = metadata.get(FINGERPRINT)
    if found is None:
        return None
    if not isinstance(found, Mapping) or not all(isinstance(one, str) for one in found.values()):
        raise CheckpointError(f"{FINGERPRINT} in the index is {found!r:.80}; it must give 16 hexadecimal digits by tensor; load another")
    return dict(found)


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The tensors of which one of the two has no fingerprint or another one, by name."""
    return sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))


def _columns(offset: Shape, left: int, right: int, device: torch.device) -> Tensor:
    """[right - left]: the weights of the last dim; those of a 0-d tensor's one element are 1."""
    if not offset:
        return torch.ones(right - left, dtype=torch.int64, device=device)
    return _weights(len(offset) - 1, torch.arange(offset[-1] + left, offset[-1] + right, device=device))


def _rows(shape: Shape, offset: Shape, top: int, count: int, device: torch.device) -> Tensor:
    """[count]: the products of the weights of all dims but the last, for the rows from `top` on of the box in its row-major order."""
    row = torch.arange(top, top + count, device=device)
    weights = torch.ones(count, dtype=torch.int64, device=device)
    for dim in range(len(shape) - 1):
        below = prod(shape[dim + 1 : -1])
        weights *= _weights(dim, row // below % shape[dim] + offset[dim])
    return weights


def _weights(dim: int, index: Tensor) -> Tensor:
    """splitmix64 of (dim, index), odd; int64, which wraps."""
    mixed = index * _signed(0x9E3779B97F4A7C15) + _signed((dim + 1) * 0xD1342543DE82EF95)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(x: Tensor, by: int) -> Tensor:
    """`x` shifted right as if it had no sign."""
    return (x >> by) & ((1 << 64 - by) - 1)


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    number %= _WORD
    return number - _WORD if number >= _WORD >> 1 else number
