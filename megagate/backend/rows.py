"""Rows of tokens brought to other places and back, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megagate.backend.base import Permuted


def spread(x: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """Row r of the output is row source[r] of the input, zeros for -1; slots[t] lists the output rows of input row t.

    Adjoint of `collect`.
    """
    return _Spread.apply(x, source, slots)


def collect(x: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """Row t of the output is the sum of the input rows slots[t]. Adjoint of `spread`."""
    return _Collect.apply(x, source, slots)


class Order(NamedTuple):
    """How rows that were grouped by expert go back.

    Args:
        token: [R], token of each row.
        slots: [T, k], row of each token's choices.
    """

    token: Tensor
    slots: Tensor


def permute(x: Tensor, probs: Tensor, ids: Tensor) -> Permuted:
    """See `Backend.permute`: a stable sort, so that the order depends on nothing but the tokens."""
    order = torch.argsort(ids.flatten(), stable=True)  # [T*k]
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device)).view_as(ids)
    token = order // ids.shape[1]
    return Permuted(spread(x, token, slots), probs.flatten()[order].unsqueeze(-1), Order(token, slots))


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], zeros where index is -1."""
    if x.shape[0] == 0:  # this rank's experts got no rows at all
        return x.new_zeros((index.shape[0], *x.shape[1:]))
    # A product: masked_fill_ along rows takes three times as long on CPUs.
    return x.index_select(0, index.clamp(min=0)).mul_((index >= 0).unsqueeze(-1))


def _sum_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Sum over k of x[slots[:, k]], in the order of k, without atomics, so that it is the same every time."""
    return F.embedding_bag(slots, x, mode="sum")


class _Spread(Function):
    @staticmethod
    def forward(ctx, x, source, slots):
        ctx.save_for_backward(slots)
        return _gather_rows(x, source)

    @staticmethod
    def backward(ctx, grad):
        return _sum_slots(grad, *ctx.saved_tensors), None, None


class _Collect(Function):
    @staticmethod
    def forward(ctx, x, source, slots):
        # Not through save_for_backward: a recomputed block would run up to here for it, and send its rows home again for nothing.
        ctx.source = source
        return _sum_slots(x, slots)

    @staticmethod
    def backward(ctx, grad):
        return _gather_rows(grad, ctx.source), None, None
