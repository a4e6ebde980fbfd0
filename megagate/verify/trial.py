"""A few steps of training, recorded closely enough to tell whether two layouts are the same model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megagate.backend.base import Backend
from megagate.checkpoint.store import Piece
from megagate.config.run import ParallelConfig, RunConfig
from megagate.data.loader import IGNORE_INDEX
from megagate.engine.base import Engine, StepResult
from megagate.engine.optim import clipping
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

STEPS = 3
INIT_GAIN = 0.25
"""Of a random matrix: small enough for well-conditioned gradients, large enough that every part of the model matters to the loss."""
EOD = 0
"""Ends documents in the tokens of a trial, where the run cuts its windows there."""
END_SHARE = 0.25
"""Of a trial's tokens that end a document: several documents in each row, some of one token."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Outcome:
    """What one rank saw; pieces are boxes of logical tensors, so that ranks of any layout can be compared.

    Args:
        steps: One result per step.
        gradients: Of each step, `grad/NAME` before clipping, copies on several ranks included.
        aux_gradients: Of the auxiliary losses alone, before the first step; empty for a dense model or with coefficients of 0.
        outputs: `output/MODULE` of the first micro-step: embedding, each attention and feed-forward block, the final norm.
        initial: `master/NAME` before the first step.
        masters: `master/NAME` after the last step.
        weights: `weight/NAME` after the last step, as forward passes use them, on every rank.
        val_loss: Of one more batch, with the weights that forward passes use.
    """

    steps: list[StepResult]
    gradients: list[list[Piece]]
    aux_gradients: list[Piece]
    outputs: list[Piece]
    initial: list[Piece]
    masters: list[Piece]
    weights: list[Piece]
    val_loss: float


def build_model(config: RunConfig, mesh: ParallelMesh, *, backend: Backend, device: torch.device, seed: int) -> LanguageModel:
    """The model of a trial, with initial weights that depend on the seed alone."""
    model = LanguageModel(
        replace(config.model, init_std=INIT_GAIN * config.model.hidden_size**-0.5),
        dtype=DTYPES[config.precision.dtype],
        backend=backend,
        mesh=mesh,
        recompute=config.train.recompute,
        eod_id=EOD if config.data.attention == "document" else None,
    )
    return model.initialize(seed=seed, device=device)


def reference_config(config: RunConfig, *, dp: int) -> RunConfig:
    """The same run on one rank, with the same samples per micro-step."""
    train = replace(config.train, micro_batch_size=config.micro_batch(dp) * dp)
    return replace(config, parallel=ParallelConfig(), train=train)


def run_trial(engine: Engine, *, seed: int, device: torch.device, steps: int = STEPS, aux: bool = True) -> Outcome:
    """Train, recording. Collective: each rank runs it with its engine.

    Args:
        engine: With initial weights.
        seed: Of the tokens; the same on all ranks.
        device: Of this rank.
        steps: To train.
        aux: Begin with the auxiliary losses alone, at learning rate 0.
    """
    config, mesh = engine.config, engine.mesh
    initial = _kept(engine.state_pieces())
    aux_gradients: list[Piece] = []
    if aux and config.model.is_moe and (config.model.moe.balance_coef or config.model.moe.z_loss_coef):
        tokens, labels = batch(config, mesh, seed=seed, step=0, device=device)
        # Without a target the cross-entropy is 0 and so is its gradient.
        aux_gradients = _step(engine, tokens, torch.full_like(labels, IGNORE_INDEX), lr=0.0)[1]
    results, gradients, outputs = [], [], []
    for step in range(steps):
        tokens, labels = batch(config, mesh, seed=seed, step=step, device=device)
        with recorded_outputs(engine.model, mesh, into=outputs if step == 0 else []):
            result, pieces = _step(engine, tokens, labels, lr=config.optim.lr)
        results.append(result)
        gradients.append(pieces)
    val_loss = engine.evaluate(zip(*batch(config, mesh, seed=seed, step=steps, device=device), strict=True))
    masters, weights = _kept(engine.state_pieces()), _weights(engine)
    return Outcome(results, gradients, aux_gradients, outputs, initial, masters, weights, val_loss)


def batch(config: RunConfig, mesh: ParallelMesh, *, seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's part of a step: random tokens, and a different number of targets in each sample, none in one of them.

    Where the run cuts windows into documents, some tokens end one, and the tokens after them are no targets.

    Shapes: tokens and labels [accumulation, b, s] int64.
    """
    samples, length = config.train.global_batch_size, config.train.seq_len
    generator = torch.Generator().manual_seed(1000 * seed + step)
    text = torch.randint(0, config.model.vocab_size, (samples, length + 1), generator=generator)
    if config.data.attention == "document":
        text[torch.rand(text.shape, generator=generator) < END_SHARE] = EOD
    labels = text[:, 1:].clone()
    if config.data.attention == "document":
        labels[text[:, :-1] == EOD] = IGNORE_INDEX
    lengths = torch.randint(1, length + 1, (samples,), generator=generator)
    lengths[step % samples] = 0
    labels[torch.arange(length) >= lengths[:, None]] = IGNORE_INDEX
    split = (-1, mesh.dp.size, config.micro_batch(mesh.dp.size), length)
    return tuple(whole.reshape(split)[:, mesh.dp.rank].to(device) for whole in (text[:, :-1], labels))


def _step(engine: Engine, tokens: Tensor, labels: Tensor, *, lr: float) -> tuple[StepResult, list[Piece]]:
    """One step, and its gradients as they were before clipping."""
    with engine.recorded_gradients() as pieces:
        result = engine.train_step(tokens, labels, lr=lr)
    divisor = clipping(result.grad_norm, engine.config.optim.grad_clip)
    return result, [replace(piece, tensor=piece.tensor.cpu() * divisor) for piece in pieces]


def _weights(engine: Engine) -> list[Piece]:
    """This rank's shards."""
    with engine.whole_weights():
        shards = [(name, engine.labels[name].shard, parameter) for name, parameter in engine.model.named_parameters()]
        return _kept(Piece(f"weight/{name}", shard.full_shape, shard.offset, parameter) for name, shard, parameter in shards)


def _kept(pieces: Iterable[Piece]) -> list[Piece]:
    return [replace(piece, tensor=piece.tensor.detach().cpu().clone()) for piece in pieces]


@contextmanager
def recorded_outputs(model: LanguageModel, mesh: ParallelMesh, *, into: list[Piece]) -> Iterator[None]:
    """Inside the context the first output of each part of the model is added to `into`."""
    seen: set[str] = set()

    def record(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if name not in seen:
                seen.add(name)
                b, s, h = out.shape  # [b, s/tp, h]
                place = (b * mesh.dp.rank, s * mesh.tp.rank, 0)
                into.append(Piece(f"output/{name}", (b * mesh.dp.size, s * mesh.tp.size, h), place, out.detach().cpu().clone()))

        return hook

    parts = {"embedding": model.embedding}
    for index, block in enumerate(model.layers):
        parts[f"layers.{index}.attention"] = block.attention
        parts[f"layers.{index}.feed_forward"] = block.moe if block.is_moe else block.ffn
    parts["final_norm"] = model.final_norm
    handles = [module.register_forward_hook(record(name)) for name, module in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
