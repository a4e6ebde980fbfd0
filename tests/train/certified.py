"""One line of training with the saver that a run has: saved, damaged on the way, resumed, and held to what followed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity.engines import BATCH, MICRO_STEPS, Layout, Run, batch, build_engine, rate
from torch import Tensor

from megagate.checkpoint import store
from megagate.checkpoint.staging import HostCopy
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.data.loader import Batch
from megagate.engine.base import Engine
from megagate.parallel.mesh import ParallelMesh
from megagate.train.certify import Followed
from megagate.train.saver import Saver

RUN = Run(optimizer="adamw")
SAVED = 4
"""The step that is saved: with moments of several steps, and a learning rate that differs from its neighbours'."""

Change = Callable[[dict[str, Tensor]], None]
"""Damages tensors by their names, in place."""


class DamagedCopy(HostCopy):
    """Host memory that loses something between the copy and the digest."""

    def __init__(self, change: Change):
        super().__init__()
        self._change = change

    def take(self, pieces: Iterable[Piece]) -> None:
        super().take(pieces)
        self._change({piece.name: piece.tensor for piece in self.pieces})


def mesh_of(layout: Layout) -> ParallelMesh:
    return ParallelMesh.build(tp=layout.tp, ep=layout.ep) if torch.distributed.is_initialized() else ParallelMesh.single()


def saver_of(engine: Engine, root: Path, **settings: Any) -> Saver:
    config = replace(engine.config, checkpoint=replace(engine.config.checkpoint, **settings))
    return Saver(root, config=config, mesh=engine.mesh, order=lambda samples: {"order": "the order", "samples": samples})


def step(engine: Engine, saver: Saver, number: int, *, lr: float = 1.0, moved: int = 0) -> None:
    """Optimizer step `number`, counted from 1, as the trainer does it. `moved`: with tokens of a later step."""
    tokens, labels = batch(number - 1 + moved, engine.mesh)
    rate_now = lr * rate(RUN.lr, number - 1)
    result = engine.train_step(tokens, labels, lr=rate_now)
    dp = engine.mesh.dp
    samples = (number - 1) * BATCH + np.arange(BATCH).reshape(MICRO_STEPS, dp.size, -1)[:, dp.rank]
    saver.follow(engine, Followed(number, rate_now, result, samples, Batch(tokens.numpy(), labels.numpy())))
    saver.poll()


def write(
    root: Path,
    layout: Layout = Layout(),  # noqa: B008
    *,
    beside: bool = True,
    change: Change | None = None,
    run: Run = RUN,
    further: int = 1,
    last: bool = False,
) -> None:
    """Train to the saved step and on. `change` damages what is written before its digest is taken, and not what trains on.

    Beside training it damages the copy; without one what the engine gives for its state, to the writer and to the fingerprint. `last`:
    saved as at a signal, with no step after it.
    """
    engine = build_engine(run, layout, mesh_of(layout))
    saver = saver_of(engine, root, asynchronous=beside)
    for number in range(1, SAVED + 1):
        step(engine, saver, number)
    if change is not None and beside:
        saver._copy = DamagedCopy(change)
    if change is not None and not beside:
        engine.state_pieces = lambda: _damaged(engine, change)
    saver.save(engine, step=SAVED, best_val_loss=None, last=last)
    vars(engine).pop("state_pieces", None)
    for number in range(SAVED + 1, SAVED + 1 + further):
        step(engine, saver, number)
    saver.finish()


def _damaged(engine: Engine, change: Change) -> Iterator[Piece]:
    pieces = [replace(piece, tensor=piece.tensor.clone()) for piece in type(engine).state_pieces(engine)]
    change({piece.name: piece.tensor for piece in pieces})
    return iter(pieces)


def resume(
    root: Path,
    layout: Layout = Layout(),  # noqa: B008
    *,
    run: Run = RUN,
    lr: float = 1.0,
    moved: int = 0,
    without: str = "",
    **settings: Any,
) -> None:
    """Load the checkpoint into an engine of other weights, and do its first step. `without`: a key of the metadata that is not there.

    Raises:
        CheckpointError: It is damaged, or the step is not the one that followed.
    """
    engine = build_engine(run, layout, mesh_of(layout), key="other weights")
    saver = saver_of(engine, root, **settings)
    checkpoint = Checkpoint.open(store.step_path(root, SAVED))
    checkpoint.metadata.pop(without, None)
    saver.require_sound(checkpoint)
    saver.load(engine, checkpoint)
    saver.expect(checkpoint)
    step(engine, saver, SAVED + 1, lr=lr, moved=moved)


def stale(run: Run = RUN) -> dict[str, Tensor]:
    """The state one step before the saved one, as one process has it."""
    engine = build_engine(run, Layout(), ParallelMesh.single())
    saver = saver_of(engine, Path("nowhere"))
    for number in range(1, SAVED):
        step(engine, saver, number)
    return {piece.name: piece.tensor.clone() for piece in engine.state_pieces()}
