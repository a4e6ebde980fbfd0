"""Experts that receive no token, on all ranks or on some: they take part in every collective, and all weights stay those of one process."""

from typing import NamedTuple

import pytest
import ranks
import torch
from parity.matrix import CPU, Case, assert_same, build_engine, reference
from parity.routing import LATE_SAMPLES, LATE_TOKENS, NEVER, counted_rows
from torch import Tensor

from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.trial import Outcome, run_trial


class Idle(NamedTuple):
    """A trial, the rows that the experts got from the ranks of this rank's expert group, [calls, E], and which group that is."""

    outcome: Outcome
    rows: Tensor
    replica: int


def run_idle(context: RankContext, case: Case) -> Idle:
    mesh = ParallelMesh.build(tp=case.tp, ep=case.ep)
    engine = build_engine(case, mesh)
    with counted_rows(engine.model) as counts:
        outcome = run_trial(engine, seed=case.seed, device=CPU)
    return Idle(outcome, torch.stack(counts), mesh.edp.rank)


LAYOUTS = {
    # (tp, ep): in which replicas of the experts there is a row for LATE_SAMPLES, for LATE_TOKENS
    (2, 4): ([True], [True]),
    (2, 2): ([False, True], [True, True]),
    (4, 2): ([True, True], [False, True]),
    (1, 4): ([True], [True]),
}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{} ep{}".format(*layout))
def test_idle_experts(layout, stage):
    tp, ep = layout
    case = Case(4, tp=tp, ep=ep, stage=stage, routing="idle")
    results = ranks.run_ranks(run_idle, 4, case)
    late_samples, late_tokens = LAYOUTS[layout]
    for replica in range(4 // ep):
        rows = sum(result.rows for result in results if result.replica == replica)  # [calls, E]
        assert (rows[:, NEVER] == 0).all(), "idle on all ranks"
        for experts, live in ((LATE_SAMPLES, late_samples), (LATE_TOKENS, late_tokens)):
            assert (rows[:, experts] > 0).any() == live[replica]
        others = set(range(case.config.model.moe.num_experts)) - {*NEVER, *LATE_SAMPLES, *LATE_TOKENS}
        assert (rows[:, sorted(others)].sum(0) > 0).all()
    assert_same([result.outcome for result in results], reference(case))
