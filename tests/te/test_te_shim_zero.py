"""DeepSpeed's ZeRO over Transformer Engine's modules: it finds the parameters that it should, and trains them to the same bits.

In bf16 the same as under the native backend, in FP8 as under emulated FP8; several micro-steps a step, fp32 masters, active clipping.
"""

import math
from dataclasses import replace

import pytest
import torch
from parity.engines import Layout, Run, batch, outcome, run_config, train
from parity.infinities import held, saturate_each
from parity.sharded import BACKEND, fill
from te.te_backends import emulated_backend, te_backend
from te.te_ranks import needs_te, run
from torch import Tensor

from megagate.backend.base import Backend
from megagate.config.run import Fp8Config, PrecisionConfig, RunConfig
from megagate.engine.base import Engine
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.account import SentRow, account

pytestmark = needs_te
LAYOUTS = [Layout(2, 1, 2, 1), Layout(2, 2, 1, 2)]
STEPS = 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fp8", [Fp8Config(), Fp8Config(recipe="delayed", amax_history=3)], ids=["bf16", "delayed"])
def test_zero_trains_the_same_weights(layout, fp8):
    for found in run(compared, layout.world_size, layout, fp8, timeout=240):
        assert found == []


def compared(_context: RankContext, layout: Layout, fp8: Fp8Config) -> list[str]:
    """What differs after some steps: losses and norms, masters and moments, weights."""
    job = Run(dtype="bf16", optimizer="adamw")
    config, mesh = run_config(job, layout), ParallelMesh.build(tp=layout.tp, ep=layout.ep)
    ours = trained(replace(config, precision=replace(config.precision, fp8=replace(fp8, emulate=fp8.recipe != "none"))), job.lr, mesh)
    theirs = trained(replace(config, precision=replace(config.precision, backend="te", fp8=fp8)), job.lr, mesh)
    assert list(ours) == list(theirs)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_an_infinity_that_delayed_scaling_saturates_is_told():
    """From TE's own histories; see `parity/test_parity_nonfinite_named.py`."""
    for found in run(saturated, 2, LAYOUTS[0], timeout=240):
        assert found == held(LAYOUTS[0].ep)


def saturated(_context: RankContext, layout: Layout) -> dict[str, str]:
    config, mesh = run_config(Run(dtype="bf16"), layout), ParallelMesh.build(tp=layout.tp, ep=layout.ep)
    fp8 = Fp8Config(recipe="delayed", amax_history=4)
    steps = saturate_each(engine_of(replace(config, precision=replace(config.precision, backend="te", fp8=fp8)), mesh))
    assert all(step.applied and math.isfinite(step.loss) for step in steps.values())
    return {flaw: step.saturated for flaw, step in steps.items() if step.saturated}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", ["te", "native"])
def test_one_step_sends_what_the_formula_says(backend, layout):
    """Transformer Engine reduces its amaxes itself, past `parallel/comm.py`; recomputed blocks do not reduce theirs once more."""
    for rows in run(accounted, layout.world_size, layout, backend):
        assert {row.sender for row in rows} >= {"model"}
        assert [row for row in rows if row.sender == "model" and row.bytes != row.minimum] == []


def accounted(_context: RankContext, layout: Layout, backend: str) -> list[SentRow]:
    config, mesh = run_config(Run(dtype="bf16", recompute=True), layout), ParallelMesh.build(tp=layout.tp, ep=layout.ep)
    precision = replace(config.precision, backend=backend, fp8=Fp8Config("delayed", emulate=backend == "native", amax_history=3))
    return account(engine_of(replace(config, precision=precision), mesh), *batch(0, mesh))


def engine_of(config: RunConfig, mesh: ParallelMesh) -> Engine:
    from megagate.engine.zero import ZeroEngine

    how = {"dtype": torch.bfloat16, "backend": backend_of(config.precision, mesh), "mesh": mesh, "recompute": config.train.recompute}
    return ZeroEngine(fill(LanguageModel(config.model, **how)), config, mesh)


def trained(config: RunConfig, lr: float, mesh: ParallelMesh) -> dict[str, Tensor]:
    engine = engine_of(config, mesh)
    after = outcome(engine, train(engine, range(STEPS), lr=lr), next_step=STEPS)
    assert all(step.applied for step in after.steps)
    numbers = {f"{name} of step {i}": torch.tensor(getattr(s, name)) for i, s in enumerate(after.steps) for name in ("loss", "grad_norm")}
    return numbers | after.weights | {f"{name} at {offset}": tensor for name, _, offset, tensor in after.pieces}


def backend_of(precision: PrecisionConfig, mesh: ParallelMesh) -> Backend:
    if precision.backend == "native":
        return BACKEND if precision.fp8.recipe == "none" else emulated_backend(mesh, precision.fp8)
    return te_backend(mesh, precision.fp8)
