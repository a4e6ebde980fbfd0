"""A case in ranks that have run other cases, and in new ones: the same bits, so that nothing of one case reaches the next."""

from dataclasses import fields, replace

import pytest
import ranks
import torch
from parity.matrix import Case, run_case

from megagate.checkpoint.store import Piece
from megagate.parallel.spawn import RankPool
from megagate.verify.trial import Outcome

OTHERS = [Case(4, tp=4, ep=2, stage=3), Case(4, tp=2, ep=4, stage=1, dtype="bf16"), Case(2, tp=1, ep=2, stage=2, recompute=True)]


@pytest.mark.parametrize("stage", [1, 3])
def test_pooled_is_fresh(stage):
    case = replace(Case(4, tp=2, ep=2), stage=stage)
    for other in OTHERS:
        ranks.run_ranks(run_case, other.world, other)
    pooled = ranks.run_ranks(run_case, case.world, case)
    with RankPool(environment=ranks.ENVIRONMENT, before=ranks.before_call) as pool:
        fresh = pool.run(run_case, case.world, case, timeout=60)
        assert not set(pool.pids) & set(ranks.POOL.pids)
    for one, other in zip(pooled, fresh, strict=True):
        assert_same_bits(one, other)


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    for field in fields(Outcome):
        ours, theirs = _flat(getattr(one, field.name)), _flat(getattr(other, field.name))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Piece):
                assert (a.name, a.full_shape, a.offset) == (b.name, b.full_shape, b.offset)
                assert torch.equal(a.tensor, b.tensor), f"{field.name}: {a.name}"
            else:
                assert a == b, field.name


def _flat(value: object) -> list:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]
