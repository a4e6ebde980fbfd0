"""A step that is not finite: the first layer and tensor are named, on every rank alike, and nothing is changed by looking for them."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import ranks
import torch
from parity.engines import Layout, Run, batch, build_engine, outcome, train
from torch import Tensor, nn

from megagate.engine.base import Engine
from megagate.engine.nonfinite import first_nonfinite
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext


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


FLAWS = {
    "weight": partial(changed, name="layers.1.attention.q.weight", place=35, value=torch.nan),
    "expert": partial(changed, name="layers.0.moe.experts.down", place=2 * 32 * 16 + 19, value=-torch.inf),
    "output": partial(changed_output, name="layers.1.ffn_norm", change=with_one_inf),
    "gradient": partial(changed_output, name="layers.0.ffn_norm", change=overflow, backward=True),
    "weight gradient": partial(changed_gradient, name="layers.1.moe.experts.gate_up", change=overflow),
    "norm": partial(changed_gradient, name="layers.1.moe.experts.gate_up", change=lambda gradient: gradient * 1e28),
}
TOLD = {
    "weight": r"the weight layers\.1\.attention\.q\.weight is not finite \(1 nan and 0 inf of \d+\)",
    "expert": r"the weight layers\.0\.moe\.experts\.down of expert {expert} is not finite \(0 nan and 1 inf of \d+\)",
    "output": r"layers\.1\.ffn_norm's output is not finite \(0 nan and 1 inf of \d+\)",
    "gradient": r"the gradient of layers\.0\.ffn_norm's output and layers\.0\.moe\.router's input is not finite \(\d+ nan .*\)",
    "weight gradient": r"the gradient of layers\.1\.moe\.experts\.gate_up is not finite \(\d+ nan and \d+ inf of \d+\)",
    "norm": "not in the passes of a micro-step, done again, but where gradients are summed over .*, or in their norm",
}
FORWARD_ALONE = "not in the forward pass, done again; gradients cannot be looked at under ZeRO-3"


def train_with_flaws(
    context: RankContext | None, run: Run, layout: Layout, names: bool, flaws: tuple[str, ...] = tuple(FLAWS)
) -> tuple[dict[str, str], object]:
    """Steps between which the last rank spoils one thing after the other: what it was, where asked, and all that there is afterwards."""
    mesh = ParallelMesh.build(tp=layout.tp, ep=layout.ep) if context else ParallelMesh.single()
    engine = build_engine(run, layout, mesh)
    steps, told = train(engine, [0], lr=run.lr), {}
    for flaw in flaws:
        with FLAWS[flaw](engine) if mesh.world.rank == mesh.world.size - 1 else nullcontext():
            assert not engine.train_step(*batch(1, mesh), lr=run.lr).applied
            told[flaw] = first_nonfinite(engine, *batch(1, mesh)) if names else ""
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in engine.model.parameters())
    steps += train(engine, [2], lr=run.lr)
    assert all(one.applied for one in steps)
    one = outcome(engine, steps, next_step=3)
    return told, (one.steps, one.digest, one.val_loss, engine.applied_steps, [piece[3].tolist() for piece in one.pieces])


@pytest.mark.parametrize(
    ("run", "layout", "flaws"),
    [
        (Run(optimizer="adamw", fp8="delayed"), Layout(2, ep=2), ("weight", "output", "gradient", "weight gradient", "norm")),
        (Run(optimizer="adamw", dtype="bf16", recompute=True, fp8="blockwise"), Layout(2, tp=2, ep=2, zero_stage=2), tuple(FLAWS)),
    ],
    ids=["zero1", "zero2"],
)
def test_the_first_is_named_and_nothing_is_changed(run, layout, flaws):
    """Also in FP8, whose delayed scaling must not record what is looked at."""
    named, silent = (ranks.run_ranks(train_with_flaws, layout.world_size, run, layout, names, flaws) for names in (True, False))
    assert named[0][0] == named[1][0] and list(named[0][0]) == list(flaws)
    for flaw, told in named[0][0].items():
        assert re.fullmatch(TOLD[flaw].format(expert=6) + ("" if flaw == "norm" else ", on rank 1"), told), (flaw, told)
    assert [after for _, after in named] == [after for _, after in silent]


def test_stage_3_looks_at_the_forward_pass():
    what = Run(optimizer="adamw"), Layout(2, tp=2, ep=2, zero_stage=3)
    named, silent = (ranks.run_ranks(train_with_flaws, 2, *what, names, ("weight", "output", "gradient")) for names in (True, False))
    told = named[0][0]
    assert told == named[1][0] and [after for _, after in named] == [after for _, after in silent]
    assert re.match(r"layers\.1\.attention\S* (in|out)put is not finite", told["weight"])
    assert told["output"].startswith("layers.1.ffn_norm's output is not finite")
    assert told["gradient"] == FORWARD_ALONE


def test_the_reference_names_it_too():
    run = Run(optimizer="adamw")
    named, after = train_with_flaws(None, run, Layout(), True)
    for flaw, told in named.items():
        assert re.fullmatch(TOLD[flaw].format(expert=2), told), (flaw, told)
    assert after == train_with_flaws(None, run, Layout(), False)[1]


def test_an_infinite_weight_saturates_where_its_scale_is_of_earlier_steps():
    """As Transformer Engine's own delayed scaling: nothing is there to be named."""
    engine = build_engine(Run(fp8="delayed"), Layout(), ParallelMesh.single())
    with FLAWS["expert"](engine):
        step = engine.train_step(*batch(1, engine.mesh), lr=0.0)
        assert step.applied and math.isfinite(step.loss)
