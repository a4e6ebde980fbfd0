"""One optimizer step, whatever does the sharding: the loss is formed here, once, for every engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.run import RunConfig
from megagate.data.loader import IGNORE_INDEX
from megagate.model.lm import LanguageModel, LossParts
from megagate.nn.moe.balance import AuxLosses, BalanceLoss
from megagate.parallel.comm import total
from megagate.parallel.mesh import ParallelMesh


class StepResult(NamedTuple):
    """One optimizer step, equal on all ranks.

    Args:
        loss: Mean cross-entropy over the step's targets, nats.
        targets: Tokens with a target, over all ranks.
        grad_norm: Global norm before clipping; inf or nan when a gradient is not finite.
        applied: Whether the parameters were changed.
        aux: The router's losses; None for a dense model.
    """

    loss: float
    targets: int
    grad_norm: float
    applied: bool
    aux: AuxLosses | None


class Engine(ABC):
    """Owns the model, its optimizer and their sharding."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: ParallelMesh):
        self.model, self.config, self.mesh = model, config, mesh
        self.applied_steps = 0  # skipped steps do not count: Adam's bias correction depends on it

    def train_step(self, tokens: Tensor, labels: Tensor, *, lr: float) -> StepResult:
        """Accumulate over micro-steps, clip, update.

        Shapes: tokens and labels [accumulation, b, s] int64, the samples of this data-parallel rank.

        Every rank's micro-step loss is CE_sum / T + its share of the auxiliary losses, T the targets of the whole step over all ranks, so
        that the sum over data-parallel ranks and micro-steps is the mean loss of the global batch: no later division by accumulation.
        """
        targets = max(1, self._count_targets(labels))
        balance = self._balance_loss(tokens)
        ce_sum = torch.zeros((), device=tokens.device)
        last = len(tokens) - 1
        for k in range(len(tokens)):
            parts = self._forward(tokens[k], labels[k])
            loss = parts.ce_sum / targets
            if balance is not None:
                loss = loss + balance.share(parts.stats)
            ce_sum += parts.ce_sum.detach()
            self._backward(loss, last=k == last)
        grad_norm, applied = self._update(lr)
        self.applied_steps += applied
        loss = total(ce_sum, self.mesh.dp).item() / targets
        return StepResult(loss, targets, grad_norm, applied, balance.logged() if balance is not None else None)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean cross-entropy over all targets of all ranks' batches, nats. Each item: tokens and labels [b, s]."""
        self.model.eval()
        ce_sum, targets = 0.0, 0
        for tokens, labels in batches:
            ce_sum += total(self.model(tokens, labels).ce_sum.double(), self.mesh.dp).item()
            targets += self._count_targets(labels)
        self.model.train()
        return ce_sum / max(1, targets)

    def _count_targets(self, labels: Tensor) -> int:
        return int(total((labels != IGNORE_INDEX).sum(), self.mesh.dp))

    def _balance_loss(self, tokens: Tensor) -> BalanceLoss | None:
        model = self.config.model
        step_tokens = tokens.numel() * self.mesh.dp.size
        return BalanceLoss(model.moe, step_tokens=step_tokens, mesh=self.mesh) if model.is_moe else None

    @abstractmethod
    def _forward(self, tokens: Tensor, labels: Tensor) -> LossParts:
        """Run the model on one micro-batch."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of the sum of all data-parallel ranks' losses."""

    @abstractmethod
    def _update(self, lr: float) -> tuple[float, bool]:
        """Clip, step unless a gradient is not finite, clear; returns the global norm and whether the step was applied."""

    @abstractmethod
    def state_pieces(self) -> Iterable[Piece]:
        """This rank's part of masters and moments: every element of every logical tensor on exactly one rank, without a collective."""

    @abstractmethod
    def load_state(self, checkpoint: Checkpoint, *, applied_steps: int) -> None:
        """Take masters, moments and weights from a checkpoint of any layout."""
