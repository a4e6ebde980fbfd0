"""What the matrix leaves out: AdamW, sampling between steps, and that the matrix's rows are different models."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import ranks
import torch
from parity.matrix import CPU, TOLERANCE, Case, assert_same, build_engine, pieces_of, reference, run_case, worst
from parity.sharded import assert_close
from torch import Tensor

from megagate.checkpoint.store import Piece
from megagate.engine.base import Engine, StepResult
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.trial import batch

MOE, DENSE, TIED = Case(world=4), Case(world=4, model="dense"), Case(world=4, model="tied")


@pytest.mark.parametrize(
    "case",
    [
        replace(MOE, tp=2, ep=4),
        replace(MOE, tp=2, ep=2, stage=2),
        replace(MOE, tp=4, ep=2, stage=3),
        replace(DENSE, tp=2, stage=0),
    ],
    ids=str,
)
def test_adamw_equals_reference(case):
    """Less closely than SGD, since a gradient near 0 is divided by its own size; 4e-6 was seen."""
    case = replace(case, optimizer="adamw")
    assert_same(ranks.run_ranks(run_case, case.world, case), reference(case), to=2e-5)


# ---- sampling


class Sampled(NamedTuple):
    """Two steps, logits before each of them and at the end; and the same steps without logits."""

    logits: list[Tensor]
    steps: list[StepResult]
    masters: list[Piece]
    silent_steps: list[StepResult]
    silent_masters: list[Piece]


def sampled(context: RankContext | None, case: Case) -> Sampled:
    mesh = ParallelMesh.build(tp=case.tp, ep=case.ep) if context else ParallelMesh.single()
    talking, silent = build_engine(case, mesh), build_engine(case, mesh)
    tokens = batch(case.config, ParallelMesh.single(), seed=case.seed, step=7, device=CPU)[0].flatten(0, 1)
    logits, steps, silent_steps = [], [], []
    for number in range(2):
        logits.append(say(talking, tokens))
        steps.append(step(talking, case, number))
        silent_steps.append(step(silent, case, number))
    logits.append(say(talking, tokens))
    return Sampled(logits, steps, masters(talking), silent_steps, masters(silent))


def say(engine: Engine, tokens: Tensor) -> Tensor:
    """As the trainer does before it samples."""
    engine.model.eval()
    logits = engine.model.logits(tokens)
    engine.model.train()
    return logits


def step(engine: Engine, case: Case, number: int) -> StepResult:
    tokens, labels = batch(case.config, engine.mesh, seed=case.seed, step=number, device=CPU)
    return engine.train_step(tokens, labels, lr=case.config.optim.lr)


def masters(engine: Engine) -> list[Piece]:
    return [replace(piece, tensor=piece.tensor.clone()) for piece in engine.state_pieces()]


@pytest.mark.parametrize(
    "case",
    [
        replace(MOE, tp=2, ep=4, stage=1),
        replace(MOE, tp=2, ep=4, stage=3),
        replace(MOE, tp=4, ep=2, stage=3, recompute=True),
        replace(TIED, tp=1, ep=4, stage=3),
        replace(DENSE, tp=2, stage=3),
    ],
    ids=str,
)
def test_sampling_sees_the_reference_logits_and_disturbs_no_step(case):
    results, expected = ranks.run_ranks(sampled, case.world, case), sampled(None, replace(case, world=1, tp=1, ep=1, stage=1))
    for result in results:
        assert [one.shape for one in result.logits] == [one.shape for one in expected.logits]
        for ours, theirs in zip(result.logits, expected.logits, strict=True):
            assert_close(ours, theirs, to=TOLERANCE, what="logits")
        assert result.steps == result.silent_steps
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(result.masters, result.silent_masters, strict=True))
    assert not torch.equal(results[0].logits[0], results[0].logits[2]), "training changes the logits"


# ---- the matrix itself


def test_rows_of_the_matrix_are_different_models():
    """Each variant changes the gradients by far more than the tolerance, so that none can pass for another."""
    plain = reference(Case())
    for other in (Case(scope="micro_batch"), Case(scope="sequence"), Case(accumulation=1)):
        assert worst(reference(other).aux_gradients, plain.aux_gradients).worst > 1e-3, str(other)
    again = reference(Case(recompute=True))
    assert again.steps == plain.steps and worst(again.masters, plain.masters).worst == 0


def test_samples_have_unequal_numbers_of_targets():
    """In every batch of the matrix, and one sample has none: a mean over ranks or micro-steps would not be the mean over targets."""
    config = Case().config
    for number in range(3):
        labels = batch(config, ParallelMesh.single(), seed=Case().seed, step=number, device=CPU)[1].flatten(0, 1)
        targets = (labels >= 0).sum(1).tolist()
        assert min(targets) == 0 and len(set(targets)) > 3
        assert sum(targets[:4]) != sum(targets[4:]), "micro-steps differ too"


def test_a_difference_is_named():
    """The comparison of the matrix finds one wrong element of one tensor of one rank."""
    outcomes, expected = ranks.run_ranks(run_case, 2, Case(world=2, tp=2, ep=2)), reference(Case())
    wrong = next(piece for piece in pieces_of(outcomes[1:], "masters") if piece.name == "master/layers.1.moe.experts.down")
    wrong.tensor[..., 3] *= 1.01
    with pytest.raises(AssertionError, match=r"master: layers.1.moe.experts.down differs by"):
        assert_same(outcomes, expected)
