"""What a step tells in detail: norms of the gradient by part before clipping, and the rows of each expert, the same in every layout."""

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import ranks
import torch
from parity.matrix import CLIP, CPU, Case, build_engine

from megagate.config.count import parameter_parts
from megagate.engine.base import StepResult
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.trial import batch

TOLERANCE = 1e-6
STEPS = 3
CASES = [
    Case(world=4, tp=4, ep=2),  # more tensor-parallel ranks than key/value heads
    Case(world=4, tp=2, ep=4, stage=2),
    Case(world=4, tp=2, ep=2, stage=3),
    Case(world=4, ep=4, stage=1, model="tied", accumulation=1),
    Case(world=2, tp=2, stage=0, model="dense"),
    Case(world=2, stage=0, model="dense"),
]


def steps_of(context: RankContext | None, case: Case) -> tuple[list[StepResult], list[StepResult]]:
    """Some steps with all that they tell, and the same without."""
    mesh = ParallelMesh.build(tp=case.tp, ep=case.ep) if context else ParallelMesh.single()
    results = []
    for detailed in (True, False):
        engine = build_engine(case, mesh)
        steps = [batch(case.config, mesh, seed=case.seed, step=number, device=CPU) for number in range(STEPS)]
        results.append([engine.train_step(*step, lr=case.config.optim.lr, detailed=detailed) for step in steps])
    return results[0], results[1]


@lru_cache
def raw_norms(case: Case) -> dict[str, float]:
    """Of the first step, by part, of gradients that plain PyTorch gives and nobody clips."""
    engine = build_engine(case, ParallelMesh.single())
    engine.config = replace(engine.config, optim=replace(engine.config.optim, grad_clip=0.0))
    with engine.recorded_gradients() as pieces:
        engine.train_step(*batch(case.config, engine.mesh, seed=case.seed, step=0, device=CPU), lr=0.0)
    squares: dict[str, float] = {}
    parts = parameter_parts(case.config.model)
    for piece in pieces:
        part = parts[piece.name.removeprefix("grad/")]
        squares[part] = squares.get(part, 0.0) + piece.tensor.double().square().sum().item()
    return {part: math.sqrt(square) for part, square in squares.items()}


@pytest.mark.parametrize("case", [Case(), *CASES], ids=str)
def test_norms_by_part_are_those_of_one_process(case: Case) -> None:
    one = replace(case, world=1, tp=1, ep=1, stage=1)
    expected, (plain, _) = raw_norms(one), steps_of(None, one)
    found = ranks.run_ranks(steps_of, case.world, case) if case.world > 1 else [steps_of(None, case)]
    for detailed, silent in found:
        assert detailed == found[0][0], "ranks tell different numbers"
        assert [step._replace(detail=None) for step in detailed] == silent, "telling more changes a step"
        assert detailed[0].detail.norms == pytest.approx(expected, rel=TOLERANCE)
        for step, other in zip(detailed, plain, strict=True):
            assert step.grad_norm > 2 * CLIP, "clipping must be active"
            assert math.hypot(*step.detail.norms.values()) == pytest.approx(step.grad_norm, rel=TOLERANCE)
            assert step.detail.norms == pytest.approx(other.detail.norms, rel=TOLERANCE)
            assert step.detail.counts == other.detail.counts
    model, train = case.config.model, case.config.train
    rows = train.global_batch_size * train.seq_len * model.moe.top_k
    assert [sum(layer) for layer in plain[0].detail.counts] == [rows] * (model.num_layers if model.is_moe else 0)
    assert min(expected.values()) > 1e-3 * max(expected.values()), "a part that is next to nothing would not be missed"


def skipped(context: RankContext, case: Case) -> tuple[StepResult, StepResult]:
    """A step with an infinite gradient, and the next."""
    engine = build_engine(case, ParallelMesh.build(tp=case.tp, ep=case.ep))
    tokens, labels = batch(case.config, engine.mesh, seed=case.seed, step=0, device=CPU)
    hook = next(iter(engine.model.layers)).register_forward_hook(lambda _, __, out: (out[0] * torch.inf, out[1]))
    first = engine.train_step(tokens, labels, lr=0.1, detailed=True)
    hook.remove()
    return first, engine.train_step(tokens, labels, lr=0.1, detailed=True)


@pytest.mark.parametrize("case", [Case(world=2, stage=stage, model="dense") for stage in (0, 1, 3)], ids=str)
def test_a_step_that_is_not_applied_knows_no_norms(case: Case) -> None:
    for first, second in ranks.run_ranks(skipped, 2, case):
        assert not first.applied and all(math.isnan(norm) for norm in first.detail.norms.values())
        assert second.applied and math.hypot(*second.detail.norms.values()) == pytest.approx(second.grad_norm, rel=TOLERANCE)
