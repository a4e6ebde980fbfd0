"""Transformer Engine 2.20.2: the only file that imports it, where its kernels are asked for."""

from typing import Any

import torch


def fused_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """TE's AdamW with one kernel launch for many tensors; fp32 moments `exp_avg` and `exp_avg_sq`, its step counted in its groups."""
    from transformer_engine.pytorch.optimizers import FusedAdam  # noqa: PLC0415 - an optional package

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)
