"""Bring tokens to their experts and back: dropless, rows grouped by expert and padded to a multiple."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megagate.nn.moe.router import Route
from megagate.parallel.comm import all_to_all
from megagate.parallel.mesh import Axis


class Rows(NamedTuple):
    """Rows in the order of this rank's experts.

    Args:
        x: [P, h], hidden states; padding rows hold zeros.
        probs: [P, 1] fp32, router weight of each row; 0 for padding.
        ends: [e] int32, where each local expert's rows end, padding included.
    """

    x: Tensor
    probs: Tensor
    ends: Tensor


class Plan(NamedTuple):
    """How to bring rows back.

    Args:
        token: [R], token of each sent row.
        slots: [T, k], sent row of each token's choices.
        place: [P], received row at each padded row; -1 for padding.
        padded: [received, 1], padded row of each received row.
        send: Rows to each rank.
        receive: Rows from each rank.
    """

    token: Tensor
    slots: Tensor
    place: Tensor
    padded: Tensor
    send: list[int]
    receive: list[int]


class Dispatcher:
    """Routed rows over the expert axis.

    Parallel: rows sorted by expert (stably, so that the order does not depend on anything but the tokens) go by all-to-all to the ranks
        of their experts, with their router weights, and come back the same way.
    """

    def __init__(self, *, row_multiple: int, ep: Axis):
        self.row_multiple, self.ep = row_multiple, ep

    def dispatch(self, x: Tensor, route: Route) -> tuple[Rows, Plan]:
        """Send tokens to their experts.

        Shapes: x [T, h] -> rows [P, h].
        """
        order = torch.argsort(route.ids.flatten(), stable=True)  # [T*k]
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device)).view_as(route.ids)
        token = order // route.ids.shape[1]
        counts = route.counts.view(self.ep.size, -1)  # [ep, e] to send
        arriving = all_to_all(counts, self.ep, send=[1] * self.ep.size, receive=[1] * self.ep.size)  # [ep, e] to receive
        ends = self._ends(arriving)
        # The one wait for the device: the host must know how many rows travel and how many there will be.
        *split, rows = torch.cat([counts.sum(1), arriving.sum(1), ends[-1:]]).tolist()
        send, receive = split[: self.ep.size], split[self.ep.size :]
        place, padded = self._places(arriving, ends, received=sum(receive), rows=rows)
        plan = Plan(token, slots, place, padded, send, receive)
        sent = all_to_all(_Spread.apply(x, token, slots), self.ep, send=send, receive=receive)
        sent_probs = all_to_all(route.probs.flatten()[order].unsqueeze(-1), self.ep, send=send, receive=receive)
        return Rows(_Spread.apply(sent, place, padded), _Spread.apply(sent_probs, place, padded), ends.to(torch.int32)), plan

    def combine(self, y: Tensor, plan: Plan) -> Tensor:
        """Bring the experts' (already weighted) outputs back and sum them per token.

        Shapes: y [P, h] -> [T, h].
        """
        received = _Collect.apply(y, plan.place, plan.padded)
        returned = all_to_all(received, self.ep, send=plan.receive, receive=plan.send)
        return _Collect.apply(returned, plan.token, plan.slots)

    def _ends(self, arriving: Tensor) -> Tensor:
        """[e]: where each local expert's rows end once padded; an expert without rows keeps one block of padding."""
        rows = arriving.sum(0).clamp(min=1)  # grouped GEMMs on GPUs have hung, and given wrong gradients, on groups of no rows
        return ((rows + self.row_multiple - 1) // self.row_multiple * self.row_multiple).cumsum(0)

    @staticmethod
    def _places(arriving: Tensor, ends: Tensor, *, received: int, rows: int) -> tuple[Tensor, Tensor]:
        """From the order of received rows (by source rank, then expert) to rows grouped by expert and padded, and back.

        Shapes: arriving [ep, e] -> place [rows], padded [received, 1].
        """
        # A run is what one source sends to one expert. Runs arrive source-major and are laid out expert-major.
        within = arriving.cumsum(0) - arriving  # [ep, e], rows of lower sources for the same expert
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]) + within  # [ep, e], padded row at which each run begins
        runs = arriving.flatten()
        shift = (starts.flatten() - (runs.cumsum(0) - runs)).repeat_interleave(runs, output_size=received)
        arrival = torch.arange(received, device=arriving.device)
        padded = arrival + shift
        place = torch.full((rows,), -1, device=arriving.device).scatter_(0, padded, arrival)
        return place, padded.unsqueeze(-1)


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
    """Row r of the output is row source[r] of the input, zeros for -1; slots[t] lists the output rows of input row t.

    Adjoint of `_Collect`.
    """

    @staticmethod
    def forward(ctx, x, source, slots):
        ctx.save_for_backward(slots)
        return _gather_rows(x, source)

    @staticmethod
    def backward(ctx, grad):
        return _sum_slots(grad, *ctx.saved_tensors), None, None


class _Collect(Function):
    """Row t of the output is the sum of the input rows slots[t]. Adjoint of `_Spread`."""

    @staticmethod
    def forward(ctx, x, source, slots):
        # Not through save_for_backward: a recomputed block would run up to here for it, and send its rows home again for nothing.
        ctx.source = source
        return _sum_slots(x, slots)

    @staticmethod
    def backward(ctx, grad):
        return _gather_rows(grad, ctx.source), None, None
