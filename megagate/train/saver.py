"""Checkpoints of a whole world: every rank writes its part, the first publishes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagate import __version__
from megagate.checkpoint import store
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import to_dict
from megagate.config.run import RunConfig
from megagate.data.order import order_differences
from megagate.engine.base import Engine
from megagate.errors import CheckpointError, DataError, MegagateError
from megagate.log import logger
from megagate.parallel.mesh import ParallelMesh
from megagate.train.agree import everywhere, on_first


class Saver:
    """Saves and loads the state of an engine.

    Args:
        root: Folder of the run's checkpoints, on a disk that all ranks share.
        config: The run.
        mesh: Its ranks.
        order: What a checkpoint keeps of the order of so many first samples, see `TrainLoader.order_at`.
    """

    def __init__(self, root: Path, *, config: RunConfig, mesh: ParallelMesh, order: Callable[[int], dict[str, Any]]):
        self.root, self.config, self.world, self.order = root, config, mesh.world, order
        self.micro_step_samples = config.micro_batch(mesh.dp.size) * mesh.dp.size

    def save(self, engine: Engine, *, step: int, best_val_loss: float | None, best: bool = False) -> None:
        """Write and publish the checkpoint of `step`, mark it `best` if so told, delete old ones. Collective.

        Raises:
            RunError: No space; earlier checkpoints stand.
        """
        samples = step * self.config.train.global_batch_size
        metadata = {
            "config": to_dict(self.config),
            "applied_steps": engine.applied_steps,
            "data": self.order(samples),
            "micro_step_samples": self.micro_step_samples,
            "best_val_loss": best_val_loss,
            "megagate": __version__,
        }
        on_first(self.world, lambda: store.begin(self.root, step))
        try:
            everywhere(self.world, lambda: self._write(engine, step))
        except MegagateError:
            if self.world.rank == 0:  # all ranks are here, none writes any more
                store.discard(self.root, step)
            raise
        on_first(self.world, lambda: self._publish(step, metadata, best=best))

    def _write(self, engine: Engine, step: int) -> None:
        staging = store.staging_path(self.root, step)
        if not staging.is_dir():
            raise CheckpointError(f"{staging} is not there on every node; train.output_dir must be on a disk that all nodes share")
        store.write_rank(staging, self.world.rank, engine.state_pieces())

    def _publish(self, step: int, metadata: dict[str, Any], *, best: bool) -> None:
        store.publish(self.root, step, world_size=self.world.size, metadata=metadata)
        if best:
            store.set_pointer(self.root, "best", step)
        store.prune(self.root, keep=self.config.checkpoint.keep)

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
        of_micro_steps = moe.balance_scope != "sequence"
        if self.config.model.is_moe and moe.balance_coef and of_micro_steps and before != self.micro_step_samples:
            logger.info(
                "a micro-step now holds %d samples over all ranks, %d before: the balance loss (%s) counts experts over other tokens, "
                "so this is not exactly the run it was; train.micro_batch_size x data-parallel ranks = %d keeps it",
                *(self.micro_step_samples, before, moe.balance_scope, before),
            )

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Take the state of a sound checkpoint of any layout. Collective: a rank that cannot read stops all.

        Raises:
            CheckpointError: A tensor is missing.
        """
        everywhere(self.world, lambda: engine.load_state(checkpoint, applied_steps=checkpoint.metadata["applied_steps"]))

    def _require_sound(self, checkpoint: Checkpoint) -> None:
        there = checkpoint.metadata["data"]
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
        checkpoint.verify(rank=self.world.rank, world_size=self.world.size)
