"""The router's auxiliary losses, formed from sums so that they do not depend on the layout."""

from typing import NamedTuple

import torch
from torch import Tensor

from megagate.config.model import MoEConfig
from megagate.nn.moe.router import RouterStats
from megagate.parallel.comm import total
from megagate.parallel.mesh import Axis


class AuxLosses(NamedTuple):
    """Means over layers and tokens of one step, as logged: without their coefficients.

    Args:
        balance: E * sum_e f_e P_e; 1 when perfectly balanced.
        z: Mean of logsumexp(logits)^2.
    """

    balance: float
    z: float


class BalanceLoss:
    """Load-balancing loss E * sum_e f_e P_e and router z-loss of one optimizer step, per layer.

    f_e is the share of routed rows that go to expert e: over all ranks and micro-steps 1..k of this step (`global_batch`), or over all
    ranks of micro-step k alone (`micro_batch`). P_e is the mean router probability. `share` is what one rank adds to its micro-step's
    loss: summed over all ranks and micro-steps it is sum over layers of coef * loss, with every mean taken over the tokens of the step.

    Parallel: one all-reduce of [layers, E] counts over the world per micro-step.
    Source: arXiv 2101.03961, equation 4; arXiv 2501.11873, equation 4 (global batch); arXiv 2202.08906, equation 5 (z-loss).
    """

    def __init__(self, config: MoEConfig, *, step_tokens: int, world: Axis):
        """Begin a step of `step_tokens` tokens over all ranks."""
        self.config, self.step_tokens, self.world = config, step_tokens, world
        self.counts: Tensor | float = 0.0  # [layers, E] of the step so far, over all ranks
        self.prob_sums: Tensor | float = 0.0  # [layers, E] of the step so far, this rank
        self.z_sum: Tensor | float = 0.0

    def share(self, stats: list[RouterStats]) -> Tensor:
        """This rank's share of the coming micro-step's auxiliary loss, with gradient.

        Args:
            stats: One per layer.

        Returns:
            Tensor: scalar fp32.
        """
        counts = total(torch.stack([s.counts for s in stats]), self.world)
        prob_sums = torch.stack([s.prob_sums for s in stats])  # [layers, E]
        z_sum = torch.stack([s.z_sum for s in stats]).sum()
        self.counts = self.counts + counts
        self.prob_sums = self.prob_sums + prob_sums.detach()
        self.z_sum = self.z_sum + z_sum.detach()
        basis = self.counts if self.config.balance_scope == "global_batch" else counts
        balance = self._balance(basis, prob_sums).sum()
        return self.config.balance_coef * balance + self.config.z_loss_coef * z_sum / self.step_tokens

    def logged(self) -> AuxLosses:
        """The losses over the full step, as means over layers."""
        layers = len(self.counts)
        sums = total(torch.cat([self.prob_sums.flatten(), self.z_sum.view(1)]), self.world)
        balance = self._balance(self.counts, sums[:-1].view_as(self.counts)).mean()
        return AuxLosses(balance.item(), sums[-1].item() / (layers * self.step_tokens))

    def _balance(self, counts: Tensor, prob_sums: Tensor) -> Tensor:
        """[layers]: E * sum_e f_e * prob_sums_e / step_tokens."""
        frequency = counts / counts.sum(-1, keepdim=True)
        return self.config.num_experts * (frequency * prob_sums).sum(-1) / self.step_tokens
