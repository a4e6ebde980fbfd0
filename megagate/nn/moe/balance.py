"""The router's auxiliary losses, formed from sums so that they do not depend on the layout."""

from typing import NamedTuple

import torch
from torch import Tensor

from megagate.config.model import MoEConfig
from megagate.nn.moe.router import RouterStats
from megagate.parallel.comm import total
from megagate.parallel.mesh import ParallelMesh


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

    f_e is the share of routed rows that go to expert e: over all ranks and micro-steps 1..k of this step (`global_batch`), over all ranks
    of micro-step k alone (`micro_batch`), or within one sequence, the loss being the mean over sequences (`sequence`). P_e is the mean
    router probability. `share` is what one rank adds to its micro-step's loss: summed over all ranks and micro-steps it is sum over layers
    of coef * loss, with every mean taken over the tokens of the step.

    Parallel: per micro-step one all-reduce of counts, [layers, 1, E] over the world, or [layers, b, E] over tp for `sequence`.
    Source: arXiv 2101.03961, equation 4; arXiv 2501.11873, equation 4 (global batch); arXiv 2412.19437, equations 17-20 (sequence);
        arXiv 2202.08906, equation 5 (z-loss).
    """

    def __init__(self, config: MoEConfig, *, step_tokens: int, mesh: ParallelMesh):
        """Begin a step of `step_tokens` tokens over all ranks."""
        self.config, self.step_tokens, self.mesh = config, step_tokens, mesh
        self.by_sequence = config.balance_scope == "sequence"
        self.counts: Tensor | float = 0.0  # [layers, 1, E] of the step so far, over all ranks (`sequence`: this rank)
        self.prob_sums: Tensor | float = 0.0  # [layers, 1, E] of the step so far, this rank
        self.z_sum: Tensor | float = 0.0

    def share(self, stats: list[RouterStats]) -> Tensor:
        """This rank's share of the coming micro-step's auxiliary loss, with gradient.

        Args:
            stats: One per layer.

        Returns:
            Tensor: scalar fp32.
        """
        own = torch.stack([s.counts for s in stats])  # [layers, b, E]
        prob_sums = torch.stack([s.prob_sums for s in stats])  # [layers, b, E]
        z_sum = torch.stack([s.z_sum for s in stats]).sum()
        counts = own.sum(1, keepdim=True)
        if not self.by_sequence:
            counts = total(counts, self.mesh.world)
        self.counts = self.counts + counts
        self.prob_sums = self.prob_sums + prob_sums.detach().sum(1, keepdim=True)
        self.z_sum = self.z_sum + z_sum.detach()
        match self.config.balance_scope:
            case "global_batch":
                seen = self.counts
            case "micro_batch":
                seen = counts
            case "sequence":
                seen = total(own, self.mesh.tp)
        balance = self._balance(seen, prob_sums).sum()
        return self.config.balance_coef * balance + self.config.z_loss_coef * z_sum / self.step_tokens

    def close(self) -> tuple[AuxLosses, Tensor]:
        """End the step.

        Returns:
            AuxLosses: Over the full step, as means over layers; balance over the whole step, whatever the scope, so that runs compare.
            Tensor: [layers, E] fp32, rows that went to each expert in this step, over all ranks.
        """
        layers = len(self.counts)
        counts = total(self.counts, self.mesh.world) if self.by_sequence else self.counts
        sums = total(torch.cat([self.prob_sums.flatten(), self.z_sum.view(1)]), self.mesh.world)
        balance = self._balance(counts, sums[:-1].view_as(counts)).mean()
        return AuxLosses(balance.item(), sums[-1].item() / (layers * self.step_tokens)), counts.squeeze(1)

    def _balance(self, counts: Tensor, prob_sums: Tensor) -> Tensor:
        """[layers, b]: E * sum_e f_e * prob_sums_e / step_tokens; counts [layers, b or 1, E], prob_sums [layers, b, E]."""
        frequency = counts / counts.sum(-1, keepdim=True)
        return self.config.num_experts * (frequency * prob_sums).sum(-1) / self.step_tokens
