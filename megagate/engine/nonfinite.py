"""Where numbers that are not finite come from: a step's passes are done again, and what goes between the model's parts is looked at.

The order is that of computation: weights first, then the forward pass of each micro-step, its loss, and its backward pass. What comes
behind a part that was spoilt is spoilt as well, so the first is the one to name. All ranks look at the same places in the same order,
so the first place over all of them is the first of all, whichever ranks its numbers have reached since.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megagate.backend.base import KeepsState
from megagate.engine.base import Engine
from megagate.parallel.comm import gather_objects
from megagate.parallel.mesh import Axis


def first_nonfinite(engine: Engine, tokens: Tensor, labels: Tensor) -> str:
    """The layer and the tensor that were the first not to be finite in a step, or where none was found; the same on all ranks. Collective.

    For the last step, which was not applied: weights must be those that it had. Delayed scaling has the scales again that each micro-step
    had. An infinity that such a scale saturates is finite from there on; `saturated.py` tells of those whose
    step comes to a finite end.

    Costs a second step, and no gradient is kept. Nothing is changed: neither what the optimizer nor what the model keeps.

    Shapes: tokens and labels as in `Engine.train_step`.
    """
    world = engine.mesh.world
    found = _first(_of_weights(engine), world)
    if found:
        return found
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    with torch.set_grad_enabled(engine.replays_backward), _Watch(engine.model) as watch, closing(engine.replay(tokens, labels)) as losses:
        for loss in losses:
            watch.look("the loss of these outputs", loss.detach())
            found = _first(watch.found, world)
            if found:
                return found
            if not engine.replays_backward:
                continue
            watch.is_backward = True
            torch.autograd.grad(loss, parameters, allow_unused=True)  # not `backward`: nothing of it may reach ZeRO
            watch.is_backward = False
            found = _first(watch.found, world)
            if found:
                return found
    if not engine.replays_backward:
        return "not in the forward pass, done again; gradients cannot be looked at under ZeRO-3"
    return "not in the passes of a micro-step, done again, but where gradients are summed over micro-steps or ranks, or in their norm"


class _Found(NamedTuple):
    """A tensor that is not finite.

    Args:
        place: Its number among those that were looked at.
        what: What it is of its parts: empty, or `the gradient of `.
        names: The parts of the model that it lies between.
        count: Of its numbers.
    """

    place: int
    what: str
    names: tuple[str, ...]
    count: str

    def __str__(self) -> str:
        return f"{self.what}{' and '.join(self.names)} is not finite ({self.count})"


def _first(found: _Found | None, world: Axis) -> str:
    """The first of all ranks' findings; empty where there is none. Collective."""
    all_found = [(one, rank) for rank, one in enumerate(gather_objects(found, world)) if one is not None]
    if not all_found:
        return ""
    one, rank = min(all_found, key=lambda item: (item[0].place, item[1]))
    return f"the first: {one}" + (f", on rank {rank}" if world.size > 1 else "")


def _of_weights(engine: Engine) -> _Found | None:
    """Of what this rank has; under ZeRO-3 that is nothing between steps."""
    for place, (name, parameter) in enumerate(engine.model.named_parameters()):
        weight, shard = parameter.detach(), engine.labels[name].shard
        count = _flaws(weight)
        if count and shard.axis == "ep":
            first = int((~weight.isfinite()).flatten(1).any(1).nonzero()[0])
            return _Found(place, "the weight ", (f"{name} of expert {shard.offset[0] + first}",), count)
        if count:
            return _Found(place, "the weight ", (name,), count)
    return None


class _Watch:
    """Hooks on the innermost parts of a model, while the context lasts."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.found: _Found | None = None
        self.is_backward = False
        self._looked = 0
        self._same: Tensor | None = None  # the gradient that was found, while its own hooks run
        self._stack = ExitStack()

    def __enter__(self) -> "_Watch":
        for name, module in self.model.named_modules():
            if _is_innermost(module):
                self._hold(module.register_forward_pre_hook(lambda module, args, name=name: self._entered(name, module, args)))
                self._hold(module.register_forward_hook(lambda module, args, out, name=name: self._left(name, out)))
        for name, parameter in self.model.named_parameters():
            self._hold(parameter.register_hook(lambda grad, name=name: self._of_parameter(name, grad)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self, name: str, tensor: Tensor) -> None:
        """Take note of the tensor if it is the first that is not finite."""
        self._looked += 1
        if self.found is None:
            count = _flaws(tensor)
            if count:
                self.found = _Found(self._looked, "the gradient of " if self.is_backward else "", (name,), count)
                self._same = tensor if self.is_backward else None
        elif self._same is not None and (self._same.data_ptr(), self._same.shape) == (tensor.data_ptr(), tensor.shape):
            self.found = self.found._replace(names=(*self.found.names, name))  # hooks of one tensor run one after the other
        else:
            self._same = None

    def _hold(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _entered(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        # A site's other arguments are weights, which have been looked at, and a norm.
        self._forward(name, "input", args[:1] if isinstance(module, KeepsState) else args)

    def _left(self, name: str, out: Any) -> None:
        self._forward(name, "output", out)

    def _forward(self, name: str, which: str, values: Any) -> None:
        if self.is_backward:  # a recomputed block, whose numbers were looked at before
            return
        for tensor in _tensors(values):
            self.look(f"{name}'s {which}", tensor.detach())
            if tensor.grad_fn is not None:
                self._hold(tensor.register_hook(lambda grad: self.look(f"{name}'s {which}", grad)))

    def _of_parameter(self, name: str, grad: Tensor) -> Tensor:
        self.look(name, grad)
        return grad.new_zeros(()).expand(grad.shape)  # so that no model's worth of gradients is held


def _is_innermost(module: nn.Module) -> bool:
    """Whether it computes, and none of its children does."""
    computes = [type(one).forward is not nn.Module.forward for one in module.modules()]
    return computes[0] and not any(computes[1:])


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those of floating point in nested tuples and lists."""
    if isinstance(values, Tensor):
        if values.is_floating_point() and not isinstance(values, nn.Parameter):
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _flaws(tensor: Tensor) -> str:
    """How many of its numbers are not finite; empty where all are."""
    finite = int(tensor.isfinite().sum())
    nans = int(tensor.isnan().sum()) if finite < tensor.numel() else 0
    return f"{nans} nan and {tensor.numel() - finite - nans} inf of {tensor.numel()}" if finite < tensor.numel() else ""
