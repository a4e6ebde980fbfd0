"""The optimizer over parameter groups, of whichever implementation.

All implementations hold the same moments under the same names. Where they count steps, for Adam's bias correction, differs:

| | the count lies in | and grows by one |
|---|---|---|
| torch | a tensor for each parameter | with that parameter's steps |
| deepspeed | an integer for each parameter | for the last parameter of a group alone, whose count is the group's |
| apex | the group | at each call with parameters, also where none has a gradient |
| te | the group | at each call, also where the group has no parameters: ZeRO-3 calls once for every part of every group |

The engine knows how many steps were applied, so all but torch's are told before each step (`_count`), and a resume needs nothing more.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megagate.backend import apex, te
from megagate.config.run import OptimConfig
from megagate.parallel.init import require_gpu

KEY = "optim.implementation"
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""The per-element state of each optimizer, by its PyTorch names; fp32 masters come on top."""


class MakeAdam(Protocol):
    """Makes an AdamW: decoupled decay, bias correction, fp32 moments named as PyTorch's."""

    def __call__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer: ...


def clipping(norm: float, limit: float) -> float:
    """What gradients of this global norm are divided by; 0 is no limit. Both DeepSpeed and PyTorch add 1e-6."""
    return max(1.0, (norm + 1e-6) / limit) if limit else 1.0


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
    """PyTorch's optimizer, whatever `config.implementation` says; its learning rate is set before every step."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def build_implementation(
    groups: list[dict[str, Any]], config: OptimConfig, *, applied_steps: Callable[[], int], deepspeed_adam: MakeAdam
) -> torch.optim.Optimizer:
    """The optimizer of `config.implementation`; its learning rate is set before every step.

    Args:
        groups: See `parameter_groups`.
        config: With `adamw`, unless the implementation is torch's.
        applied_steps: How many steps the engine has applied so far.
        deepspeed_adam: Makes DeepSpeed's, which is the engine's to import.
    """
    if config.implementation == "torch":
        return build_optimizer(groups, config)
    makers: dict[str, MakeAdam] = {"apex": apex.fused_adam, "te": te.fused_adam, "deepspeed": deepspeed_adam}
    optimizer = makers[config.implementation](groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    optimizer.register_step_pre_hook(lambda *_: _count(optimizer, applied_steps()))
    return optimizer


def require_implementation(config: OptimConfig, *, device: torch.device, load_deepspeed: Callable[[], None]) -> None:
    """Refuse, before anything is built or written, an implementation that this rank cannot have.

    Args:
        config: Names the implementation.
        device: Of this rank.
        load_deepspeed: Compiles and loads DeepSpeed's kernel, or refuses.

    Raises:
        ConfigError: No GPU, or the package is not there.
        RunError: DeepSpeed's kernel cannot be compiled.
    """
    if config.implementation == "torch":
        return
    require_gpu(KEY, config.implementation, device=device)
    if config.implementation == "apex":
        apex.require(KEY, kernels=apex.OPTIMIZER_KERNELS, otherwise="torch")
    elif config.implementation == "te":
        te.load(KEY, "torch")
    else:
        load_deepspeed()


def _count(optimizer: torch.optim.Optimizer, applied_steps: int) -> None:
    """Tell an optimizer that counts steps in integers how many it has made."""
    for group in optimizer.param_groups:
        group["step"] = applied_steps
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and "step" in state:
                state["step"] = applied_steps


def fresh_state(parameter: Tensor, config: OptimConfig, *, applied_steps: int) -> dict[str, Any]:
    """The state that the optimizer keeps for one parameter after some steps, moments still zero; empty before the first step."""
    if not applied_steps or not MOMENTS[config.name]:
        return {}
    moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS[config.name]}
    counts: dict[str, Any] = {"torch": torch.tensor(float(applied_steps), device=parameter.device), "deepspeed": applied_steps}
    return ({"step": counts[config.implementation]} if config.implementation in counts else {}) | moments
