"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megagate.config.run import RunConfig
from megagate.data.loader import Batch, TrainLoader, ValidLoader
from megagate.engine.base import Engine, StepResult
from megagate.engine.nonfinite import first_nonfinite
from megagate.errors import MegagateError, NotFiniteError
from megagate.log import logger
from megagate.train.agree import everywhere
from megagate.train.certify import Followed
from megagate.train.folder import RunFolder
from megagate.train.metrics import Record, Sink, Speed, step_fields
from megagate.train.observe import Observer
from megagate.train.progress import Progress
from megagate.train.saver import Saver
from megagate.train.schedule import learning_rate
from megagate.train.spike_watch import SpikeWatch
from megagate.train.stop import StopSignal


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Args:
        step: Optimizer steps done.
        best_val_loss: Lowest validation loss so far, nats; None before the first.
        val_loss: The newest, if it was taken at `step`.
    """

    step: int = 0
    best_val_loss: float | None = None
    val_loss: float | None = None

    @property
    def is_best(self) -> bool:
        """Whether the validation at this step gave the lowest loss so far."""
        return self.val_loss is not None and self.val_loss == self.best_val_loss


class Trainer:
    """Steps, validations, checkpoints and records of one run.

    Args:
        config: The run.
        engine: The model and its optimizer.
        train: Batches by step.
        valid: The validation batches by the name of their set; empty where there are none.
        saver: Writes checkpoints.
        folder: Of the run.
        sinks: Where records go; empty on all ranks but the first.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        train: TrainLoader,
        valid: Mapping[str, ValidLoader],
        saver: Saver,
        folder: RunFolder,
        sinks: list[Sink],
    ):
        self.config, self.engine, self.train, self.valid = config, engine, train, valid
        self.saver, self.folder, self.sinks = saver, folder, sinks
        self.world = engine.mesh.world
        self.device = engine.model.embedding.weight.device
        self.observer = Observer(config, engine)
        self.speed = Speed(config, world_size=self.world.size, device=self.device)

    def run(self, position: Position) -> tuple[Position, int]:
        """Train to the end, or until a signal asks to stop.

        Returns:
            The position reached, and the signal (0 when the run is finished). In both cases its checkpoint is saved.

        Raises:
            NotFiniteError: A loss or norm, or a tensor that delayed scaling saturated, was not finite and `train.on_nonfinite` is
                `stop`; the newest checkpoint stands.
        """
        progress = Progress(
            first=position.step, steps=self.config.train.steps, log_every=self.config.log.every, visible=self.world.rank == 0
        )
        with StopSignal() as stop, ExitStack() as closing:
            closing.callback(progress.close)
            profiler = closing.enter_context(self._profiler(position.step))
            try:
                return self._loop(position, stop=stop, progress=progress, profiler=profiler)
            except MegagateError:  # all ranks raise it together, and what is being written was sound
                self._finish_saving()
                raise
            except BaseException:
                self.saver.abandon()
                raise

    def _loop(self, position: Position, *, stop: StopSignal, progress: Progress, profiler: Callable[[], None]) -> tuple[Position, int]:
        """The launcher kills its ranks 30 s after its signal, which is therefore asked for after all that may take long."""
        steps, asked = self.config.train.steps, 0
        watch = SpikeWatch(self.folder.metrics, step=position.step, loader=self.train) if self.world.rank == 0 else None

        def ask() -> int:
            nonlocal asked
            # After the last step there is nothing left to stop.
            asked = asked or (stop.agreed(self.world, self.device) if position.step < steps else 0)
            return asked

        while position.step < steps and not asked:
            position, record = self._step(position)
            if not ask():
                position, record = self._validate(position, record, ask)
            record |= self.saver.stall() | (watch.look(position.step, record["loss"]) if watch is not None else {})
            # The record first: a run killed between the two resumes from an older checkpoint and drops the record again.
            everywhere(self.world, lambda record=record: [sink.write(record) for sink in self.sinks])
            progress.step(record)
            self.saver.poll()
            if asked or self._save_is_due(position):
                self._save(position, last=bool(asked) or position.step == steps)
                ask()  # what came while the state was copied needs no further step
            profiler()
        self.saver.finish()
        return position, asked

    def _finish_saving(self) -> None:
        """Before the loop is left by an error, which is told; one of the save is told in passing."""
        try:
            self.saver.finish()
        except MegagateError as error:
            logger.error("%s: %s", type(error).__name__, error)

    def validate(self, ask: Callable[[], int] = lambda: 0) -> Record:
        """`val_loss`, the mean loss over all validation targets in nats, and `val_loss/NAME` of each set that has a name. Collective.

        Args:
            ask: Called after each batch, on all ranks; once it says other than 0, the validation is given up, and nothing is returned.
        """
        assert self.valid, "a data set without validation tokens is never validated"
        losses, asked = {}, 0

        def until_asked(batches: list[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal asked
            for batch in batches:
                yield self._tensor(batch.tokens), self._tensor(batch.labels)
                asked = ask()
                if asked:
                    return

        for name, loader in self.valid.items():
            batches = everywhere(self.world, lambda loader=loader: list(loader))
            losses[name] = self.engine.evaluate(until_asked(batches))
            if asked:
                return {}
        (whole,) = losses.values() if len(losses) == 1 else (self._mean(losses),)
        return {"val_loss": whole} | {f"val_loss/{name}": loss for name, loss in losses.items() if name}

    def _mean(self, losses: Mapping[str, float]) -> float:
        """Of the losses of validation sets, each weighted by its targets."""
        targets = everywhere(self.world, lambda: {name: loader.targets for name, loader in self.valid.items()})
        return math.fsum(loss * targets[name] for name, loss in losses.items()) / sum(targets.values())

    def _step(self, position: Position) -> tuple[Position, Record]:
        began, step = time.perf_counter(), position.step + 1
        # Damage, or a disk that fails, is met by one rank alone; the others would wait for it in the step's first collective.
        batch = everywhere(self.world, lambda: self.train.step(position.step))
        lr = learning_rate(self.config, step)
        tokens, labels = self._tensor(batch.tokens), self._tensor(batch.labels)
        seen = self.observer.look(tokens[0], labels[0]) if self.observer.due(step) else {}
        result = self.engine.train_step(tokens, labels, lr=lr, detailed=bool(seen))
        seconds = time.perf_counter() - began - seen.get("observe_seconds", 0.0)
        # Before it counts as a step of this run: a resumed run whose first step is another one than it was must not record or save it.
        samples = self.train.samples(position.step)
        self.saver.follow(self.engine, Followed(step, lr=lr, result=result, samples=samples, batch=batch))
        if not (result.applied and math.isfinite(result.loss)):
            self._not_finite(step, result, batch)
        elif result.saturated:
            self._saturated(step, result)
        done = step * self.config.train.global_batch_size * self.config.train.seq_len
        record = step_fields(step, result, lr=lr, tokens=done) | self.speed.fields(seconds, context=result.context) | seen
        if result.detail is not None:
            record |= self.observer.detail_fields(result.detail)
        return replace(position, step=step, val_loss=None), record

    def _not_finite(self, step: int, result: StepResult, batch: Batch) -> None:
        first = first_nonfinite(self.engine, self._tensor(batch.tokens), self._tensor(batch.labels))
        what = f"step {step}: the loss is {result.loss} and the gradient norm {result.grad_norm}; {first}"
        if result.saturated:  # which the passes, done again with other scales, may not show
            what += f"; in FP8 {result.saturated}"
        if self.config.train.on_nonfinite == "skip" and not result.applied:
            logger.info("%s; the parameters keep their values (train.on_nonfinite: skip)", what)
            return
        raise self._stopped(what)

    def _saturated(self, step: int, result: StepResult) -> None:
        what = (
            f"step {step}: {result.saturated}, which FP8's delayed scaling made its largest number: the loss is {result.loss} and the step "
            "was applied with that"
        )
        if self.config.train.on_nonfinite == "stop":
            raise self._stopped(what)
        logger.info("%s; training goes on (train.on_nonfinite: skip)", what)

    def _stopped(self, what: str) -> NotFiniteError:
        return NotFiniteError(
            f"{what}; training stops (train.on_nonfinite: {self.config.train.on_nonfinite}) and the checkpoints in "
            f"{self.folder.checkpoints} stay as they were; lower optim.lr or raise schedule.warmup_steps, and start again in another "
            "train.output_dir"
        )

    def _validate(self, position: Position, record: Record, ask: Callable[[], int]) -> tuple[Position, Record]:
        """At the steps that `eval.every` names, and at the end: the validation loss, whether it is the lowest; unless `ask` ends it."""
        last = position.step == self.config.train.steps
        if not self.valid or not (last or self._due(self.config.eval.every, position.step)):
            return position, record
        found = self.validate(ask)
        if not found:
            return position, record
        loss = found["val_loss"]
        candidates = [value for value in (loss, position.best_val_loss) if value is not None and math.isfinite(value)]
        best = min(candidates, default=None)
        position = replace(position, val_loss=loss, best_val_loss=best)
        named = "".join(f", {key.partition('/')[2]} {value:.4f}" for key, value in found.items() if key != "val_loss")
        logger.info("step %d: validation loss %.4f nats%s%s", position.step, loss, named, ", the lowest so far" if position.is_best else "")
        return position, record | found

    def _save_is_due(self, position: Position) -> bool:
        every, last = self.config.checkpoint.every, position.step == self.config.train.steps
        return last or position.is_best or self._due(every, position.step)

    def _save(self, position: Position, *, last: bool) -> None:
        # A run that goes on from here has its records up to here, also behind a machine that went down.
        everywhere(self.world, lambda: [sink.sync() for sink in self.sinks])
        best = position.is_best
        self.saver.save(self.engine, step=position.step, best_val_loss=position.best_val_loss, best=best, last=last)

    @contextmanager
    def _profiler(self, first: int) -> Iterator[Callable[[], None]]:
        """Yields what is called after each step; traces the configured steps, or what is left of them, on the first rank."""
        wanted = self.config.profile
        skipped = max(0, wanted.start_step - 1 - first)
        active = wanted.start_step - 1 + wanted.steps - first - skipped
        if not wanted.steps or active < 1 or self.world.rank:
            yield lambda: None
            return
        schedule = torch.profiler.schedule(skip_first=max(0, skipped - 1), wait=0, warmup=min(1, skipped), active=active, repeat=1)
        handler = torch.profiler.tensorboard_trace_handler(str(self.folder.profile), worker_name="rank-0")
        with torch.profiler.profile(schedule=schedule, on_trace_ready=handler) as profile:
            yield profile.step

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0
