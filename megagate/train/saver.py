"""Checkpoints of a whole world: every rank writes its part, the first publishes; a resumed run is held to what followed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megagate import __version__
from megagate.checkpoint import store
from megagate.checkpoint.fingerprint import FINGERPRINT
from megagate.checkpoint.staging import HostCopy
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.keys import to_dict
from megagate.config.run import RunConfig
from megagate.data.order import order_differences
from megagate.engine.base import Engine
from megagate.errors import CheckpointError, DataError, MegagateError
from megagate.log import logger
from megagate.parallel.comm import maximum
from megagate.parallel.mesh import ParallelMesh
from megagate.train.agree import everywhere, on_first
from megagate.train.background import Task
from megagate.train.certify import Certifier, Followed
from megagate.train.fingerprints import Taking, hold, take, tell_changed_precision

RANDOM_STATE = "rng/cpu"
"""The tensor that holds PyTorch's generator of random numbers on the CPU. Training draws none; whoever does goes on with the same."""

LEAVE_S = 20.0
"""Seconds for which a rank that ends by a bug waits for its threads; the launcher kills the others 30 s after its signal."""


@dataclass(frozen=True)
class _Flight:
    """A save between its copy and its publication.

    Args:
        step: That it is of.
        metadata: For its index.
        fingerprint: Of the state in memory, for the metadata too.
        best: Whether `best` will name it.
        writing: True while the ranks write, false while the first publishes.
        task: What this rank does for it.
        background: Whether training goes on meanwhile.
        stood_still: Seconds that the loop has stood still for its start.
        written: Seconds that this rank has written for.
    """

    step: int
    metadata: dict[str, Any]
    fingerprint: Taking
    best: bool
    writing: bool
    task: Task
    background: bool
    stood_still: float
    written: float = 0.0


class Saver:
    """Saves and loads the state of an engine, and certifies it by the step that follows.

    With `checkpoint.asynchronous` a save copies the state to host memory and returns; threads write the copy and publish it, and `poll`,
    called between steps, learns when all ranks are through. One save is in flight at a time. Only the main thread uses collectives.

    Args:
        root: Folder of the run's checkpoints, on a disk that all ranks share.
        config: The run.
        mesh: Its ranks.
        order: What a checkpoint keeps of the order of so many first samples, see `TrainLoader.order_at`.
    """

    def __init__(self, root: Path, *, config: RunConfig, mesh: ParallelMesh, order: Callable[[int], dict[str, Any]]):
        self.root, self.config, self.mesh, self.world, self.order = root, config, mesh, mesh.world, order
        self.micro_step_samples = config.micro_batch(mesh.dp.size) * mesh.dp.size
        self._copy = HostCopy()
        self._flight: _Flight | None = None
        self._certifier = Certifier(root, config=config, mesh=mesh)
        self._stood_still = 0.0
        self._same_state = False  # whether what was loaded is known to be what was saved

    def save(self, engine: Engine, *, step: int, best_val_loss: float | None, best: bool = False, last: bool = False) -> None:
        """Begin the checkpoint of `step`; mark it `best` if so told, and delete old ones, once it is published. Collective.

        A save that is in flight is waited for. Where it is the `last` before the loop ends, or `checkpoint.asynchronous` is off, the
        checkpoint is published on return, and was written without a copy.

        Raises:
            RunError: No space, for this one or for the one in flight; earlier checkpoints stand.
        """
        with self._standing_still():
            began = time.perf_counter()
            self.finish()
            background = self.config.checkpoint.asynchronous and not last
            metadata = self._metadata(engine, step, best_val_loss)
            pieces = chain(engine.state_pieces(), self._random_state())
            if background:
                everywhere(self.world, lambda: self._copy.take(pieces))
                pieces = iter(self._copy.pieces)
            on_first(self.world, lambda: store.begin(self.root, step))
            state = {"names": (RANDOM_STATE,), "background": background}
            fingerprint = everywhere(self.world, lambda: take(engine, self._random_state(), **state))
            task = Task(lambda: self._write(step, pieces), background=background)
            still = time.perf_counter() - began - (0.0 if background else task.seconds)
            self._flight = _Flight(
                step, metadata, fingerprint, best, writing=True, task=task, background=background, stood_still=still
            )
            self._certifier.saved(step, self._copy if background else None)
            if not background:
                self.finish()

    def poll(self) -> None:
        """Between two steps: go on with the save in flight as far as it is. Collective while there is one; nothing otherwise.

        Raises:
            RunError: No space; earlier checkpoints stand.
        """
        if self._flight is not None:
            with self._standing_still():
                self._advance(wait=False)

    def finish(self) -> None:
        """Wait for the save in flight and publish it. Collective.

        Raises:
            RunError: No space; earlier checkpoints stand.
        """
        with self._standing_still():
            self._advance(wait=True)
            self._certifier.collect()
            self._certifier.write()

    def abandon(self, *, seconds: float = LEAVE_S) -> None:
        """Before this rank ends by a bug of its own: let its threads come to their end, so long at most. Uses no collective."""
        deadline = time.monotonic() + seconds
        for task in (*([self._flight.task, self._flight.fingerprint.task] if self._flight else []), *self._certifier.tasks):
            task.wait(max(0.0, deadline - time.monotonic()))

    def stall(self) -> dict[str, float]:
        """For a record: the seconds that the loop has stood still for saving since this was last asked; empty where it has not."""
        seconds, self._stood_still = self._stood_still, 0.0
        return {"checkpoint_stall_seconds": seconds} if seconds else {}

    def follow(self, engine: Engine, followed: Followed) -> None:
        """After each step: certify the checkpoint before it, or hold the first step of a resumed run to its certificate. Collective.

        Raises:
            CheckpointError: The resumed step is not the one that was recorded, and `checkpoint.on_mismatch` is `stop`.
        """
        if self._certifier.waits_for(followed.step):
            with self._standing_still():
                self._certifier.follow(engine, followed)
                if self._flight is None:
                    self._certifier.write()

    def expect(self, checkpoint: Checkpoint) -> None:
        """Hold the next step to what followed `checkpoint`, whose state was just loaded, and say it where nobody recorded that. Collective.

        The checkpoint is closed when it is needed no more.

        Raises:
            CheckpointError: The record is damaged.
        """
        self._certifier.expect(checkpoint, same_state=self._same_state)

    def require_sound(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that this run cannot go on from; each rank reads its share of it. Collective.

        Raises:
            CheckpointError: A piece is missing or damaged.
            DataError: The checkpoint was trained on other data, or in another order.
        """
        everywhere(self.world, lambda: self._require_sound(checkpoint))

    def tell_changed_micro_steps(self, checkpoint: Checkpoint) -> None:
        """Say it where a micro-step now holds another number of samples: all a change of layout can do to the numbers."""
        before, moe = checkpoint.metadata["micro_step_samples"], self.config.model.moe
        of_micro_steps = before is not None and moe.balance_scope != "sequence"
        if self.config.model.is_moe and moe.balance_coef and of_micro_steps and before != self.micro_step_samples:
            logger.info(
                "a micro-step now holds %d samples over all ranks, %d before: the balance loss (%s) counts experts over other tokens, "
                "so this is not exactly the run it was; train.micro_batch_size x data-parallel ranks = %d keeps it",
                *(self.micro_step_samples, before, moe.balance_scope, before),
            )

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Take the state of a sound checkpoint of any layout, and hold it to the fingerprint of what was saved.

        Collective: a rank that cannot read stops all.

        Raises:
            CheckpointError: A tensor is missing, or, unless `checkpoint.on_mismatch` is `continue`, is not what it was in memory.
        """
        names = everywhere(self.world, lambda: self._load(engine, checkpoint))
        tell_changed_precision(engine, checkpoint)
        others = self._random_state() if names else ()
        self._same_state = hold(engine, checkpoint, others, names=names, config=self.config.checkpoint)

    def _load(self, engine: Engine, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The names of what was taken beside the engine's state."""
        engine.load_state(checkpoint, applied_steps=checkpoint.metadata["applied_steps"])
        stored = checkpoint.tensors.get(RANDOM_STATE)
        # Another version of PyTorch may have another generator.
        if stored is None or stored.shape != tuple(torch.get_rng_state().shape):
            return ()
        torch.set_rng_state(checkpoint.read_whole(RANDOM_STATE))
        return (RANDOM_STATE,)

    def _metadata(self, engine: Engine, step: int, best_val_loss: float | None) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "applied_steps": engine.applied_steps,
            "data": self.order(step * self.config.train.global_batch_size),
            "micro_step_samples": self.micro_step_samples,
            "best_val_loss": best_val_loss,
            "megagate": __version__,
        }

    def _random_state(self) -> Iterator[Piece]:
        if self.world.rank == 0:
            state = torch.get_rng_state()
            yield Piece(RANDOM_STATE, tuple(state.shape), (0,), state)

    # ---- the save in flight

    def _advance(self, *, wait: bool) -> None:
        """Through what is left of the save in flight, or, without waiting, through what all ranks have done."""
        while (flight := self._flight) is not None:
            if not (wait or self._over(flight.task)):
                return
            try:
                everywhere(self.world, flight.task.result)
            except MegagateError:
                self._flight = None
                flight.fingerprint.drop()
                self._certifier.forget()
                if flight.writing and self.world.rank == 0:  # all ranks are here, none writes any more
                    store.discard(self.root, flight.step)
                raise
            if flight.writing:
                flight.metadata[FINGERPRINT] = flight.fingerprint.result(self.world)
                publish = Task(lambda flight=flight: self._publish(flight), background=flight.background)
                self._flight = replace(flight, writing=False, task=publish, written=flight.task.seconds)
                continue
            self._flight = None
            seconds = flight.written + flight.task.seconds
            stood_still = flight.stood_still + (0.0 if flight.background else seconds)
            logger.info("checkpoint of step %d: written in %.2f s; training stood still for %.2f s", flight.step, seconds, stood_still)
            self._certifier.write()

    def _over(self, task: Task) -> bool:
        """Whether a task is over on all ranks, or has failed on one, so that the others should be waited for. Collective."""
        unfinished, failed = maximum(torch.tensor([int(not task.done), int(task.failed)]), self.world).tolist()
        return bool(failed) or not unfinished

    def _write(self, step: int, pieces: Iterator[Piece]) -> None:
        staging = store.staging_path(self.root, step)
        if not staging.is_dir():
            raise CheckpointError(f"{staging} is not there on every node; train.output_dir must be on a disk that all nodes share")
        store.write_rank(staging, self.world.rank, pieces)

    def _publish(self, flight: _Flight) -> None:
        """By the first rank; nothing on the others. What is complete already is deleted only after the new one is."""
        if self.world.rank:
            return
        store.publish(self.root, flight.step, world_size=self.world.size, metadata=flight.metadata)
        if flight.best:
            store.set_pointer(self.root, "best", flight.step)
        store.prune(self.root, keep=self.config.checkpoint.keep)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Counts the seconds inside; within another such context nothing, since that one counts them."""
        before, began = self._stood_still, time.perf_counter()
        yield
        self._stood_still = before + time.perf_counter() - began

    def _require_sound(self, checkpoint: Checkpoint) -> None:
        there = checkpoint.metadata["data"]
        if there is not None:
            self._require_same_samples(checkpoint, there)
        elif checkpoint.step:
            raise DataError(
                f"{checkpoint.folder} is of step {checkpoint.step} and does not say which samples it has seen; only a checkpoint of step "
                "0, such as an imported one, may leave that open; import it again"
            )
        checkpoint.verify(rank=self.world.rank, world_size=self.world.size)

    def _require_same_samples(self, checkpoint: Checkpoint, there: dict[str, Any]) -> None:
        samples, here = there["samples"], self.order(there["samples"])
        if there["order"] != here["order"]:
            what = "; ".join(order_differences(there, here)) or f"{there['order'][:12]} there, {here['order'][:12]} here"
            raise DataError(
                f"the checkpoint of step {checkpoint.step} was trained on another data set or sample order ({what}); a resumed run must "
                "see the samples it would have seen: use the same data.path (its weights may change from a later sample on), train.seed "
                "and train.seq_len"
            )
        batch = self.config.train.global_batch_size
        if samples != checkpoint.step * batch:
            raise DataError(
                f"the checkpoint of step {checkpoint.step} has seen {samples} samples; with train.global_batch_size {batch} it would have "
                f"seen {checkpoint.step * batch}, so that samples would be skipped or repeated; keep the batch size of its run"
            )
