"""The router: which experts a token goes to, and with what weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from megagate.config.model import MoEConfig
from megagate.nn.base import Layer
from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis


class RouterStats(NamedTuple):
    """Sums over one rank's tokens of one layer; the balance losses are formed from them in the engine.

    Args:
        counts: [b, E] fp32, tokens of each sequence sent to each expert, without gradient.
        prob_sums: [b, E] fp32, sum of the full softmax over each sequence's tokens, with gradient.
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
    """softmax over all experts in fp32, then the k largest, renormalised to sum 1 if so configured.

    Shapes: x [b, s/tp, h] -> ids [T, k], probs [T, k], T = b s/tp.
    Parallel: the weight is replicated; under sequence parallelism each rank routes its own tokens and the gradient is summed over tp.
    Source: arXiv 2101.03961, equation 1, with k experts.
    """

    weight: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int, *, dtype: torch.dtype, tp: Axis):
        super().__init__(dtype)
        self.config, self.tp = config, tp
        self.add_weight("weight", (config.num_experts, hidden_size), init="normal")

    def forward(self, x: Tensor) -> tuple[Route, RouterStats]:
        """Route tokens."""
        logits = self.logits(x)
        scores = logits.softmax(-1)
        probs, ids = scores.topk(self.config.top_k, dim=-1)  # [b, s/tp, k]
        if self.config.renormalize:
            probs = probs / probs.sum(-1, keepdim=True)
        counts = count_rows(ids, self.config.num_experts)
        stats = RouterStats(counts.float(), scores.sum(1), logits.logsumexp(-1).square().sum())
        return Route(ids.flatten(0, 1), probs.flatten(0, 1), counts.sum(0)), stats

    def logits(self, x: Tensor) -> Tensor:
        """The score of each expert before the softmax, [b, s/tp, E] fp32."""
        return x.float() @ enter(self.weight.float(), self.tp).t()


def count_rows(ids: Tensor, num_experts: int) -> Tensor:
    """[b, E] int64: how often each sequence of ids [b, s, k] chooses each expert. Unlike bincount it does not wait for a GPU."""
    flat = ids.flatten(1)
    return flat.new_zeros(len(flat), num_experts).scatter_add_(1, flat, torch.ones_like(flat))
