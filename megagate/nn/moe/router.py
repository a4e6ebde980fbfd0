"""The router: which experts a token goes to, and with what weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from megagate.backend.base import Backend, Chosen
from megagate.backend.routing import SCORES
from megagate.config.model import MoEConfig
from megagate.nn.base import Layer
from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis


class RouterStats(NamedTuple):
    """Sums over one rank's tokens of one layer; the balance losses are formed from them in the engine.

    Args:
        counts: [b, E] fp32, tokens of each sequence sent to each expert, without gradient.
        prob_sums: [b, E] fp32, sum of the scores of all experts, as shares of 1, over each sequence's tokens, with gradient.
        z_sum: scalar fp32, sum of logsumexp(logits)^2, with gradient.
    """

    counts: Tensor
    prob_sums: Tensor
    z_sum: Tensor


class Route(NamedTuple):
    """Where tokens go.

    Args:
        ids: [T, k] int64.
        probs: [T, k] fp32, with gradient.
        counts: [E] int64, rows for each expert.
    """

    ids: Tensor
    probs: Tensor
    counts: Tensor


class Router(Layer):
    """The k experts with the largest score, softmax or sigmoid in fp32, weighted by their scores, renormalised to sum 1 if so configured.

    With `bias_update_rate` u experts are chosen by score + bias, and after each step `follow` moves the bias of each expert by u towards an
    equal load. `bias_steps` counts these moves (bias = u * bias_steps): whole numbers, so that no cast of a model changes them.

    Shapes: x [b, s/tp, h] -> ids [T, k], probs [T, k], T = b s/tp.
    Parallel: the weight is replicated; under sequence parallelism each rank routes its own tokens and the gradient is summed over tp. The
        bias is the same on all ranks, since it follows counts of the whole step.
    Source: arXiv 2101.03961, equation 1, with k experts; sigmoid scores: arXiv 2412.19437, equations 13-15; bias: arXiv 2408.15664,
        algorithm 1.
    """

    weight: Tensor
    bias_steps: Tensor | None

    def __init__(self, config: MoEConfig, hidden_size: int, *, dtype: torch.dtype, backend: Backend, tp: Axis):
        super().__init__(dtype)
        self.config, self.backend, self.tp = config, backend, tp
        self.add_weight("weight", (config.num_experts, hidden_size), init="normal")
        steps = torch.empty(config.num_experts, dtype=torch.int32, device="meta") if config.bias_update_rate else None
        self.register_buffer("bias_steps", steps)

    def forward(self, x: Tensor) -> tuple[Route, RouterStats]:
        """Route tokens."""
        logits = self.logits(x)
        ids, probs, shares = self._choose(logits)
        counts = count_rows(ids, self.config.num_experts)
        stats = RouterStats(counts.float(), shares.sum(1), logits.logsumexp(-1).square().sum())
        return Route(ids.flatten(0, 1), probs.flatten(0, 1), counts.sum(0)), stats

    def shares(self, x: Tensor) -> Tensor:
        """The scores of all experts as shares of 1, [b, s/tp, E] fp32."""
        return self._choose(self.logits(x)).shares

    def ranking(self, x: Tensor) -> Tensor:
        """What experts are chosen by, up to a function that grows, [b, s/tp, E] fp32."""
        logits = self.logits(x)
        return logits if self.bias_steps is None else SCORES[self.config.score](logits) + self._bias()

    @torch.no_grad()
    def follow(self, counts: Tensor) -> None:
        """Move the bias after a step that sent counts [E] rows to the experts, over all ranks; nothing without a bias."""
        if self.bias_steps is not None:
            load = counts.double()
            self.bias_steps += torch.sign(load.mean() - load).int()

    def _choose(self, logits: Tensor) -> Chosen:
        return self.backend.choose(logits, self.config, bias=None if self.bias_steps is None else self._bias())

    def _bias(self) -> Tensor:
        return self.config.bias_update_rate * self.bias_steps.float()

    def logits(self, x: Tensor) -> Tensor:
        """What the scores are made of, [b, s/tp, E] fp32."""
        return x.float() @ enter(self.weight.float(), self.tp).t()


def count_rows(ids: Tensor, num_experts: int) -> Tensor:
    """[b, E] int64: how often each sequence of ids [b, s, k] chooses each expert. Unlike bincount it does not wait for a GPU."""
    flat = ids.flatten(1)
    return flat.new_zeros(len(flat), num_experts).scatter_add_(1, flat, torch.ones_like(flat))
