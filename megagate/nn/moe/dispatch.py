"""Bring tokens to their experts and back: dropless, rows grouped by expert and padded to a multiple."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.backend.rows import collect, spread
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
        restore: The backend's way from sent rows back to tokens.
        place: [P], received row at each padded row; -1 for padding.
        padded: [received, 1], padded row of each received row.
        send: Rows to each rank.
        receive: Rows from each rank.
    """

    restore: Any
    place: Tensor
    padded: Tensor
    send: list[int]
    receive: list[int]


class Dispatcher:
    """Routed rows over the expert axis.

    Parallel: rows sorted by expert (stably, so that the order does not depend on anything but the tokens) go by all-to-all to the ranks
        of their experts, with their router weights, and come back the same way.
    """

    def __init__(self, *, backend: Backend, ep: Axis):
        self.backend, self.ep = backend, ep

    def dispatch(self, x: Tensor, route: Route) -> tuple[Rows, Plan]:
        """Send tokens to their experts.

        Shapes: x [T, h] -> rows [P, h].
        """
        counts = route.counts.view(self.ep.size, -1)  # [ep, e] to send
        arriving = all_to_all(counts, self.ep, send=[1] * self.ep.size, receive=[1] * self.ep.size)  # [ep, e] to receive
        ends = self._ends(arriving)
        # The one wait for the device: the host must know how many rows travel and how many there will be.
        *split, rows = torch.cat([counts.sum(1), arriving.sum(1), ends[-1:]]).tolist()
        send, receive = split[: self.ep.size], split[self.ep.size :]
        place, padded = self._places(arriving, ends, received=sum(receive), rows=rows)
        grouped = self.backend.permute(x, route.probs, route.ids, num_experts=route.counts.numel())
        plan = Plan(grouped.restore, place, padded, send, receive)
        sent = all_to_all(grouped.x, self.ep, send=send, receive=receive)
        sent_probs = all_to_all(grouped.probs, self.ep, send=send, receive=receive)
        return Rows(spread(sent, place, padded), spread(sent_probs, place, padded), ends.to(torch.int32)), plan

    def combine(self, y: Tensor, plan: Plan) -> Tensor:
        """Bring the experts' (already weighted) outputs back and sum them per token.

        Shapes: y [P, h] -> [T, h].
        """
        received = collect(y, plan.place, plan.padded)
        returned = all_to_all(received, self.ep, send=plan.receive, receive=plan.send)
        return self.backend.unpermute(returned, plan.restore)

    def _ends(self, arriving: Tensor) -> Tensor:
        """[e]: where each local expert's rows end once padded; an expert without rows keeps one block of padding."""
        rows = arriving.sum(0).clamp(min=1)  # grouped GEMMs on GPUs have hung, and given wrong gradients, on groups of no rows
        multiple = self.backend.row_multiple
        return ((rows + multiple - 1) // multiple * multiple).cumsum(0)

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
