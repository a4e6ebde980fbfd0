"""Routers told where to send tokens, by their place in the global micro-batch alone, so that every layout routes the same tokens alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from megagate.nn.moe.router import Router
from megagate.parallel.mesh import ParallelMesh
from megagate.verify.routes import pin_routes

Routing = Literal["free", "idle", "pinned"]

NEVER, LATE_SAMPLES, LATE_TOKENS = (2, 3), (6,), (0,)
"""`idle`: experts that no token reaches, none of the first half of each micro-step's samples, none of the first half of each sequence."""


def steer(model: nn.Module, mesh: ParallelMesh, routing: Routing) -> None:
    """Pin the routes of all routers of a model, or lower the logits of experts that are to stay idle by 1e4."""
    if routing == "pinned":
        pin_routes(model, mesh)
    elif routing == "idle":
        for router in routers(model):
            router.logits = _avoiding(router, mesh)


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _avoiding(router: Router, mesh: ParallelMesh) -> Callable[[Tensor], Tensor]:
    own = router.logits

    def logits(x: Tensor) -> Tensor:
        values = own(x)  # [b, s/tp, E]
        b, s, _ = values.shape
        sample, position = b * mesh.dp.rank + torch.arange(b), s * mesh.tp.rank + torch.arange(s)
        early_sample, early_token = 2 * sample < b * mesh.dp.size, 2 * position < s * mesh.tp.size
        bias = torch.zeros_like(values)
        bias[..., NEVER] = -1e4
        bias[..., LATE_SAMPLES] -= 1e4 * early_sample[:, None, None]
        bias[..., LATE_TOKENS] -= 1e4 * early_token[:, None]
        return values + bias

    return logits


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
