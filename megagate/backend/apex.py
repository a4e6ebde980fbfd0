"""NVIDIA's apex: the only file that imports it, where its kernels are asked for.

Written against github.com/NVIDIA/apex 6424da3 (2026-07-08). No kernel of it has run in development, which had no GPU. What the tests hold:
that each call here fits its own signatures (`tests/backend/apex_signatures.json`), and, where a checkout of it is on PYTHONPATH, its real
Python with stand-ins for its compiled kernels.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from megagate.config import hardware
from megagate.errors import ConfigError

INSTALL = hardware.INSTALL["apex"]
"""As apex's README has it. Both flags are needed: without them it installs, and has none of the kernels."""

OPTIMIZER_KERNELS, NORM_KERNELS = "amp_C", "fused_layer_norm_cuda"
"""apex's compiled modules, which APEX_CUDA_EXT=1 builds."""


def require(key: str, *, kernels: str, otherwise: str) -> None:
    """Refuse a config that wants apex where it is not, another project of that name is, or it was built without its kernels.

    Args:
        key: The config key whose value is `apex`.
        kernels: The compiled module that is needed.
        otherwise: The value of `key` that needs no apex.

    Raises:
        ConfigError: With what is missing and the command that installs it.
    """
    package = "apex.optimizers" if kernels == OPTIMIZER_KERNELS else "apex.normalization.fused_layer_norm"
    for module, lacks in ((package, "NVIDIA's apex, which is not installed"), (kernels, "apex's CUDA kernels, without which it was built")):
        try:
            importlib.import_module(module)
        except Exception as error:  # another project called apex fails in ways of its own
            raise ConfigError(
                f"{key} (apex) needs {lacks} ({type(error).__name__}: {error}); install it with `{INSTALL}` "
                f"(PyPI's package `apex` is another project), or set {key} to {otherwise}"
            ) from error


def fused_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """apex's AdamW with one kernel launch for many tensors; fp32 moments `exp_avg` and `exp_avg_sq`, its step counted in its groups."""
    from apex.optimizers import FusedAdam  # noqa: PLC0415 - an optional package

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension by one kernel, in the dtype of `x`, which has to be on a GPU.

    The form of mixed dtypes: the one of a single dtype reads the weight in the dtype of `x`, so that the weight, and its gradient, which is
    summed over ranks, would be rounded to bf16. The mixed one multiplies by the fp32 weight and gives fp32, which is rounded once.
    """
    from apex.normalization.fused_layer_norm import mixed_dtype_fused_rms_norm_affine  # noqa: PLC0415 - an optional package

    return mixed_dtype_fused_rms_norm_affine(x, weight.float(), (x.shape[-1],), eps=eps).to(x.dtype)
