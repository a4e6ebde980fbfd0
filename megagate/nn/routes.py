"""How near a tie the choices of routers and switch heads are: rounding may flip those that are nearer than it is large."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagate.nn.moe.router import Router
from megagate.nn.switch import SwitchHeads

SMALLEST_GAP = 1e-4
"""Between the k-th and the next router logit, so that no route hangs on a rounding in fp32."""


@torch.no_grad()
def route_gaps(chooser: Router | SwitchHeads, *args: Tensor) -> Tensor:
    """The difference between the k-th and the (k + 1)-th of what a router or switch heads choose by; infinite where all are chosen.

    Shapes: `args` as for its forward -> [b, s] fp64, of switch heads the smallest of all heads.
    """
    ranked = chooser.ranking(*args).double().sort(-1, descending=True).values
    k = chooser.config.top_k
    gaps = ranked[..., k - 1] - ranked[..., k] if k < ranked.shape[-1] else torch.full_like(ranked[..., 0], math.inf)
    return gaps.flatten(2).amin(-1) if gaps.dim() > 2 else gaps


@contextmanager
def watched_gaps(model: nn.Module) -> Iterator[list[Tensor]]:
    """The gaps [b, s] of every choice of routers and switch heads of the model inside the context."""
    gaps: list[Tensor] = []

    def look(chooser: nn.Module, args: tuple[Tensor, ...]) -> None:
        gaps.append(route_gaps(chooser, *(arg.detach() for arg in args)))

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, (Router, SwitchHeads))]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()
