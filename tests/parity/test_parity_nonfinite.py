"""A gradient that is not finite somewhere: no rank applies the step, nothing changes (biases neither), the next step is as without."""

import math
from typing import NamedTuple

import pytest
import ranks
import torch
from parity.engines import Layout, Run, batch, build_engine, outcome, train, whole_weights
from torch import Tensor

from megagate.engine.base import Engine, StepResult
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

BIAS = 0.02  # of the routers, which follow no step that was skipped
WHERE = ("weight", "expert gradient", "replicated gradient")


class Spoilt(NamedTuple):
    """Three steps, the second spoilt, and two steps without it."""

    step: StepResult
    kept: bool  # the spoilt step changed no weight
    after: tuple[list[StepResult], str, int, dict[str, Tensor]]
    without: tuple[list[StepResult], str, int, dict[str, Tensor]]


def spoil(engine: Engine, where: str, tokens: Tensor, labels: Tensor, *, lr: float) -> StepResult:
    """One step with a nan in a weight of the last rank, or an infinity in a gradient of one of its experts, or in the gradient of a
    replicated parameter (that is a sum over tp, so that all tp ranks of the last data-parallel rank have it)."""
    mesh, parameters = engine.mesh, dict(engine.model.named_parameters())
    spoilt = mesh.dp if where == "replicated gradient" else mesh.world
    if spoilt.rank != spoilt.size - 1:
        return engine.train_step(tokens, labels, lr=lr)
    if where == "weight":
        parameter = parameters["layers.1.attention.q.weight"]
        data = getattr(parameter, "ds_tensor", parameter).data.view(-1)  # stage 3 keeps a partition of it
        value = data[3].clone()
        data[3] = torch.nan
        step = engine.train_step(tokens, labels, lr=lr)
        data[3] = value
        return step
    name = "layers.1.moe.experts.down" if where == "expert gradient" else "layers.0.ffn_norm.weight"
    handle = parameters[name].register_hook(lambda grad: torch.where(grad == grad.max(), torch.inf, grad))
    step = engine.train_step(tokens, labels, lr=lr)
    handle.remove()
    return step


def end(engine: Engine, steps: list[StepResult]) -> tuple[list[StepResult], str, int, dict[str, Tensor]]:
    one = outcome(engine, steps, next_step=3)
    moments = {f"{name}{offset}": tensor for name, _, offset, tensor in one.pieces}
    return one.steps, one.digest, engine.applied_steps, moments


def spoilt_run(context: RankContext, run: Run, layout: Layout, where: str) -> Spoilt:
    mesh = ParallelMesh.build(tp=layout.tp, ep=layout.ep)
    undisturbed = build_engine(run, layout, mesh)
    without = end(undisturbed, train(undisturbed, [0, 2], lr=run.lr))

    engine = build_engine(run, layout, mesh)
    steps = train(engine, [0], lr=run.lr)
    before = whole_weights(engine)
    spoilt = spoil(engine, where, *batch(1, mesh), lr=run.lr)
    after = whole_weights(engine)
    kept = all(torch.equal(after[name], value) for name, value in before.items())
    return Spoilt(spoilt, kept, end(engine, steps + train(engine, [2], lr=run.lr)), without)


LAYOUTS = [
    Layout(2),
    Layout(2, tp=2, ep=2),
    Layout(4, tp=2, ep=4, zero_stage=2),
    Layout(4, tp=2, ep=4),
    Layout(4, tp=2, ep=4, zero_stage=3),
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # DeepSpeedZeroOptimizer and BF16_Optimizer
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_skips_the_step_on_all_ranks(layout, dtype, where):
    check_skipped(Run(optimizer="adamw", dtype=dtype, bias_update_rate=BIAS), layout, where)


@pytest.mark.parametrize("where", ["weight", "replicated gradient"])
@pytest.mark.parametrize("layout", [Layout(1, zero_stage=0), Layout(4, tp=2, zero_stage=0), Layout(4, tp=2, zero_stage=3)], ids=str)
def test_a_dense_model_skips_it_too(layout, where):
    check_skipped(Run(optimizer="adamw", dense=True), layout, where)


def check_skipped(run: Run, layout: Layout, where: str) -> None:
    for result in ranks.run_ranks(spoilt_run, layout.world_size, run, layout, where):
        assert not result.step.applied and not math.isfinite(result.step.grad_norm)
        assert result.kept
        (steps, digest, applied, moments), (expected, expected_digest, expected_applied, expected_moments) = result.after, result.without
        assert steps == expected and all(step.applied for step in steps)
        assert digest == expected_digest
        assert applied == expected_applied == 2
        assert list(moments) == list(expected_moments)
        assert all(torch.equal(value, expected_moments[name]) for name, value in moments.items())


@pytest.mark.parametrize("where", ["weight", "expert gradient"])
def test_the_reference_skips_it_too(where):
    run, mesh = Run(optimizer="adamw", bias_update_rate=BIAS), ParallelMesh.single()
    undisturbed, engine = build_engine(run, Layout(), mesh), build_engine(run, Layout(), mesh)
    without = end(undisturbed, train(undisturbed, [0, 2], lr=run.lr))
    steps = train(engine, [0], lr=run.lr)
    step = spoil(engine, where, *batch(1, mesh), lr=run.lr)
    assert not step.applied
    after = end(engine, steps + train(engine, [2], lr=run.lr))
    assert after[:3] == without[:3]
    assert all(torch.equal(value, without[3][name]) for name, value in after[3].items())
