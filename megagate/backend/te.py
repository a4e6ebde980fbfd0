"""Transformer Engine (TE) 2.20.2 behind the seam: the only file that imports it, and only where its kernels are asked for."""

from typing import Any

import torch

from megagate.errors import ConfigError

VERSION = "2.20.2"
INSTALL = f"pip install --no-build-isolation 'transformer_engine[pytorch]=={VERSION}'"


def load(key: str = "precision.backend", otherwise: str = "native") -> Any:
    """`transformer_engine.pytorch`.

    Args:
        key: The config key that asks for it.
        otherwise: The value of it that does not.

    Raises:
        ConfigError: It is not there, or not with its libraries; with the command that installs it.
    """
    try:
        from transformer_engine import pytorch  # noqa: PLC0415 - an optional package
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{key} (te) needs Transformer Engine {VERSION} with its PyTorch extension, which cannot be imported here ({error}); "
            f"install it by `{INSTALL}`, or set {key} {otherwise}"
        ) from error
    return pytorch


def fused_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """TE's AdamW with one kernel launch for many tensors; fp32 moments `exp_avg` and `exp_avg_sq`, its step counted in its groups.

    Source: optimizers/fused_adam.py:40.
    """
    te = load("optim.implementation", "torch")
    return te.optimizers.FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)
