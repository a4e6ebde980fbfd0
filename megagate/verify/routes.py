"""How near a tie the routes of a model are: rounding may flip a route whose last chosen expert hardly beats the next one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagate.nn.moe.router import Router

SMALLEST_GAP = 1e-4
"""Between the k-th and the next router logit, so that no route hangs on a rounding in fp32."""


@torch.no_grad()
def route_gap(router: Router, x: Tensor) -> float:
    """The smallest difference between the k-th and the (k + 1)-th logit of the tokens x [..., h]."""
    k = router.config.top_k
    if k == router.config.num_experts:
        return math.inf
    logits = router.logits(x).double().sort(-1, descending=True).values
    return (logits[..., k - 1] - logits[..., k]).min().item()


@contextmanager
def watched_routes(model: nn.Module) -> Iterator[list[float]]:
    """The gaps of every call of a router of the model inside the context."""
    gaps: list[float] = []

    def look(router: nn.Module, args: tuple[Tensor]) -> None:
        gaps.append(route_gap(router, args[0].detach()))

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, Router)]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()
