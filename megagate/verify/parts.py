"""Parts of a model, fed the reference's inputs and gradients, and the whole of it: what comes out, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagate.model.lm import LanguageModel

Results = dict[tuple[str, str, str], Tensor]
"""By (part, `output` | `input gradient` | `weight gradient`, parameter)."""


@dataclass
class PartCall:
    """What went through a part.

    Args:
        x: Hidden states.
        others: RoPE's table, documents; nothing for a feed-forward.
        norm: Name of the norm that it takes along; empty where there is none.
        grad: The gradient that came back.
    """

    x: Tensor
    others: tuple[Any, ...]
    norm: str
    grad: Tensor | None = None


def parts_of(model: LanguageModel) -> dict[str, nn.Module]:
    """Attention and feed-forward of each block."""
    parts: dict[str, nn.Module] = {}
    for index, block in enumerate(model.layers):
        parts[f"layers.{index}.attention"] = block.attention
        parts[f"layers.{index}.feed_forward"] = block.moe if block.is_moe else block.ffn
    return parts


@contextmanager
def recorded_parts(model: LanguageModel) -> Iterator[dict[str, PartCall]]:
    """Inside the context what goes through each part, and back, is kept."""
    calls: dict[str, PartCall] = {}
    norms = {id(module): name for name, module in model.named_modules()}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            norm = kwargs.get("norm")
            calls[name] = call = PartCall(args[0].detach(), args[1:], norms[id(norm)] if norm is not None else "")
            _first(output).register_hook(lambda grad: setattr(call, "grad", grad.detach()))

        return hook

    handles = [part.register_forward_hook(record(name), with_kwargs=True) for name, part in parts_of(model).items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def through_part(model: LanguageModel, name: str, call: PartCall) -> Results:
    """Output, gradient of the input and gradients of the weights of a part. Collective."""
    part = parts_of(model)[name]
    x = call.x.detach().requires_grad_()
    extra = {"norm": model.get_submodule(call.norm)} if call.norm else {}
    with torch.enable_grad(), model.backend.running():
        out = _first(part(x, *call.others, **extra))
    weights = dict(part.named_parameters())
    grad_x, *grads = torch.autograd.grad(out, [x, *weights.values()], call.grad, allow_unused=True)
    results = {(name, "output", ""): out.detach(), (name, "input gradient", ""): grad_x}
    return results | {(name, "weight gradient", key): grad for key, grad in zip(weights, grads, strict=True) if grad is not None}


def through_model(model: LanguageModel, tokens: Tensor, labels: Tensor) -> tuple[Results, float]:
    """Outputs of all parts, gradients of all parameters, and the mean loss of one pass. Collective.

    Shapes: tokens and labels [b, s].
    """
    results: Results = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            results.setdefault((name, "output", ""), _first(output).detach().clone())  # not again where it is recomputed

        return hook

    seen = {"embedding": model.embedding, **parts_of(model), "final_norm": model.final_norm}
    handles = [part.register_forward_hook(record(name)) for name, part in seen.items()]
    model.zero_grad(set_to_none=True)
    try:
        ce_sum = model(tokens, labels).ce_sum
        loss = ce_sum / max(1, tokens.numel())
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    model.backend.after_backward(model)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name, "weight gradient", ""] = parameter.grad.detach()
    model.zero_grad(set_to_none=True)
    return results, loss.item()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
