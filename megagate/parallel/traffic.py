"""What one rank sends: a recorder that a mesh may be given, and the bytes that each kind of collective costs."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce"]


class Sent(NamedTuple):
    """Calls of collectives, and the bytes that this rank must send for them."""

    calls: int = 0
    bytes: int = 0

    def plus(self, other: "Sent") -> "Sent":
        """The sum of both."""
        return Sent(self.calls + other.calls, self.bytes + other.bytes)


class Largest(NamedTuple):
    """The largest tensor of a kind of collective: of an all-gather what was gathered, else what was given."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def bytes_sent(kind: Kind, nbytes: int, size: int) -> int:
    """Bytes that one of `size` ranks sends in one collective with an optimal algorithm, as a mean over the ranks, in whole bytes.

    all_gather: nbytes * (size - 1); reduce_scatter: nbytes * (size - 1) / size; all_reduce: twice that, a reduce-scatter and an
    all-gather; all_to_all, broadcast and reduce: nbytes.

    Args:
        kind: Of collective.
        nbytes: Bytes of the tensor that this rank gives. all_to_all: of the rows for other ranks; broadcast: of the tensor on the first
            rank, 0 elsewhere; reduce: of the tensor, 0 on the rank that receives.
        size: Ranks of the axis.

    Source: Thakur, Rabenseifner and Gropp (2005), "Optimization of Collective Communication Operations in MPICH", sections 4.1, 4.3, 4.5.
    """
    match kind:
        case "all_gather":
            return nbytes * (size - 1)
        case "reduce_scatter":
            return -(-nbytes * (size - 1) // size)
        case "all_reduce":
            return -(-2 * nbytes * (size - 1) // size)
        case _:
            return nbytes


class Traffic:
    """What one rank sent since the last `clear`: every tensor collective of `parallel/comm.py`, backward passes included.

    `gather_objects` and `barrier` carry no tensors of a step and are left out.

    Attributes:
        sent: By (axis, kind, what); `what` is the function that sent.
        largest: By kind, the tensor with most elements.
    """

    def __init__(self) -> None:
        self.sent: dict[tuple[str, Kind, str], Sent] = {}
        self.largest: dict[Kind, Largest] = {}

    def add(self, axis: str, kind: Kind, what: str, x: Tensor, *, size: int, nbytes: int | None = None) -> None:
        """Record one collective.

        Args:
            axis: Name of the axis.
            kind: Of collective.
            what: Who sent.
            x: The tensor that this rank gives.
            size: Ranks of the axis.
            nbytes: As in `bytes_sent`; None: all of `x`.
        """
        key, sent = (axis, kind, what), bytes_sent(kind, x.nbytes if nbytes is None else nbytes, size)
        self.sent[key] = self.sent.get(key, Sent()).plus(Sent(1, sent))
        tensor = Largest((size, *x.shape) if kind == "all_gather" else tuple(x.shape), x.dtype)
        if kind not in self.largest or _elements(tensor) > _elements(self.largest[kind]):
            self.largest[kind] = tensor

    def clear(self) -> None:
        """Begin again."""
        self.sent.clear()
        self.largest.clear()

    def by_axis(self, names: Mapping[str, str] | None = None) -> dict[tuple[str, Kind], Sent]:
        """Sums over `what`.

        Args:
            names: Another name for an axis, where several axes are one group of ranks (`verify/wire.py`).
        """
        sums: dict[tuple[str, Kind], Sent] = {}
        for (axis, kind, _), sent in self.sent.items():
            key = (axis if names is None else names[axis], kind)
            sums[key] = sums.get(key, Sent()).plus(sent)
        return sums


def _elements(tensor: Largest) -> int:
    return torch.Size(tensor.shape).numel()
