"""Routes that rounding does not flip: how near a tie those of a model are, and routes that are pinned."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagate.nn.moe.router import Router
from megagate.parallel.mesh import ParallelMesh

SMALLEST_GAP = 1e-4
"""Between the k-th and the next router logit, so that no route hangs on a rounding in fp32."""


PIN = 8.0
"""Added to the logits of pinned experts: far more than the model's own logits and their rounding in bf16."""


def pin_routes(model: nn.Module, mesh: ParallelMesh) -> None:
    """Send each token to experts that depend on its place in the global micro-batch alone, under every layout the same.

    The router's probabilities among these, and all gradients, are still its own.
    """
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.logits = _Pinned(router.logits, mesh, router.config.top_k)


class _Pinned:
    def __init__(self, logits: Callable[[Tensor], Tensor], mesh: ParallelMesh, top_k: int):
        self._logits, self._mesh, self._top_k = logits, mesh, top_k

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._logits(x)
        return logits + self.bias(logits)

    def bias(self, logits: Tensor) -> Tensor:
        """[b, s/tp, E]: PIN for the experts of a token, zeros else."""
        b, s, experts = logits.shape
        sample = b * self._mesh.dp.rank + torch.arange(b, device=logits.device)
        position = s * self._mesh.tp.rank + torch.arange(s, device=logits.device)
        first = 3 * sample[:, None] + position  # [b, s/tp]
        chosen = (first.unsqueeze(-1) + torch.arange(self._top_k, device=logits.device)) % experts
        return torch.zeros_like(logits).scatter_(-1, chosen, PIN)


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
