"""Numbers that are not finite, planted in an engine; and infinities that delayed scaling saturates, with what is told of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from parity.engines import batch
from torch import Tensor, nn

from megagate.engine.base import Engine, StepResult


@contextmanager
def changed(engine: Engine, name: str, place: int, value: float) -> Iterator[None]:
    """One number of a weight of this rank is another one for a while; the master keeps it."""
    parameter = dict(engine.model.named_parameters())[name]
    data = getattr(parameter, "ds_tensor", parameter).data.view(-1)  # stage 3 keeps a partition of it
    before = data[place].clone()
    data[place] = value
    yield
    data[place] = before


@contextmanager
def changed_output(engine: Engine, name: str, change: Callable[[Tensor], Tensor], *, backward: bool = False) -> Iterator[None]:
    """What a part of the model gives, or the gradient that it is given."""

    def alter(module: nn.Module, args: object, out: Tensor) -> Tensor:
        if not backward:
            return change(out)
        if out.requires_grad:
            out.register_hook(change)
        return out

    handle = engine.model.get_submodule(name).register_forward_hook(alter)
    yield
    handle.remove()


@contextmanager
def changed_gradient(engine: Engine, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Of a weight, from its product."""
    handle = dict(engine.model.named_parameters())[name].register_hook(change)
    yield
    handle.remove()


def overflow(gradient: Tensor) -> Tensor:
    return gradient * 1e30 * 1e30


def with_one_inf(out: Tensor) -> Tensor:
    return torch.cat([out.flatten()[:-1], out.new_full((1,), torch.inf)]).view_as(out)


@contextmanager
def changed_input(engine: Engine, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What a part of the model is given first in a step, which is its first micro-step alone."""
    handle = engine.model.get_submodule(name).register_forward_pre_hook(lambda _, args: (handle.remove(), (change(args[0]), *args[1:]))[1])
    yield


def first_inf(x: Tensor) -> Tensor:
    return with_one_inf(x.flip(0)).flip(0)


SATURATING = {
    "weight": partial(changed, name="layers.1.attention.q.weight", place=35, value=torch.inf),
    "expert": partial(changed, name="layers.0.moe.experts.down", place=2 * 32 * 16 + 19, value=-torch.inf),
    "input": partial(changed_input, name="layers.1.attention.out", change=with_one_inf),
    "expert's input": partial(changed_input, name="layers.1.moe.experts.out", change=first_inf),
    "gradient": partial(changed_output, name="layers.0.attention.out", change=with_one_inf, backward=True),
    "expert's gradient": partial(changed_output, name="layers.0.moe.experts.project", change=first_inf, backward=True),
}
HELD = {
    "weight": "layers.1.attention.project's weight held an infinity",
    "expert": "layers.0.moe.experts.out's weight (expert {third}) held an infinity",
    "input": "layers.1.attention.out's input held an infinity",
    "expert's input": "layers.1.moe.experts.out's input (expert {first}) held an infinity",
    "gradient": "the gradient of layers.0.attention.out's output held an infinity",
    "expert's gradient": "the gradient of layers.0.moe.experts.project's output (expert {first}) held an infinity",
}


def saturate_each(engine: Engine) -> dict[str, StepResult]:
    """A step with each infinity on the last rank, and one without after each."""
    mesh = engine.mesh
    steps = {"before": engine.train_step(*batch(1, mesh), lr=0.0)}
    for flaw, plant in SATURATING.items():
        with plant(engine) if mesh.world.rank == mesh.world.size - 1 else nullcontext():
            steps[flaw] = engine.train_step(*batch(1, mesh), lr=0.0)
        steps[f"after {flaw}"] = engine.train_step(*batch(1, mesh), lr=0.0)
    return steps


def held(ep: int) -> dict[str, str]:
    """What is told of each with 8 experts."""
    first = 8 // ep * (ep - 1)
    return {flaw: told.format(first=first, third=first + 2) for flaw, told in HELD.items()}
