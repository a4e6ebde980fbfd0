"""The optimizer over parameter groups."""

from typing import Any

import torch
from torch import Tensor, nn

from megagate.config.run import OptimConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""The per-element state of each optimizer, by its PyTorch names; fp32 masters come on top."""


def parameter_groups(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without; empty groups are left out.

    Args:
        named: Parameters with their names; ndim tells matrices from vectors.
        config: Gives the weight decay.
    """
    decayed = [p for _, p in named if p.ndim >= 2]
    rest = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "name": "decayed"},
        {"params": rest, "weight_decay": 0.0, "name": "not_decayed"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer; its learning rate is set before every step."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def fresh_state(parameter: Tensor, config: OptimConfig, *, applied_steps: int) -> dict[str, Tensor]:
    """The state that the optimizer keeps for one parameter after some steps, moments still zero; empty before the first step."""
    if not applied_steps or not MOMENTS[config.name]:
        return {}
    step = torch.tensor(float(applied_steps), device=parameter.device)
    return {"step": step, **{moment: torch.zeros_like(parameter) for moment in MOMENTS[config.name]}}
