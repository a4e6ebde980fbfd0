"""Routers told where to send tokens, by their place in the global micro-batch alone, so that every layout routes the same tokens alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from megagate.nn.moe.router import Router
from megagate.parallel.mesh import ParallelMesh

Routing = Literal["free", "idle", "pinned"]

NEVER, LATE_SAMPLES, LATE_TOKENS = (2, 3), (6,), (0,)
"""`idle`: experts that no token reaches, none of the first half of each micro-step's samples, none of the first half of each sequence."""
OFFSETS = (0, 1, 3)
"""`pinned`: the three experts of a token, counted from one that depends on its place."""


def steer(model: nn.Module, mesh: ParallelMesh, routing: Routing) -> None:
    """Add to the logits of all routers of a model: -1e4 for experts that are to stay idle, or 8 for those that are to be chosen."""
    if routing == "free":
        return
    for router in routers(model):
        router.logits = _steered(router, mesh, routing)


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _steered(router: Router, mesh: ParallelMesh, routing: Routing):
    own = router.logits

    def logits(x: Tensor) -> Tensor:
        values = own(x)
        return values + _bias(values, mesh, routing)

    return logits


def _bias(logits: Tensor, mesh: ParallelMesh, routing: Routing) -> Tensor:
    """[b, s/tp, E], like this rank's logits."""
    b, s, _ = logits.shape
    sample, position = b * mesh.dp.rank + torch.arange(b), s * mesh.tp.rank + torch.arange(s)
    bias = torch.zeros_like(logits)
    if routing == "pinned":
        first = 3 * sample[:, None] + position  # [b, s]
        chosen = (first.unsqueeze(-1) + torch.tensor(OFFSETS)) % logits.shape[-1]
        return bias.scatter_(-1, chosen, 8.0)
    early_sample, early_token = 2 * sample < b * mesh.dp.size, 2 * position < s * mesh.tp.size
    bias[..., NEVER] = -1e4
    for expert in LATE_SAMPLES:
        bias[..., expert].masked_fill_(early_sample[:, None], -1e4)
    for expert in LATE_TOKENS:
        bias[..., expert].masked_fill_(early_token, -1e4)
    return bias


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[list[Tensor]]:
    """For each call of a router inside the context, how many of this rank's rows go to each expert, [E]."""
    counts: list[Tensor] = []
    handles = [router.register_forward_hook(lambda module, args, output: counts.append(output[0].counts)) for router in routers(model)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
