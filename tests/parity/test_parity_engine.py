"""The whole model under DeepSpeed equals the plain PyTorch engine: SGD (Adam hides errors of scale), active clipping, accumulation."""

from dataclasses import replace
from functools import lru_cache

import pytest
import ranks
import torch
from parity.engines import CLIP, Layout, Outcome, Run, assemble, build_engine, initial_weights, outcome, run_reference, train
from parity.sharded import assert_all_close, assert_close, difference
from torch import Tensor

from megagate.engine.base import StepResult
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

STEPS = 3
LAYOUTS = [
    Layout(2, tp=1, ep=1),
    Layout(2, tp=1, ep=2),
    Layout(2, tp=2, ep=1),
    Layout(2, tp=2, ep=2),
    Layout(4, tp=1, ep=2),
    Layout(4, tp=2, ep=4),
    Layout(4, tp=4, ep=4),  # more ranks than kv heads
    Layout(4, tp=4, ep=2),
    Layout(4, tp=2, ep=1),
]
SECOND_STAGE = [replace(layout, zero_stage=2) for layout in LAYOUTS]


def run_zero(context: RankContext, run: Run, layout: Layout) -> Outcome:
    engine = build_engine(run, layout, ParallelMesh.build(tp=layout.tp, ep=layout.ep))
    return outcome(engine, train(engine, range(STEPS), lr=run.lr), next_step=STEPS)


@lru_cache
def reference(run: Run) -> Outcome:
    return run_reference(run, steps=STEPS)


@lru_cache
def started(run: Run) -> dict[str, Tensor]:
    return initial_weights(run)


def assert_same_numbers(steps: list[StepResult], expected: list[StepResult], *, to: float) -> None:
    for step, other in zip(steps, expected, strict=True):
        assert step.applied and step.targets == other.targets
        assert step.loss == pytest.approx(other.loss, rel=to)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=to)
        assert (step.aux is None) == (other.aux is None)
        if step.aux is not None:
            assert step.aux == pytest.approx(other.aux, rel=to)


def check(run: Run, layout: Layout, *, to: float, update_to: float) -> None:
    """Numbers and weights to `to` of their scale, what the steps changed to `update_to` of its own."""
    expected, outcomes = reference(run), ranks.run_ranks(run_zero, layout.world_size, run, layout)
    assert all(step.grad_norm > CLIP for step in expected.steps), "clipping must be active"
    assert {one.digest for one in outcomes} == {outcomes[0].digest}, "all ranks hold the same model"
    assert all(one.steps == outcomes[0].steps and one.val_loss == outcomes[0].val_loss for one in outcomes)
    assert_same_numbers(outcomes[0].steps, expected.steps, to=to)
    assert outcomes[0].val_loss == pytest.approx(expected.val_loss, rel=to)
    weights = outcomes[0].weights
    assert_all_close(weights, expected.weights, to=to)
    for name, before in started(run).items():
        assert_close(weights[name] - before, expected.weights[name] - before, to=update_to, what=f"update of {name}")
    masters = {name.removeprefix("master/"): value for name, value in assemble(outcomes).items() if name.startswith("master/")}
    assert_all_close({name: masters[name] for name in weights}, weights, to=0)


@pytest.mark.parametrize("layout", [*LAYOUTS, *SECOND_STAGE], ids=str)
def test_zero_equals_reference(layout):
    check(Run(), layout, to=1e-6, update_to=1e-4)


@pytest.mark.parametrize(
    ("run", "layout"),
    [
        (Run(recompute=True), Layout(4, tp=2, ep=4)),
        (Run(scope="micro_batch"), Layout(4, tp=2, ep=2)),
        (Run(dense=True), Layout(2, tp=1)),
        (Run(dense=True, recompute=True), Layout(4, tp=2, zero_stage=2)),
    ],
    ids=["recompute", "micro-batch scope", "tied dense", "tied dense tp2"],
)
def test_other_models_equal_reference(run, layout):
    check(run, layout, to=1e-6, update_to=1e-4)


@pytest.mark.parametrize("layout", [Layout(2, tp=2, ep=2), Layout(4, tp=2, ep=4, zero_stage=2)], ids=str)
def test_adamw_equals_reference(layout):
    check(Run(optimizer="adamw"), layout, to=1e-4, update_to=1e-3)


def test_the_runs_differ_where_they_should():
    """Each variant changes the numbers by far more than the tolerances, so that none can pass for another."""
    plain = reference(Run()).weights
    for other in (Run(scope="micro_batch"), Run(optimizer="adamw")):
        assert max(difference(reference(other).weights[name], plain[name]) for name in plain) > 1e-4
    assert reference(Run(recompute=True)).digest == reference(Run()).digest


# ---- bf16


def deviations(outcomes: list[Outcome]) -> tuple[float, float, float]:
    """From the fp32 reference: of what the steps changed in the fp32 masters (L2, relative, and how far the slope is from 1; the worst
    of the families), and of the largest gradient norm."""
    masters, exact, before = assemble(outcomes), reference(Run()), started(Run())
    distance = slope = 0.0
    for family in (("experts",), ("q.weight", "o.weight", "head", "embedding"), ("norm", "router")):
        names = [name for name in before if any(word in name for word in family)]
        change = torch.cat([(masters[f"master/{name}"] - before[name].bfloat16().float()).flatten() for name in names])
        wanted = torch.cat([(exact.weights[name] - before[name]).flatten() for name in names])
        distance = max(distance, ((change - wanted).norm() / wanted.norm()).item())
        slope = max(slope, abs((change @ wanted / (wanted @ wanted)).item() - 1))
    norms = zip(outcomes[0].steps, exact.steps, strict=True)
    return distance, slope, max(abs(step.grad_norm / other.grad_norm - 1) for step, other in norms)


def test_bf16_deviates_no_more_on_a_folded_grid_than_on_plain_data_parallel_ranks():
    run, folded_grid = Run(dtype="bf16"), Layout(4, tp=2, ep=4)
    usual = deviations(ranks.run_ranks(run_zero, 2, run, Layout(2)))
    assert 0 < usual[0] < 0.05 and usual[1] < 0.005 and usual[2] < 0.05
    variants = [(run, folded_grid), (run, replace(folded_grid, zero_stage=2)), (replace(run, grad_dtype="model"), folded_grid)]
    for variant, layout in variants:
        folded = ranks.run_ranks(run_zero, 4, variant, layout)
        assert {one.digest for one in folded} == {folded[0].digest}
        distance, slope, norm = deviations(folded)
        assert distance < 1.5 * usual[0] and norm < 1.5 * usual[2]
        assert slope < 0.005, "a mark that is missing shows here as 0.07"
