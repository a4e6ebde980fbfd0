"""What the process really sends: every collective as PyTorch hands it to a process group, whoever asks for it, backward passes included."""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagate.model.lm import LanguageModel, LossParts
from megagate.parallel.comm import all_to_all
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.traffic import Kind, Traffic

AXES = ("tp", "dp", "ep", "edp", "world")
SENDERS = ("megagate", "deepspeed", "transformer_engine")
"""Packages that may send: a collective counts for the nearest caller's module in one of them, or for `other`."""
NAMESPACES = ("c10d", "_c10d_functional")
IGNORED = ("barrier", "monitored_barrier_")
"""They carry no tensor."""


class _Operator(NamedTuple):
    """How to read a c10d operator's arguments: what this rank gives, the group, and, for some kinds, the bytes that leave this rank."""

    kind: Kind
    given: int
    group: int
    leaving: Callable[[Any, int, int], int] | None = None


def _rows_for_others(args: Any, rank: int, size: int) -> int:
    """alltoall_base_(output, input, group, output_splits, input_splits): no splits, equal ones."""
    x, rows = args[1], args[4] or [len(args[1]) // size] * size
    return x.element_size() * x.shape[1:].numel() * (sum(rows) - rows[rank])


def _tensors_for_others(args: Any, rank: int, size: int) -> int:
    """alltoall_(outputs, inputs, group): one tensor per rank."""
    return sum(x.nbytes for other, x in enumerate(args[1]) if other != rank)


def _from_root(args: Any, rank: int, size: int) -> int:
    """broadcast_(tensors, group, root)."""
    return sum(x.nbytes for x in args[0]) if rank == args[2] else 0


def _to_root(args: Any, rank: int, size: int) -> int:
    """reduce_(tensors, group, operation, root)."""
    return sum(x.nbytes for x in args[0]) if rank != args[3] else 0


OPERATORS = {
    "allreduce_": _Operator("all_reduce", 0, 1),
    "allreduce_coalesced_": _Operator("all_reduce", 0, 1),
    "allgather_": _Operator("all_gather", 1, 2),
    "_allgather_base_": _Operator("all_gather", 1, 2),
    "allgather_coalesced_": _Operator("all_gather", 1, 2),
    "allgather_into_tensor_coalesced_": _Operator("all_gather", 1, 2),
    "reduce_scatter_": _Operator("reduce_scatter", 1, 2),
    "_reduce_scatter_base_": _Operator("reduce_scatter", 1, 2),
    "reduce_scatter_tensor_coalesced_": _Operator("reduce_scatter", 1, 2),
    "alltoall_base_": _Operator("all_to_all", 1, 2, _rows_for_others),
    "alltoall_": _Operator("all_to_all", 1, 2, _tensors_for_others),
    "broadcast_": _Operator("broadcast", 0, 1, _from_root),
    "reduce_": _Operator("reduce", 0, 1, _to_root),
}


class WireCounter(TorchDispatchMode):
    """Counts, while it is entered, every collective of this thread and of the backward passes it starts.

    It stands below everything that sends, DeepSpeed included, and knows ranks, not axes: axes that are the same group of ranks go under
    one name (`axis_names`). An operator that it does not know is an error, so that nothing is left out.

    Attributes:
        traffic: By (joined axes, kind, module that sent).

    Example:
        with WireCounter(mesh) as wire:
            engine.train_step(tokens, labels, lr=lr)
        wire.traffic.by_axis()
    """

    def __init__(self, mesh: ParallelMesh):
        super().__init__()
        self.traffic = Traffic()
        names = axis_names(mesh)
        self._names = {getattr(mesh, axis).ranks: name for axis, name in names.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do."""
        if func.namespace in NAMESPACES:
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in IGNORED:
            return
        if name not in OPERATORS:
            raise NotImplementedError(f"the wire counter does not know the collective {name}; add it to OPERATORS in {__name__}")
        operator = OPERATORS[name]
        group = dist.ProcessGroup.unbox(args[operator.group])
        ranks, given = tuple(dist.get_process_group_ranks(group)), list(_tensors(args[operator.given]))
        nbytes = sum(x.nbytes for x in given) if operator.leaving is None else operator.leaving(args, group.rank(), len(ranks))
        axis = self._names.get(ranks, f"ranks {','.join(map(str, ranks))}")
        # Several tensors of one call go as one.
        largest = max(given, key=Tensor.numel)
        self.traffic.add(axis, operator.kind, _sender(sys._getframe(1)), largest, size=len(ranks), nbytes=nbytes)


def axis_names(mesh: ParallelMesh) -> dict[str, str]:
    """Of each axis, the names of all axes that are the same group of ranks, joined: tp, or tp=ep=world."""
    ranks = {axis: getattr(mesh, axis).ranks for axis in AXES}
    return {axis: "=".join(other for other in AXES if ranks[other] == ranks[axis]) for axis in AXES}


class RoutedRows:
    """Counts the rows that a model's routers send from this rank to each rank of the expert axis, until `close`.

    It looks at the statistics that a forward pass returns, so a recomputed pass does not count again.
    """

    def __init__(self, model: LanguageModel, ep: Axis):
        self.ep = ep
        self._rows: list[Tensor] = []  # [ep] per layer and forward pass
        self.close = model.register_forward_hook(self._look).remove

    def _look(self, model: LanguageModel, args: Any, parts: Any) -> None:
        if isinstance(parts, LossParts):
            self._rows += [stats.counts.detach().sum(0).view(self.ep.size, -1).sum(1) for stats in parts.stats]

    def exchange(self) -> tuple[int, int]:
        """Rows for other ranks and rows from other ranks so far. Collective over the axis: call it when other counters are done."""
        if not self._rows:
            return 0, 0
        rows, ones = torch.stack(self._rows).sum(0).long(), [1] * self.ep.size
        arriving = all_to_all(rows, self.ep, send=ones, receive=ones)
        return tuple(int(counts.sum() - counts[self.ep.rank]) for counts in (rows, arriving))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _sender(frame: FrameType | None) -> str:
    """The nearest module of `SENDERS` on the stack, this one apart."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] in SENDERS:
            return module
        frame = frame.f_back
    return "other"
