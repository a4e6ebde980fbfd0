"""The engine in plain PyTorch on one process: what the sharded engine must equal."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megagate.checkpoint.store import Checkpoint
from megagate.config.run import RunConfig
from megagate.engine.base import Engine
from megagate.engine.fragment import Fragment
from megagate.engine.optim import build_optimizer, parameter_groups
from megagate.model.lm import LanguageModel, LossParts
from megagate.parallel.mesh import ParallelMesh


class ReferenceEngine(Engine):
    """fp32 masters, fp32 gradient accumulation, one clip, one step of PyTorch's own optimizer, which other implementations must equal.

    For a mesh of one rank.
    """

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: ParallelMesh):
        super().__init__(model, replace(config, optim=replace(config.optim, implementation="torch")), mesh)
        self.masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
        self.optimizer = build_optimizer(parameter_groups(list(self.masters.items()), config.optim), self.config.optim)

    def _forward(self, tokens: Tensor, labels: Tensor) -> LossParts:
        return self.model(tokens, labels)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                master, grad = self.masters[name], parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad + grad
                parameter.grad = None

    def _update(self, lr: float) -> tuple[float, bool]:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.masters.values()]).item()
        applied = math.isfinite(norm)
        if applied:
            if self.config.optim.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.optim.grad_clip, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad()
        return norm, applied

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.masters[name])

    def _fragments(self) -> Iterator[Fragment]:
        """Whole tensors."""
        return (Fragment(name, 0, master, 0, master.numel(), owned=True) for name, master in self.masters.items())

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        self._copy_masters()
