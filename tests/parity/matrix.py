"""The matrix of layouts: its cases, and one case run and compared with one process on plain PyTorch.

A case is a `RunConfig` (model, batch, layout) for a number of ranks. SGD, because Adam hides errors of scale; clipping is active.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import ranks
import torch
from parity import fp8
from parity.routing import Routing, steer
from parity.sharded import CPU
from parity.variants import DENSE, MOE, VARIANTS

from megagate.backend.build import build_backend
from megagate.checkpoint.store import Piece
from megagate.config.model import BalanceScope
from megagate.config.rules import check
from megagate.config.run import (
    AttentionSpan,
    DataConfig,
    Fp8Config,
    Fp8Recipe,
    GradDType,
    OptimConfig,
    OptimizerName,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megagate.engine.base import Engine
from megagate.engine.reference import ReferenceEngine
from megagate.model.lm import LanguageModel
from megagate.nn.routes import SMALLEST_GAP
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.compare import Agreement, compare, whole_tensors
from megagate.verify.routes import watched_routes
from megagate.verify.trial import Outcome, build_model, reference_config, run_trial

TOLERANCE = 1e-6
"""Of a number relative, of a tensor's element relative to the largest of its tensor."""
BATCH, SEQUENCE, CLIP = 8, 8, 0.1
HISTORY = 4
"""Of delayed scaling: fewer micro-steps than a trial has."""
LRS = {"sgd": 0.03, "adamw": 1e-3}
MODELS = {
    "moe": MOE,
    "moe whose routes flip in bf16": MOE,
    "tied": replace(MOE, tie_embeddings=True),
    "padded": replace(MOE, vocab_size=90),  # on four tensor-parallel ranks one holds nothing but padding
    "unpadded": replace(MOE, vocab_size=256),
    "dense": DENSE,
    **VARIANTS,
    **fp8.MODELS,
}
SEEDS = {
    "moe whose routes flip in bf16": 12,
    "moe": 14,
    "dense": 1,
    "tied": 1,
    "padded": 17,
    "unpadded": 22,
    "switch v 2 of 3": 1,
    "router softmax, not renormalised": 3,
    "router softmax with bias": 30,
    "router with bias, balance of sequences": 30,
    "router sigmoid, not renormalised": 1,
    "router sigmoid with bias": 23,
}
DOCUMENT_SEEDS = {"moe": 20, "dense": 9}
"""Where windows are cut into documents: other tokens."""
SEED = 2  # of the other models
"""Of weights and tokens: no route near a tie in any step, and gradients that fp32 knows to less than the tolerance."""


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    world: int = 1
    tp: int = 1
    ep: int = 1
    stage: int = 1
    accumulation: int = 2
    recompute: bool = False
    scope: BalanceScope = "global_batch"
    model: str = "moe"
    dtype: str = "fp32"
    grad_dtype: GradDType = "fp32"
    optimizer: OptimizerName = "sgd"
    weight_decay: float = 0.1
    routing: Routing = "free"
    expert_gain: float = 1.0
    attention: AttentionSpan = "causal"
    recipe: Fp8Recipe = "none"
    seq_len: int = SEQUENCE

    def __str__(self) -> str:
        """dp x tp x ep, then what is not usual."""
        words = [f"{self.model} dp{self.world // self.tp} tp{self.tp} ep{self.ep} zero{self.stage}"]
        words += [f"acc{self.accumulation}"] if self.accumulation != 2 else []
        words += ["recompute"] if self.recompute else []
        words += [self.scope] if self.scope != "global_batch" else []
        words += [self.dtype] if self.dtype != "fp32" else []
        words += [f"{self.grad_dtype} gradients"] if self.grad_dtype != "fp32" else []
        words += [self.optimizer] if self.optimizer != "sgd" else []
        words += [self.routing] if self.routing != "free" else []
        words += [f"{self.attention} attention"] if self.attention != "causal" else []
        words += [self.recipe] if self.recipe != "none" else []
        return " ".join(words)

    @property
    def config(self) -> RunConfig:
        model = MODELS[self.model]
        dp = self.world // self.tp
        return RunConfig(
            model=replace(model, moe=replace(model.moe, balance_scope=self.scope)) if model.is_moe else model,
            train=TrainConfig(
                global_batch_size=BATCH,
                micro_batch_size=BATCH // self.accumulation // dp,
                seq_len=self.seq_len,
                recompute=self.recompute,
            ),
            data=DataConfig(attention=self.attention),
            optim=OptimConfig(name=self.optimizer, lr=LRS[self.optimizer], weight_decay=self.weight_decay, grad_clip=CLIP),
            parallel=ParallelConfig(tp=self.tp, ep=self.ep, zero_stage=self.stage),
            precision=PrecisionConfig(dtype=self.dtype, grad_dtype=self.grad_dtype, fp8=self.fp8),
        )

    @property
    def fp8(self) -> Fp8Config:
        history = {"amax_history": HISTORY} if self.recipe == "delayed" else {}
        return Fp8Config(self.recipe, emulate=True, **history) if self.recipe != "none" else Fp8Config()

    @property
    def seed(self) -> int:
        return DOCUMENT_SEEDS.get(self.model, SEED) if self.attention == "document" else SEEDS.get(self.model, SEED)


def layouts(*worlds: int) -> list[tuple[int, int, int]]:
    """(world, tp, ep) of every layout that the grid allows."""
    return [
        (world, tp, ep)
        for world in worlds
        for tp in range(1, world + 1)
        for ep in range(1, world + 1)
        if world % tp == 0 and world % ep == 0 and (tp % ep == 0 or ep % tp == 0)
    ]


def run_case(context: RankContext, case: Case) -> Outcome:
    """In each rank."""
    check(case.config, world_size=context.world_size)
    engine = build_engine(case, ParallelMesh.build(tp=case.tp, ep=case.ep))
    return run_trial(engine, seed=case.seed, device=CPU)


def build_engine(case: Case, mesh: ParallelMesh) -> Engine:
    """`ZeroEngine` in a process group, the reference without one."""
    if not torch.distributed.is_initialized():
        config = reference_config(case.config, dp=case.world // case.tp)
        return ReferenceEngine(_build_model(case, config, mesh), config, mesh)
    from megagate.engine.zero import ZeroEngine

    return ZeroEngine(_build_model(case, case.config, mesh), case.config, mesh)


def _build_model(case: Case, config: RunConfig, mesh: ParallelMesh) -> LanguageModel:
    backend = build_backend(config.precision, device=CPU, mesh=mesh)
    model = build_model(config, mesh, backend=backend, device=CPU, seed=case.seed)
    steer(model, mesh, case.routing)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data *= case.expert_gain
    return model


def reference(case: Case) -> Outcome:
    """The same steps in this process; one for all layouts."""
    return _reference(replace(case, world=1, tp=1, ep=1, stage=1))


@lru_cache
def _reference(case: Case) -> Outcome:
    engine = build_engine(case, ParallelMesh.single())
    with watched_routes(engine.model) as gaps:
        outcome = run_trial(engine, seed=case.seed, device=CPU)
    if case.dtype == "fp32":
        assert not gaps or min(gaps) > SMALLEST_GAP, f"near a tie: {min(gaps):.1e}; choose another seed"
    assert all(step.grad_norm > 2 * CLIP for step in outcome.steps), "clipping must be active"
    return outcome


def pieces_of(outcomes: list[Outcome], kind: str) -> list[Piece]:
    return [piece for outcome in outcomes for piece in getattr(outcome, kind)]


def by_kind(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """Masters and moments apart."""
    kinds: dict[str, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.name.partition("/")[0], []).append(piece)
    return kinds


def worst(pieces: Iterable[Piece], expected: Iterable[Piece]) -> Agreement:
    """Of the tensor that agrees least, `where` naming it."""
    tensors = compare(pieces, whole_tensors(expected)).values()
    return max(tensors, key=lambda one: math.inf if math.isnan(one.worst) else one.worst, default=Agreement())


def assert_same(outcomes: list[Outcome], expected: Outcome, *, to: float = TOLERANCE) -> None:
    """Numbers, gradients of each step, outputs and weights; all ranks tell the same numbers."""
    assert worst(pieces_of(outcomes, "initial"), expected.initial).worst == 0, "initial weights differ"
    assert_same_training(outcomes, expected, to=to)


def assert_same_training(outcomes: list[Outcome], expected: Outcome, *, to: float) -> None:
    """The same from weights that agree to rounding."""
    first = outcomes[0]
    assert all(one.steps == first.steps and one.val_loss == first.val_loss for one in outcomes), "ranks tell different numbers"
    for number, (step, other) in enumerate(zip(first.steps, expected.steps, strict=True)):
        assert step.applied and (step.targets, step.context) == (other.targets, other.context)
        gradients = [piece for one in outcomes for piece in one.gradients[number]]
        _require(worst(gradients, expected.gradients[number]), f"gradient of step {number}", to)
        assert step.loss == pytest.approx(other.loss, rel=to), f"loss of step {number}"
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=to), f"gradient norm of step {number}"
        assert (step.aux is None) == (other.aux is None)
        assert step.aux is None or step.aux == pytest.approx(other.aux, rel=to), f"auxiliary losses of step {number}"
    assert first.val_loss == pytest.approx(expected.val_loss, rel=to)
    for kind in ("aux_gradients", "outputs"):
        _require(worst(pieces_of(outcomes, kind), getattr(expected, kind)), kind, to)
    state, expected_state = by_kind(pieces_of(outcomes, "masters")), by_kind(expected.masters)
    assert state.keys() == expected_state.keys()
    for kind, pieces in state.items():
        _require(worst(pieces, expected_state[kind]), kind, to)
    assert worst(pieces_of(outcomes, "weights"), state["master"]).worst == 0, "a rank uses other weights than the masters"


def _require(agreement: Agreement, what: str, to: float) -> None:
    assert agreement.worst <= to, f"{what}: {agreement.where} differs by {agreement.worst:.1e} of its scale, ratio {agreement.ratio:.6f}"


def check_case(case: Case, *, timeout: float = 60, to: float = TOLERANCE) -> None:
    assert_same(ranks.run_ranks(run_case, case.world, case, timeout=timeout), reference(case), to=to)
