"""Every variant of attention and router trains the same model under every kind of layout, and goes on from its checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import ranks
from parity.engines import load, save
from parity.matrix import CPU, Case, assert_same_training, build_engine, check_case
from parity.variants import VARIANTS

from megagate.checkpoint import store
from megagate.checkpoint.store import Checkpoint
from megagate.nn.routes import SMALLEST_GAP
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.routes import watched_routes
from megagate.verify.trial import Outcome, run_trial

TOLERANCE = 5e-6
"""Gradients of some variants are known less well in fp32 than those of the matrix of layouts."""
RESUMED = 2e-4
"""AdamW makes much of the rounding of small gradients."""
LATER = 103
"""Added to a seed: tokens after the checkpoint, with which no variant routes near a tie."""
LAYOUTS = [Case(2, tp=2, ep=2, stage=1), Case(4, tp=4, ep=4, stage=2), Case(4, tp=2, ep=4, stage=3, recompute=True)]
"""Four tensor-parallel ranks are more than the model's two key/value heads."""
THERE, BACK = Case(2, tp=2, ep=2, stage=1), Case(2, tp=1, ep=2, stage=2)


def of_variant(layout: Case, variant: str) -> Case:
    return replace(layout, model=variant, ep=layout.ep if VARIANTS[variant].is_moe else 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"dp{layout.world // layout.tp} tp{layout.tp} zero{layout.stage}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_under_every_kind_of_layout(variant, layout):
    check_case(of_variant(layout, variant), to=TOLERANCE)


def begin_and_save(context: RankContext, case: Case, root: Path) -> None:
    engine = build_engine(case, ParallelMesh.build(tp=case.tp, ep=case.ep))
    run_trial(engine, seed=case.seed, device=CPU, steps=1, aux=False)
    save(engine, root, 1)


def load_and_go_on(context: RankContext, case: Case, root: Path) -> Outcome:
    engine = build_engine(case, ParallelMesh.build(tp=case.tp, ep=case.ep))
    run_trial(engine, seed=case.seed + 50, device=CPU, steps=2, aux=False)  # other weights, moments and biases, to be replaced
    load(engine, root, 1)
    return run_trial(engine, seed=case.seed + LATER, device=CPU, steps=2, aux=False)


def on_one_process(case: Case) -> Outcome:
    """Without a checkpoint."""
    engine = build_engine(case, ParallelMesh.single())
    run_trial(engine, seed=case.seed, device=CPU, steps=1, aux=False)
    with watched_routes(engine.model) as gaps:
        outcome = run_trial(engine, seed=case.seed + LATER, device=CPU, steps=2, aux=False)
    assert not gaps or min(gaps) > SMALLEST_GAP / 4, f"near a tie: {min(gaps):.1e}; choose another seed"
    return outcome


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_on_from_a_checkpoint_under_another_layout(variant, tmp_path):
    there, back = (replace(of_variant(layout, variant), optimizer="adamw") for layout in (THERE, BACK))
    ranks.run_ranks(begin_and_save, there.world, there, tmp_path)
    outcomes = ranks.run_ranks(load_and_go_on, back.world, back, tmp_path)
    assert_same_training(outcomes, on_one_process(there), to=RESUMED)
    with Checkpoint.open(store.step_path(tmp_path, 1)) as checkpoint:
        state = [name for name in checkpoint.tensors if name.startswith("state/")]
        moe = VARIANTS[variant].moe
        assert len(state) == (2 if moe.bias_update_rate else 0)
        assert all(checkpoint.read_whole(name).any() for name in state)
