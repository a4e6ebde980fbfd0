"""Every tensor collective, each a pure function of (tensor, axis).

No collective writes to its input: autograd may have saved it, and an in-place sum would give silently wrong gradients. On an axis of
size 1 each function returns its input at once.

Two adjoint functions serve all dense layers: `enter` goes from replicated (or sequence-sharded) to tensor-parallel, `leave` goes back.

Where the axis has a recorder, each collective reports what it sends, right where it is sent (`gather_objects` and `barrier` do not).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megagate.parallel.mesh import Axis


def enter(x: Tensor, axis: Axis, dim: int | None = None) -> Tensor:
    """Enter a parallel region. Adjoint of `leave`.

    Args:
        x: Replicated over `axis` where `dim` is None, else this rank's shard along `dim`.
        axis: The mesh axis.
        dim: None: identity forward, sum backward. A dimension: all-gather forward, reduce-scatter backward.

    Returns:
        Tensor: `x` itself, or the shards of all ranks joined along `dim`.
    """
    return x if axis.size == 1 else _Enter.apply(x, axis, dim)


def leave(x: Tensor, axis: Axis, dim: int | None = None) -> Tensor:
    """Leave a parallel region. Adjoint of `enter`.

    Args:
        x: This rank's partial sum.
        axis: The mesh axis.
        dim: None: sum forward, identity backward. A dimension: reduce-scatter forward, all-gather backward.

    Returns:
        Tensor: The sum over ranks, or this rank's part of it along `dim` (which `axis.size` must divide).
    """
    return x if axis.size == 1 else _Leave.apply(x, axis, dim)


def all_to_all(x: Tensor, axis: Axis, *, send: list[int], receive: list[int]) -> Tensor:
    """Exchange rows: the first `send[0]` rows go to rank 0, and so on. Its own adjoint with the lists swapped.

    Args:
        x: [sum(send), ...].
        axis: The mesh axis.
        send: Rows for each rank.
        receive: Rows from each rank.

    Returns:
        Tensor: [sum(receive), ...], ordered by source rank.
    """
    return x if axis.size == 1 else _AllToAll.apply(x, axis, send, receive)


def total(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, without gradient."""
    return x if axis.size == 1 else _all_reduce(x.detach(), axis, "total")


def maximum(x: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis, without gradient."""
    return x if axis.size == 1 else _all_reduce(x.detach(), axis, "maximum", dist.ReduceOp.MAX)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The shards of all ranks joined along `dim`, without gradient."""
    return x if axis.size == 1 else _all_gather(x.detach(), axis, dim, "gather")


def broadcast(x: Tensor, axis: Axis) -> Tensor:
    """The tensor of the axis's first rank, on every rank, without gradient."""
    if axis.size == 1:
        return x
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if axis.traffic is not None:
        axis.traffic.add(axis.name, "broadcast", "broadcast", out, size=axis.size, nbytes=out.nbytes if axis.rank == 0 else 0)
    dist.broadcast(out, src=axis.ranks[0], group=axis.group)
    return out


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Small Python values (error texts, file names) of all ranks, in rank order.

    They are pickled on the way, in memory, between the ranks of one run; nothing pickled is ever read from a disk.
    """
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def _all_reduce(x: Tensor, axis: Axis, what: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if axis.traffic is not None:
        axis.traffic.add(axis.name, "all_reduce", what, out, size=axis.size)
    dist.all_reduce(out, op=op, group=axis.group)
    return out


def _all_gather(x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
    dim = _from_front(x, dim)
    out = x.new_empty((axis.size, *x.shape))
    if axis.traffic is not None:
        axis.traffic.add(axis.name, "all_gather", what, x, size=axis.size)
    dist.all_gather_into_tensor(out, x.contiguous().unsqueeze(0), group=axis.group)
    return out.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, axis: Axis, dim: int, what: str) -> Tensor:
    dim = _from_front(x, dim)
    stacked = x.unflatten(dim, (axis.size, x.shape[dim] // axis.size)).movedim(dim, 0).contiguous()
    out = torch.empty_like(stacked[:1])
    if axis.traffic is not None:
        axis.traffic.add(axis.name, "reduce_scatter", what, stacked, size=axis.size)
    dist.reduce_scatter_tensor(out, stacked, group=axis.group)
    return out.squeeze(0)


def _from_front(x: Tensor, dim: int) -> int:
    """A dimension counted from the front: stacking the ranks in front of `x` would move one counted from the end."""
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"dimension {dim} of a tensor with shape {tuple(x.shape)}")
    return dim % x.ndim


class _Enter(Function):
    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim = axis, dim
        return x.view_as(x) if dim is None else _all_gather(x, axis, dim, "enter")

    @staticmethod
    def backward(ctx, grad):
        axis, dim, what = ctx.axis, ctx.dim, "enter backward"
        return _all_reduce(grad, axis, what) if dim is None else _reduce_scatter(grad, axis, dim, what), None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim = axis, dim
        return _all_reduce(x, axis, "leave") if dim is None else _reduce_scatter(x, axis, dim, "leave")

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.dim is None else _all_gather(grad, ctx.axis, ctx.dim, "leave backward"), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx, x, axis, send, receive):
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        out = x.new_empty((sum(receive), *x.shape[1:]))
        if axis.traffic is not None:
            row = x.element_size() * x.shape[1:].numel()
            axis.traffic.add(axis.name, "all_to_all", "all_to_all", x, size=axis.size, nbytes=row * (sum(send) - send[axis.rank]))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.axis, ctx.receive, ctx.send), None, None, None
