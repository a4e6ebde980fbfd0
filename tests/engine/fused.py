"""Fused optimizers on CPUs: their own Python, or what stands in for it, around a kernel in PyTorch where theirs is a GPU's.

DeepSpeed's class is the real one, which is installed. apex and Transformer Engine are not: `GroupCounted` and `EmptyToo` keep their books
as their sources do, and are held to them where they are (`tests/backend/test_backend_apex.py`, `tests/te/test_te_optimizer.py`).
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megagate.config.hardware import TE_VERSION
from megagate.config.run import OptimizerImplementation


def multi_tensor_adam(
    chunk: int, skip: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, step: int, *rest: float
) -> None:
    """What the CUDA kernel of that name computes: decoupled decay, gradients, weights and moments in `lists`.

    The rest: mode (1: decoupled decay), whether to correct the bias, weight decay.
    """
    mode, bias_correction, decay = rest
    assert mode == 1 and bias_correction == 1 and type(step) is int
    for grad, weight, first, second in zip(*lists, strict=True):
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps) + decay * weight
        weight.sub_(update, alpha=lr)


class GroupCounted(torch.optim.Optimizer):
    """Counts steps in its groups, as apex's FusedAdam does: where a group has parameters, also without a gradient."""

    counts_empty = False

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, *, bias_correction: bool, adam_w_mode: bool):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "bias_correction": bias_correction}
        super().__init__(params, defaults)
        self.adam_w_mode = int(adam_w_mode)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["params"] or self.counts_empty:
                group["step"] = group.get("step", 0) + 1
            lists: list[list[Tensor]] = [[], [], [], []]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state and (self.counts_empty or parameter.grad is not None):
                    state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                if parameter.grad is not None:
                    for one, tensor in zip(lists, (parameter.grad, parameter, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                        one.append(tensor)
            if lists[0]:
                how = self.adam_w_mode, int(group["bias_correction"]), group["weight_decay"]
                multi_tensor_adam(0, torch.zeros(1), lists, group["lr"], *group["betas"], group["eps"], group["step"], *how)


class EmptyToo(GroupCounted):
    """As Transformer Engine's does: at every call, also where a group has no parameters; moments come with the first call."""

    counts_empty = True


@contextmanager
def on_cpu(implementation: OptimizerImplementation) -> Iterator[None]:
    """Inside the context that implementation can be built and stepped on a CPU."""
    if implementation == "apex":
        with packages({"apex": {}, "apex.optimizers": {"FusedAdam": GroupCounted}}):
            yield
    elif implementation == "te":
        above = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.router")
        modules = {name: {} for name in above} | {"transformer_engine.pytorch.optimizers": {"FusedAdam": EmptyToo}}
        with packages(modules), replaced(vars(importlib.metadata), "version", lambda name: TE_VERSION):
            yield
    elif implementation == "deepspeed":
        from deepspeed.ops.adam import fused_adam

        kernels = SimpleNamespace(multi_tensor_adam=torch.no_grad()(multi_tensor_adam))
        with replaced(vars(fused_adam), "FusedAdamBuilder", lambda: SimpleNamespace(load=lambda: kernels)):
            yield
    else:
        yield


@contextmanager
def packages(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Modules by name, packages before what is in them, with these attributes: what `import` finds for a while."""
    with ExitStack() as stack:
        for name, attributes in modules.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            stack.enter_context(replaced(sys.modules, name, module))
            above, _, last = name.rpartition(".")
            if above in modules:
                setattr(sys.modules[above], last, module)
        yield


@contextmanager
def replaced(where: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """`where[key]` is `value` for a while."""
    missing = object()
    before = where.get(key, missing)
    where[key] = value
    try:
        yield
    finally:
        if before is missing:
            del where[key]
        else:
            where[key] = before


CALLS = [  # the gradients of two parameters in two groups, one of them empty for a while, as ZeRO-3 leaves it
    ([1.0, 2.0], [0.5]),
    (None, None),
    ([0.3, -1.0], "empty"),
    ([0.3, 1.0], [2.0]),
    (None, [1.0]),
]


def books(make: Any) -> list[Any]:
    """Weights, states and counts after each call of an optimizer."""
    parameters = [nn.Parameter(torch.tensor(value)) for value in ([1.0, -2.0], [3.0])]
    groups = [{"params": [one], "weight_decay": decay} for one, decay in zip(parameters, (0.1, 0.0), strict=True)]
    optimizer, kept = make(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, adam_w_mode=True, bias_correction=True), []
    for gradients in CALLS:
        for group, parameter, gradient in zip(optimizer.param_groups, parameters, gradients, strict=True):
            group["params"] = [] if gradient == "empty" else [parameter]
            parameter.grad = torch.tensor(gradient) if isinstance(gradient, list) else None
        optimizer.step()
        states = [{name: value.clone() for name, value in optimizer.state.get(one, {}).items()} for one in parameters]
        kept.append(([group.get("step") for group in optimizer.param_groups], [one.detach().clone() for one in parameters], states))
        optimizer.zero_grad()
    return kept
