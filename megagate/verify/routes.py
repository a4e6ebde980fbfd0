"""Routes that rounding does not flip: how near a tie those of a model are, and routes that are pinned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagate.nn.moe.router import Router
from megagate.nn.routes import watched_gaps
from megagate.nn.switch import SwitchHeads
from megagate.parallel.mesh import ParallelMesh

PINS = {"softmax": 8.0, "sigmoid": 3.0}
"""Added to the logits of pinned experts, by what scores are made with: far more than the model's own logits and their rounding in bf16, but
not so much that a sigmoid is flat there."""


def pin_routes(model: nn.Module, mesh: ParallelMesh) -> None:
    """Send each token to experts that depend on its place in the global micro-batch alone, under every layout the same.

    The router's probabilities among these, and all gradients, are still its own. Switch heads choose so too.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.logits = _Pinned(module.logits, mesh, module.config.top_k, pin=PINS[module.config.score], whole_sequence=False)
        elif isinstance(module, SwitchHeads):
            module.ranking = _Pinned(module.ranking, mesh, module.config.top_k, pin=PINS["sigmoid"], whole_sequence=True)


class _Pinned:
    """Of a router each rank sees its tokens, of switch heads those of all tp ranks."""

    def __init__(self, logits: Callable[..., Tensor], mesh: ParallelMesh, top_k: int, *, pin: float, whole_sequence: bool):
        self._logits, self._mesh, self._top_k, self._pin = logits, mesh, top_k, pin
        self._first = 0 if whole_sequence else mesh.tp.rank

    def __call__(self, *args: Tensor) -> Tensor:
        logits = self._logits(*args)
        return logits + self.bias(logits)

    def bias(self, logits: Tensor) -> Tensor:
        """Like logits [b, s/tp or s, ..., E]: the pin for the experts of a token, zeros else."""
        b, s, experts = *logits.shape[:2], logits.shape[-1]
        sample = b * self._mesh.dp.rank + torch.arange(b, device=logits.device)
        position = s * self._first + torch.arange(s, device=logits.device)
        first = 3 * sample[:, None] + position  # [b, s]
        chosen = (first.unsqueeze(-1) + torch.arange(self._top_k, device=logits.device)) % experts
        pins = torch.zeros(b, s, experts, device=logits.device, dtype=logits.dtype).scatter_(-1, chosen, self._pin)
        return pins.view(b, s, *(1,) * (logits.dim() - 3), experts).expand_as(logits)


@contextmanager
def watched_routes(model: nn.Module) -> Iterator[list[float]]:
    """The smallest gap of every choice of routers and switch heads of the model inside the context, there after it."""
    smallest: list[float] = []
    with watched_gaps(model) as gaps:
        yield smallest
    smallest += [gap.min().item() for gap in gaps]
