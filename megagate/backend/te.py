"""Transformer Engine 2.20.2: the only file that imports it, where its kernels are asked for."""

import importlib
from typing import Any

import torch

from megagate.errors import ConfigError
from megagate.parallel.init import require_gpu

INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.2'"


def require(key: str, *, device: torch.device, otherwise: str) -> None:
    """Refuse a config that wants Transformer Engine without a GPU, or where it is not.

    Args:
        key: The config key whose value is `te`.
        device: Of this rank.
        otherwise: The value of `key` that needs no Transformer Engine.

    Raises:
        ConfigError: With what is missing and the command that installs it.
    """
    require_gpu(key, "te", device=device, otherwise=otherwise)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # missing libraries show as OSError, FileNotFoundError or RuntimeError
        raise ConfigError(
            f"{key} (te) needs Transformer Engine, which cannot be loaded ({type(error).__name__}: {error}); install it with `{INSTALL}`, "
            f"or set {key} to {otherwise}"
        ) from error


def fused_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """TE's AdamW with one kernel launch for many tensors; fp32 moments `exp_avg` and `exp_avg_sq`, its step counted in its groups."""
    from transformer_engine.pytorch.optimizers import FusedAdam  # noqa: PLC0415 - an optional package

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)
