"""The products of a model: what went through each of them in a pass, and the same numbers through another backend's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megagate.backend.base import AttentionCore, Backend, ColumnLinears, GroupedLinear, Norm, Part, RowLinear
from megagate.backend.documents import Documents
from megagate.backend.native import NativeBackend
from megagate.config.precision_rules import MX_SIZE_MULTIPLE
from megagate.nn.norm import RMSNorm
from megagate.parallel.mesh import Axis, ParallelMesh

Kind = Literal["column", "row", "grouped", "attention", "norm"]


@dataclass
class Call:
    """What went through a product.

    Args:
        x: Its input; of a product that norms first, before the norm.
        weights: Its weights, by name; of attention, keys and values.
        grads: The gradients that came back, one for each output.
        normed: The input after the norm; `x` where there is none.
        norm: The name of the norm in the model; empty where there is none.
        ends: Of a grouped product.
        documents: Of attention.
    """

    x: Tensor
    weights: dict[str, Tensor]
    grads: list[Tensor] = field(default_factory=list)
    normed: Tensor | None = None
    norm: str = ""
    ends: Tensor | None = None
    documents: Documents | None = None


class Passed(NamedTuple):
    """What comes out of a product, by name of output or weight, and of an expert of a grouped product.

    Args:
        outputs: Results.
        inputs: Gradients of the input.
        weights: Gradients of the weights; the norm's is called `norm`.
    """

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]


class Watched:
    """A product of the reference that keeps its first call."""

    def __init__(self, kind: Kind, site: Any, parts: Sequence[Part] = ()):
        self.kind, self.site, self.parts = kind, site, list(parts)
        self.call: Call | None = None
        self.norm: Norm | None = None

    def __call__(self, x: Tensor, *others: Any) -> Any:
        """The product."""
        results = self.site(x, *others)
        if self.call is None and torch.is_grad_enabled():
            self._keep(x, others, results)
        return results

    def _keep(self, x: Tensor, others: Sequence[Any], results: Any) -> None:
        if self.kind == "column":
            weights, self.norm = others[0], others[1] if len(others) > 1 else None
            names, outputs, normed = [part.name for part in self.parts], results[0], results[1].detach()
        else:
            names, weights = (["k", "v"], others[:2]) if self.kind == "attention" else (["weight"], others[:1])
            outputs, normed = [results], None
        call = Call(x.detach(), {name: w.detach() for name, w in zip(names, weights, strict=True)}, [None] * len(outputs), normed)
        call.ends = others[1] if self.kind == "grouped" else None
        call.documents = others[2] if self.kind == "attention" else None
        for index, output in enumerate(outputs):
            call.grads[index] = torch.zeros_like(output)  # where nothing comes back
            output.register_hook(lambda grad, index=index: call.grads.__setitem__(index, grad.detach()))
        self.call = call


class WatchedBackend(NativeBackend):
    """PyTorch's kernels, whose products keep what went through them."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.row_multiple = MX_SIZE_MULTIPLE  # the largest, which every recipe's grouped products take

    def column_linears(self, width: int, parts: Sequence[Part], **how: Any) -> ColumnLinears:
        """See `Backend`."""
        return Watched("column", super().column_linears(width, parts, **how), parts)

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        """See `Backend`."""
        return Watched("row", super().row_linear(width, rows, tp=tp))

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """See `Backend`."""
        return Watched("grouped", super().grouped_linear(width, rows, num_experts=num_experts, mesh=mesh))

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        """See `Backend`."""
        return Watched("attention", super().attention_core(heads, kv_heads, width))


def watch_norms(model: nn.Module) -> dict[str, Watched]:
    """The norms of the model as products that keep their first call, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            watched = found[name] = Watched("norm", None)

            def keep(module: RMSNorm, args: tuple[Tensor], output: Tensor, watched: Watched = watched) -> None:
                if watched.call is None and torch.is_grad_enabled():
                    watched._keep(args[0], [module.weight], output)

            module.register_forward_hook(keep)
    return found


def watched_products(model: nn.Module) -> dict[str, Watched]:
    """The products of a model that was built with a `WatchedBackend` and has made a pass, by name."""
    norms = {id(module): name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    found = {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Watched)
    }
    for watched in found.values():
        watched.call.norm = norms[id(watched.norm)] if watched.norm is not None else ""
    return found


def product_of(model: nn.Module, name: str) -> Any:
    """The site of another model by its name."""
    parent, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(parent), attribute)


def through(kind: Kind, site: Any, call: Call, *, backend: Backend, norm: RMSNorm | None = None) -> Passed:
    """The numbers of a call through a product, and its gradients through it backwards. Collective.

    Args:
        kind: Of product.
        site: The product; of kind `norm`, the module.
        call: The numbers.
        backend: Whose product it is.
        norm: The norm that it takes along, of the same model.
    """
    x = call.x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in call.weights.values()]
    with torch.enable_grad(), backend.running():
        if kind == "column":
            outputs = site(x, weights, norm)[0]
        elif kind == "norm":
            outputs, weights = [site(x)], [site.weight]
        else:
            extra = {"grouped": [call.ends], "attention": [call.documents]}.get(kind, [])
            outputs = [site(x, *weights, *extra)]
    wanted = [x, *weights, *([norm.weight] if norm is not None else [])]
    given = [grad.to(out.dtype) for grad, out in zip(call.grads, outputs, strict=True)]
    grad_x, *grads = torch.autograd.grad(list(outputs), wanted, given)
    names = [*call.weights, *(["norm"] if norm is not None else [])]
    outputs = dict(zip(call.weights if kind == "column" else [""], [out.detach() for out in outputs], strict=True))
    passed = Passed(outputs, {"": grad_x}, dict(zip(names, grads, strict=True)))
    return _by_expert(passed, call.ends) if kind == "grouped" else passed


def _by_expert(passed: Passed, ends: Tensor) -> Passed:
    """Each expert's part by itself, so that what is wrong with one does not drown in the others."""
    borders = [0, *ends.tolist()]
    rows = [slice(start, end) for start, end in zip(borders, borders[1:], strict=False)]

    def cut(tensors: Mapping[str, Tensor], places: Sequence[Any]) -> dict[str, Tensor]:
        (tensor,) = tensors.values()
        return {f"expert {e}": tensor[place] for e, place in enumerate(places)}

    return Passed(cut(passed.outputs, rows), cut(passed.inputs, rows), cut(passed.weights, range(len(rows))))
