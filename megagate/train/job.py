"""One rank's part of a run, from the process group to the closing words."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megagate.backend.native import NativeBackend
from megagate.checkpoint import folders
from megagate.checkpoint.store import Checkpoint
from megagate.config.run import RunConfig
from megagate.data.dataset import DataSet, open_dataset, prepare
from megagate.data.loader import TrainLoader, ValidLoader
from megagate.engine.base import Engine
from megagate.engine.zero import ZeroEngine
from megagate.errors import DataError
from megagate.log import logger
from megagate.model.lm import LanguageModel
from megagate.parallel.comm import barrier, gather_objects
from megagate.parallel.init import LaunchEnv, init_process_group, pick_device
from megagate.parallel.mesh import ParallelMesh
from megagate.train.agree import everywhere, on_first
from megagate.train.folder import RunFolder, require_same_model
from megagate.train.metrics import MetricsFile, Sink, WandbSink
from megagate.train.report import tell_learning, tell_next, tell_sample
from megagate.train.saver import Saver
from megagate.train.trainer import Position, Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Job:
    """Sets up a run on this rank and carries it through. Collective: every rank makes one."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.env = LaunchEnv.read()
        self.device = pick_device(self.env.local_rank, local_size=self.env.local_size)
        init_process_group(self.env, device=self.device, timeout=COLLECTIVE_TIMEOUT)
        self.mesh = ParallelMesh.build(tp=config.parallel.tp, ep=config.parallel.ep, timeout=COLLECTIVE_TIMEOUT)
        self.folder = RunFolder(Path(config.train.output_dir))

    def run(self) -> int:
        """Returns the exit code, see `main`."""
        code = self._run()
        barrier(self.mesh.world)  # a rank that leaves early would break the others' last collective
        dist.destroy_process_group()
        return code

    def _run(self) -> int:
        world, config = self.mesh.world, self.config
        # Everything that only reads comes before the first thing that writes.
        checkpoint = everywhere(world, self._open_start)
        if checkpoint is not None and checkpoint.step >= config.train.steps:
            logger.info("finished already: %s is at step %d of %d; nothing to do", checkpoint.folder, checkpoint.step, config.train.steps)
            return 0
        data = self._open_data()
        train, valid = self._loaders(data)
        saver = Saver(self.folder.checkpoints, config=config, mesh=self.mesh, data=train.fingerprint)
        if checkpoint is not None:
            saver.require_sound(checkpoint)
        on_first(world, lambda: (self.folder.claim(config), folders.clean_leftovers(self.folder.checkpoints)))
        engine = self._build_engine()
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
        return checkpoint

    def _open_data(self) -> DataSet:
        config = self.config
        where = {"vocab_size": config.model.vocab_size, "directory": Path(config.data.cache_dir or self.folder.path / "data")}
        # One process per machine prepares, so that machines without a shared disk work too.
        everywhere(self.mesh.world, lambda: self.env.local_rank or prepare(config.data.path, **where))
        data = everywhere(self.mesh.world, lambda: open_dataset(config.data.path, **where))
        if len(set(gather_objects(data.fingerprint, self.mesh.world))) > 1:
            raise DataError(
                f"data.path ({config.data.path}) holds other tokens on some machines than on others; copy one data set to all of them "
                "(`embedded` differs between versions of Python)"
            )
        logger.info("data: %s", data.describe())
        return data

    def _loaders(self, data: DataSet) -> tuple[TrainLoader, ValidLoader | None]:
        train, dp = self.config.train, self.mesh.dp
        shared = {"seq_len": train.seq_len, "micro_batch_size": self.config.micro_batch(dp.size), "dp_rank": dp.rank, "dp_size": dp.size}

        def make() -> tuple[TrainLoader, ValidLoader | None]:
            loader = TrainLoader(data.train, **shared, global_batch_size=train.global_batch_size, seed=train.seed)
            return loader, ValidLoader(data.valid, **shared, batches=self.config.eval.batches) if data.valid.tokens else None

        return everywhere(self.mesh.world, make)

    def _build_engine(self) -> Engine:
        config = self.config
        dtype = DTYPES[self._dtype()]
        backend = NativeBackend(self.device)
        model = LanguageModel(config.model, dtype=dtype, backend=backend, mesh=self.mesh, recompute=config.train.recompute)
        model.initialize(seed=config.train.seed, device=self.device)
        mesh = self.mesh
        logger.info(
            "model: %s parameters on this rank, %s; %d ranks on %s: dp %d, tp %d, ep %d; ZeRO-%d",
            *(f"{sum(p.numel() for p in model.parameters()):,}", self._dtype(), mesh.world.size, self.device.type),
            *(mesh.dp.size, mesh.tp.size, mesh.ep.size, config.parallel.zero_stage),
        )
        return ZeroEngine(model, config, mesh)

    def _dtype(self) -> str:
        if self.config.precision.dtype != "auto":
            return self.config.precision.dtype
        return "bf16" if self.device.type == "cuda" else "fp32"

    def _resume(self, saver: Saver, engine: Engine, checkpoint: Checkpoint | None) -> Position:
        if checkpoint is None:
            return Position()
        saver.load(engine, checkpoint)
        logger.info("resumed from the checkpoint of step %d", checkpoint.step)
        return Position(checkpoint.step, checkpoint.metadata["best_val_loss"])

    def _sinks(self, step: int) -> list[Sink]:
        if self.mesh.world.rank:
            return []
        sinks: list[Sink] = [MetricsFile(self.folder.metrics, last_step=step)]
        if self.config.wandb.mode != "disabled":
            sinks.append(WandbSink(self.config, self.folder.path))
        return sinks

    def _close(self, position: Position, engine: Engine, data: DataSet, valid: ValidLoader | None) -> int:
        tell_sample(self.config, engine=engine, data=data)
        learnt = valid is None or position.val_loss is None or tell_learning(self.config, val_loss=position.val_loss, valid=valid)
        tell_next(self.config, self.folder, world_size=self.mesh.world.size)
        return 0 if learnt else 1
