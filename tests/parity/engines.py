"""A small training run under any engine and layout, for the tests of the engines. A run is a `Run`; what came of it, an `Outcome`."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from parity.sharded import BACKEND, CPU, fill, full_weights
from torch import Tensor

from megagate.backend.fp8.backend import EmulatedBackend
from megagate.checkpoint import store
from megagate.checkpoint.store import Checkpoint
from megagate.config.model import AttentionConfig, BalanceScope, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import (
    Fp8Config,
    Fp8Recipe,
    GradDType,
    OptimConfig,
    OptimizerImplementation,
    OptimizerName,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megagate.engine.base import Engine, StepResult
from megagate.engine.reference import ReferenceEngine
from megagate.model.lm import LanguageModel
from megagate.nn.loss import IGNORE_INDEX
from megagate.parallel.comm import barrier
from megagate.parallel.mesh import ParallelMesh

BATCH, SEQUENCE, MICRO_STEPS = 8, 16, 2
CLIP = 0.3
MOE = ModelConfig(
    vocab_size=250,
    hidden_size=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, gate=GateConfig("G1", "elementwise")),
    moe=MoEConfig(num_experts=8, top_k=3, ffn_size=16, balance_coef=0.1, z_loss_coef=0.01),
)
TIED_DENSE = replace(MOE, moe=MoEConfig(), ffn_size=48, tie_embeddings=True)


@dataclass(frozen=True)
class Run:
    """What is trained; the layout comes apart."""

    optimizer: OptimizerName = "sgd"
    implementation: OptimizerImplementation = "torch"
    dtype: str = "fp32"
    grad_dtype: GradDType = "fp32"
    scope: BalanceScope = "global_batch"
    recompute: bool = False
    dense: bool = False
    head_dim: int = 8
    bias_update_rate: float = 0.0
    fp8: Fp8Recipe = "none"  # emulated
    amax_history: int = 3

    @property
    def model(self) -> ModelConfig:
        moe = replace(MOE.moe, balance_scope=self.scope, bias_update_rate=self.bias_update_rate)
        model = TIED_DENSE if self.dense else replace(MOE, moe=moe)
        return replace(model, attention=replace(model.attention, head_dim=self.head_dim))

    @property
    def lr(self) -> float:
        return 0.5 if self.optimizer == "sgd" else 1e-2


@dataclass(frozen=True)
class Layout:
    """How many ranks, and how they share the work."""

    world_size: int = 1
    tp: int = 1
    ep: int = 1
    zero_stage: int = 1

    def __str__(self) -> str:
        return f"{self.world_size} ranks tp{self.tp} ep{self.ep} zero{self.zero_stage}"


@dataclass
class Outcome:
    """After some steps.

    Args:
        steps: One result per step, this rank's.
        weights: The model's parameters, joined.
        val_loss: Of the batch after the last step's.
        pieces: (name, full shape, offset, elements) of this rank's part of the optimizer's state.
        seen: The validation loss at a checkpoint, where one was taken.
    """

    steps: list[StepResult]
    weights: dict[str, Tensor]
    val_loss: float
    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]] = field(default_factory=list)
    seen: float | None = None

    @property
    def digest(self) -> str:
        """Of the weights' bytes."""
        return hashlib.sha256(b"".join(w.contiguous().view(torch.uint8).numpy().tobytes() for w in self.weights.values())).hexdigest()


def run_config(run: Run, layout: Layout) -> RunConfig:
    dp = layout.world_size // layout.tp
    fp8 = Fp8Config(recipe=run.fp8, emulate=run.fp8 != "none", amax_history=run.amax_history)
    return RunConfig(
        model=run.model,
        train=TrainConfig(global_batch_size=BATCH, micro_batch_size=BATCH // MICRO_STEPS // dp, seq_len=SEQUENCE, recompute=run.recompute),
        optim=OptimConfig(name=run.optimizer, implementation=run.implementation, lr=run.lr, grad_clip=CLIP),
        parallel=ParallelConfig(tp=layout.tp, ep=layout.ep, zero_stage=layout.zero_stage),
        precision=PrecisionConfig(dtype=run.dtype, grad_dtype=run.grad_dtype, fp8=fp8),
    )


def build_engine(run: Run, layout: Layout, mesh: ParallelMesh, *, key: str = "weights") -> Engine:
    """`ZeroEngine` in a process group, the reference without one."""
    config = run_config(run, layout)
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    backend = BACKEND if run.fp8 == "none" else EmulatedBackend(BACKEND, config.precision.fp8, device=CPU, mesh=mesh)
    model = fill(LanguageModel(config.model, dtype=dtype, backend=backend, mesh=mesh, recompute=run.recompute), key=key)
    if not torch.distributed.is_initialized():
        return ReferenceEngine(model, config, mesh)
    from megagate.engine.zero import ZeroEngine

    return ZeroEngine(model, config, mesh)


def batch(step: int, mesh: ParallelMesh) -> tuple[Tensor, Tensor]:
    """This rank's samples of a step, [micro-steps, b, s]. Samples have different numbers of targets, one has none."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, MOE.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    labels = text[:, 1:].clone()
    for row, first in enumerate([9, 16, 3, 16, 0, 16, 16, 12]):
        labels[(row + step) % BATCH, first:] = IGNORE_INDEX
    split = (MICRO_STEPS, mesh.dp.size, -1, SEQUENCE)
    return text[:, :-1].reshape(split)[:, mesh.dp.rank], labels.view(split)[:, mesh.dp.rank]


def train(engine: Engine, steps: Iterable[int], *, lr: float) -> list[StepResult]:
    return [engine.train_step(*batch(step, engine.mesh), lr=rate(lr, step)) for step in steps]


def rate(lr: float, step: int) -> float:
    """A learning rate that changes with every step."""
    return lr * (1.0, 0.5, 0.8)[step % 3]


def save(engine: Engine, root: Path, step: int) -> None:
    """A checkpoint, as a run writes it. Collective."""
    world = engine.mesh.world
    if world.rank == 0:
        store.begin(root, step)
    barrier(world)
    store.write_rank(store.staging_path(root, step), world.rank, engine.state_pieces())
    barrier(world)
    if world.rank == 0:
        store.publish(root, step, world_size=world.size, metadata={"applied_steps": engine.applied_steps})
    barrier(world)


def load(engine: Engine, root: Path, step: int) -> None:
    """The state of that checkpoint. Collective."""
    with Checkpoint.open(store.step_path(root, step)) as checkpoint:
        checkpoint.verify(rank=engine.mesh.world.rank, world_size=engine.mesh.world.size)
        engine.load_state(checkpoint, applied_steps=checkpoint.metadata["applied_steps"])


def outcome(engine: Engine, steps: list[StepResult], *, next_step: int, seen: float | None = None) -> Outcome:
    """What there is to compare. Collective."""
    val_loss = engine.evaluate(zip(*batch(next_step, engine.mesh), strict=True))
    pieces = [(p.name, p.full_shape, p.offset, p.tensor.clone()) for p in engine.state_pieces()]
    return Outcome(steps, whole_weights(engine), val_loss, pieces, seen)


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """The model's parameters, joined. Collective."""
    with engine.whole_weights():
        return {name: weight.clone() for name, weight in full_weights(engine.model, engine.mesh).items()}


class Whole(NamedTuple):
    """A logical tensor put together, and how many ranks gave each element."""

    tensor: Tensor
    times: Tensor


def assemble(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """The logical tensors of all ranks' pieces. Every element must come from exactly one rank."""
    wholes: dict[str, Whole] = {}
    for name, full_shape, offset, tensor in (piece for one in outcomes for piece in one.pieces):
        whole = wholes.setdefault(name, Whole(torch.zeros(full_shape), torch.zeros(full_shape)))
        place = tuple(slice(start, start + size) for start, size in zip(offset, tensor.shape, strict=True))
        whole.tensor[place] = tensor
        whole.times[place] += 1
    wrong = [name for name, whole in wholes.items() if not (whole.times == 1).all()]
    assert not wrong, f"not held exactly once: {wrong}"
    return {name: whole.tensor for name, whole in wholes.items()}
