"""A step that is not finite: the first layer and tensor are named, on every rank alike, and nothing is changed by looking for them."""

import math
import re
from contextlib import nullcontext
from functools import partial

import pytest
import ranks
import torch
from parity.engines import Layout, Run, batch, build_engine, outcome, train
from parity.infinities import changed, changed_gradient, changed_output, held, overflow, saturate_each, with_one_inf

from megagate.backend.base import Kept
from megagate.engine.base import StepResult
from megagate.engine.nonfinite import first_nonfinite
from megagate.engine.saturated import SaturationWatch
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.shard import Shard
from megagate.parallel.spawn import RankContext

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
        expected = TOLD[flaw].format(expert=6)
        assert re.fullmatch(expected if flaw == "norm" else f"the first: {expected}, on rank 1", told), (flaw, told)
    assert [after for _, after in named] == [after for _, after in silent]


def test_stage_3_looks_at_the_forward_pass():
    what = Run(optimizer="adamw"), Layout(2, tp=2, ep=2, zero_stage=3)
    named, silent = (ranks.run_ranks(train_with_flaws, 2, *what, names, ("weight", "output", "gradient")) for names in (True, False))
    told = named[0][0]
    assert told == named[1][0] and [after for _, after in named] == [after for _, after in silent]
    assert re.match(r"the first: layers\.1\.attention\S* (in|out)put is not finite", told["weight"])
    assert told["output"].startswith("the first: layers.1.ffn_norm's output is not finite")
    assert told["gradient"] == FORWARD_ALONE


def test_the_reference_names_it_too():
    run = Run(optimizer="adamw")
    named, after = train_with_flaws(None, run, Layout(), True)
    for flaw, told in named.items():
        assert re.fullmatch(("" if flaw == "norm" else "the first: ") + TOLD[flaw].format(expert=2), told), (flaw, told)
    assert after == train_with_flaws(None, run, Layout(), False)[1]


def saturated(context: RankContext | None, layout: Layout) -> dict[str, StepResult]:
    mesh = ParallelMesh.build(tp=layout.tp, ep=layout.ep) if context else ParallelMesh.single()
    return saturate_each(build_engine(Run(fp8="delayed"), layout, mesh))


@pytest.mark.parametrize("layout", [Layout(), Layout(2, ep=2)], ids=str)
def test_an_infinity_that_delayed_scaling_saturates_is_told(layout):
    """The loss and the norm do not tell; a micro-step is enough, and all ranks hear of it."""
    ran = ranks.run_ranks(saturated, 2, layout) if layout.world_size > 1 else [saturated(None, layout)]
    for steps in ran:
        assert all(step.applied and math.isfinite(step.loss) for step in steps.values())
        assert {flaw: step.saturated for flaw, step in steps.items() if step.saturated} == held(layout.ep)


def watched(*histories: list[float], experts: bool = False) -> str:
    """Of one operand: what is told after micro-steps that leave these histories, the first of which was there before."""
    live = torch.tensor([histories[0]] * 2 if experts else histories[0])
    shard = Shard((4, 3), axis="ep", parts=2, index=1) if experts else Shard((3,))
    watch = SaturationWatch({f"site.input.{name}": Kept(f"input.{name}", live, shard) for name in ("history", "scale")})
    for history in histories[1:]:
        live[..., :] = torch.tensor(history)
        watch.look()
    return watch.close(ParallelMesh.single().world)


def test_an_infinity_is_told_once():
    inf, told = torch.inf, "site's input held an infinity"
    assert watched([0.0, 1.0, 2.0], [0.0, 2.0, inf]) == told
    assert watched([0.0, 1.0, 2.0], [0.0, 2.0, inf], [0.0, inf, 3.0]) == told, "met in a micro-step that is not the last"
    assert watched([0.0, 2.0, inf], [0.0, inf, inf]) == told, "one after the other"
    assert watched([0.0, 2.0, inf], [0.0, inf, 3.0], [0.0, 3.0, inf]) == told, "another one"
    assert watched([0.0, 2.0, inf], [0.0, inf, 1.0]) == "", "still in the history"
    assert watched([0.0, 2.0, inf], [0.0, 2.0, inf]) == "", "an expert without rows, whose history stays"
    assert watched([0.0], [0.0]) == "", "nothing is remembered"
    both = watched([0.0, 1.0, 2.0], [0.0, 2.0, inf], experts=True)
    assert both == "site's input (expert 2) held an infinity, and 1 more did"


def test_passes_are_done_again_with_the_scales_that_each_micro_step_had():
    """After the step scales have followed what was too large, and nothing would be found."""
    run = Run(fp8="delayed")
    engine = build_engine(run, Layout(), ParallelMesh.single())
    train(engine, [0], lr=run.lr)
    train(engine, [1], lr=1e10)
    before = {name: kept.tensor.clone() for name, kept in engine._kept().items()}
    assert not engine.train_step(*batch(2, engine.mesh), lr=run.lr).applied
    after = {name: kept.tensor.clone() for name, kept in engine._kept().items()}
    assert re.match(r"the first: the gradient of layers\.\d\.\S+ .*is not finite", first_nonfinite(engine, *batch(2, engine.mesh)))
    assert any(not torch.equal(after[name], scale) for name, scale in before.items())
    assert all(torch.equal(after[name], kept.tensor) for name, kept in engine._kept().items()), "a replay leaves no trace"
