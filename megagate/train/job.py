"""One rank's part of a run, from the process group to the closing words."""

import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagate.backend.build import build_backend
from megagate.checkpoint.store import Checkpoint, clean_leftovers
from megagate.config.hardware import Hardware
from megagate.config.keys import to_dict
from megagate.config.rules import check
from megagate.config.run import RunConfig
from megagate.data.loader import TrainLoader, ValidLoader
from megagate.data.sources import Sources, open_sources, prepare_sources
from megagate.engine.base import Engine
from megagate.engine.zero import ZeroEngine, require_optimizer
from megagate.errors import CheckpointError, ConfigError, DataError, MegagateError
from megagate.log import logger
from megagate.model.lm import LanguageModel
from megagate.parallel.comm import barrier, gather_objects
from megagate.parallel.init import LaunchEnv, allow_open_files, init_process_group, pick_device, read_hardware
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.train.agree import everywhere, on_first
from megagate.train.folder import RunFolder, other_step, require_same_model
from megagate.train.metrics import MetricsFile, Sink, WandbSink
from megagate.train.report import tell_learning, tell_next, tell_sample
from megagate.train.saver import Saver
from megagate.train.trainer import Position, Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_TOLD_UNREAD = 0.01


class Job:
    """Sets up a run on this rank and carries it through. Collective: every rank makes one."""

    def __init__(self, config: RunConfig):
        allow_open_files()
        self.env = LaunchEnv.read()
        self.device = pick_device(self.env.local_rank, local_size=self.env.local_size)
        self.config = config = _resolved(config, self.device)
        check(config, world_size=self.env.world_size)  # again: what was `auto` is known only here
        init_process_group(self.env, device=self.device, timeout=COLLECTIVE_TIMEOUT)
        self.mesh = ParallelMesh.build(tp=config.parallel.tp, ep=config.parallel.ep, timeout=COLLECTIVE_TIMEOUT)
        self.folder = RunFolder(Path(config.train.output_dir))

    def run(self) -> int:
        """Returns the exit code, see `main`."""
        try:
            require_hardware(self.config, read_hardware(self.device), env=self.env, world=self.mesh.world)
            code = self._run()
        except MegagateError:  # all ranks raise it together
            self._leave()
            raise
        self._leave()
        return code

    def _leave(self) -> None:
        barrier(self.mesh.world)  # a rank that leaves early would break the others' last collective
        dist.destroy_process_group()

    def _run(self) -> int:
        world, config = self.mesh.world, self.config
        # What only reads comes before what writes.
        everywhere(world, lambda: require_optimizer(config.optim, self.device))
        checkpoint = everywhere(world, self._open_start)
        if checkpoint is not None and checkpoint.step >= config.train.steps:
            logger.info("finished already: %s is at step %d of %d; nothing to do", checkpoint.folder, checkpoint.step, config.train.steps)
            return 0
        made_here = not self.folder.path.exists()
        try:
            data = self._open_data()
            eod_id = everywhere(world, lambda: data.document_end(config.data.attention))
            train, valid = self._loaders(data, eod_id=eod_id)
            saver = Saver(self.folder.checkpoints, config=config, mesh=self.mesh, order=train.order_at)
            if checkpoint is not None:
                with _naming_another_step(checkpoint):
                    saver.require_sound(checkpoint)
        except MegagateError:
            if made_here and world.rank == 0:  # prepared data is all that can lie in it
                shutil.rmtree(self.folder.path, ignore_errors=True)
            raise
        on_first(world, self._claim_folder)
        engine = self._build_engine(eod_id=eod_id)
        position = self._resume(saver, engine, checkpoint)
        sinks = everywhere(world, lambda: self._sinks(position.step))
        trainer = Trainer(config, engine=engine, train=train, valid=valid, saver=saver, folder=self.folder, sinks=sinks)
        position, signal = trainer.run(position)
        for sink in sinks:
            sink.close()
        if signal:
            logger.info("stopped by signal %d at step %d; saved; the same command goes on from there", signal, position.step)
            return 128 + signal
        return self._close(position, engine, data, valid)

    def _open_start(self) -> Checkpoint | None:
        """The checkpoint to start from, its fitness checked; None for initial weights."""
        self.folder.require_same_run(self.config)
        path = self.folder.starting_point(self.config)
        if path is None:
            return None
        checkpoint = Checkpoint.open(path)
        require_same_model(checkpoint, self.config)
        if checkpoint.step >= self.config.train.steps and path.parent != self.folder.checkpoints:
            raise ConfigError(
                f"train.steps ({self.config.train.steps}) must be above the step of the checkpoint in train.resume ({checkpoint.step}); "
                "raise train.steps"
            )
        return checkpoint

    def _claim_folder(self) -> None:
        self.folder.claim(self.config)
        clean_leftovers(self.folder.checkpoints)

    def _open_data(self) -> Sources:
        config = self.config
        place = {"vocab_size": config.model.vocab_size, "directory": Path(config.data.cache_dir or self.folder.path / "data")}

        def prepare_here() -> None:
            if self.env.local_rank == 0:  # one process per machine, so that machines without a shared disk work too
                prepare_sources(config.data.path, config.data.valid, **place)

        def open_here() -> Sources:
            with _naming_machine(self.env):
                return open_sources(config.data.path, config.data.valid, **place)

        everywhere(self.mesh.world, prepare_here)
        data = everywhere(self.mesh.world, open_here)
        prints = gather_objects(data.fingerprint, self.mesh.world)
        other = next((rank for rank, found in enumerate(prints) if found != prints[0]), None)
        if other is not None:
            raise DataError(
                f"data.path ({config.data.path}) or data.valid holds other tokens on some machines than on others (fingerprint "
                f"{prints[0][:12]} for rank 0, {prints[other][:12]} for rank {other}); copy one data set to all of them (`embedded` "
                "differs between versions of Python)"
            )
        logger.info("data: %s", data.describe())
        return data

    def _loaders(self, data: Sources, *, eod_id: int | None) -> tuple[TrainLoader, dict[str, ValidLoader]]:
        train, wanted, dp = self.config.train, self.config.eval, self.mesh.dp
        micro = self.config.micro_batch(dp.size)
        shared = {"seq_len": train.seq_len, "micro_batch_size": micro, "dp_rank": dp.rank, "dp_size": dp.size, "eod_id": eod_id}
        if not data.valid and (wanted.every or wanted.min_gain_nats):
            raise DataError(
                f"data.path ({self.config.data.path}) has no validation tokens, but eval.every is {wanted.every} and eval.min_gain_nats "
                f"{wanted.min_gain_nats}; set both to 0, or give a data set with a validation split"
            )

        def make() -> tuple[TrainLoader, dict[str, ValidLoader]]:
            loader = TrainLoader(data.train, **shared, global_batch_size=train.global_batch_size, seed=train.seed)
            # Whole global batches: the set of validation windows does not depend on the layout.
            batches = wanted.batches * train.global_batch_size // (micro * dp.size)
            return loader, {name: ValidLoader(split, **shared, batches=batches) for name, split in data.valid.items()}

        loader, valid = everywhere(self.mesh.world, make)
        for name, share in zip(data.train.names, loader.unread(), strict=True):
            if share > _TOLD_UNREAD:
                logger.info(
                    "data: %.1f %% of %s is in shards too short for whole windows of %d tokens, and never read; tools/merge_data.py "
                    "--shard-tokens joins them",
                    *(100 * share, name or data.name, train.seq_len),
                )
        if len(data.train.members) > 1:
            epochs = zip(data.train.names, loader.epochs(train.steps * train.global_batch_size), strict=True)
            logger.info("blend: %d steps read %s", train.steps, ", ".join(f"{name} {times:.2f} times" for name, times in epochs))
        return loader, valid

    def _build_engine(self, *, eod_id: int | None) -> Engine:
        config = self.config
        dtype = DTYPES[config.precision.dtype]
        backend = build_backend(config.precision, device=self.device, mesh=self.mesh)
        how = {"dtype": dtype, "backend": backend, "mesh": self.mesh, "recompute": config.train.recompute}
        model = LanguageModel(config.model, **how, eod_id=eod_id)
        model.initialize(seed=config.train.seed, device=self.device)
        mesh = self.mesh
        logger.info(
            "model: %s parameters on this rank, %s; %d ranks on %s: dp %d, tp %d, ep %d; ZeRO-%d",
            *(f"{sum(p.numel() for p in model.parameters()):,}", config.precision.dtype, mesh.world.size, self.device.type),
            *(mesh.dp.size, mesh.tp.size, mesh.ep.size, config.parallel.zero_stage),
        )
        return ZeroEngine(model, config, mesh)

    def _resume(self, saver: Saver, engine: Engine, checkpoint: Checkpoint | None) -> Position:
        if checkpoint is None:
            return Position()
        with _naming_another_step(checkpoint):
            saver.load(engine, checkpoint)
        logger.info("resumed from the checkpoint of step %d", checkpoint.step)
        saver.tell_changed_micro_steps(checkpoint)
        saver.expect(checkpoint)
        return Position(checkpoint.step, _best_so_far(checkpoint.metadata, self.config))

    def _sinks(self, step: int) -> list[Sink]:
        if self.mesh.world.rank:
            return []
        metrics = MetricsFile(self.folder.metrics, last_step=step)
        # The one that may not start comes first: where it does not, no record was dropped or written.
        return [metrics] if self.config.wandb.mode == "disabled" else [WandbSink(self.config, self.folder.path), metrics]

    def _close(self, position: Position, engine: Engine, data: Sources, valid: dict[str, ValidLoader]) -> int:
        tell_sample(self.config, engine=engine, data=data)
        learnt = not valid or position.val_loss is None or tell_learning(self.config, val_loss=position.val_loss, valid=valid)
        tell_next(self.config, self.folder, world_size=self.mesh.world.size)
        return 0 if learnt else 1


def require_hardware(config: RunConfig, hardware: Hardware, *, env: LaunchEnv, world: Axis) -> None:
    """Refuse, on all ranks together, kernels that some rank cannot have: machines may differ. Collective.

    Raises:
        ConfigError: With what the first such rank lacks, and, of several machines, which one it is on.
    """

    def check_here() -> None:
        with _naming_machine(env):
            check(config, world_size=env.world_size, hardware=hardware)

    everywhere(world, check_here)


@contextmanager
def _naming_machine(env: LaunchEnv) -> Iterator[None]:
    """Adds to what is wrong on one of several machines which one it is."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if env.world_size == env.local_size:
            raise
        raise type(error)(f"{error} (on {socket.gethostname()}, rank {env.rank})") from None


@contextmanager
def _naming_another_step(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds to what is wrong with a checkpoint how to start from another one. Every rank raises what the first that failed did."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error} (another step: {other_step(checkpoint.folder, checkpoint.step)})") from None


def _best_so_far(metadata: Mapping[str, Any], config: RunConfig) -> float | None:
    """The lowest validation loss of a checkpoint; None where the run measures other text, with which it cannot be compared."""
    there, here = metadata["config"]["data"], to_dict(config)["data"]
    same = all(there.get(key, default) == here[key] for key, default in (("path", ""), ("valid", ""), ("attention", "causal")))
    return metadata["best_val_loss"] if same else None


def _resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with `precision.dtype: auto` decided, so that a run keeps its numbers where a resume finds other devices."""
    if config.precision.dtype != "auto":
        return config
    # Where Transformer Engine is asked for on a CPU, the CPU is what is wrong, and no dtype is.
    bf16 = device.type == "cuda" or config.precision.backend == "te"
    return replace(config, precision=replace(config.precision, dtype="bf16" if bf16 else "fp32"))
