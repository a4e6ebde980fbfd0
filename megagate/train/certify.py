"""The step after a checkpoint, measured for its certificate, or held to it: the part that all ranks do together."""

import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megagate.checkpoint import store
from megagate.checkpoint.certificate import NEXT_STEP_NAME, Circumstances, NextStep, Scope, compare, read_next_step, scope, write_next_step
from megagate.checkpoint.reshard import read_flat
from megagate.checkpoint.staging import HostCopy
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.keys import from_dict
from megagate.config.run import RunConfig
from megagate.data.loader import Batch
from megagate.engine.base import Engine, StepResult
from megagate.errors import CheckpointError
from megagate.log import logger
from megagate.parallel.comm import gather_objects, total
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.train.agree import everywhere, on_first
from megagate.train.background import Task
from megagate.train.folder import other_step

CHUNK_ELEMENTS = 1 << 18
"""Elements whose change is summed at a time, so that they stay in a core's cache: all the memory, times 8 bytes, that measuring needs."""

Old = Callable[[Piece, int, Tensor], Tensor | None]
"""(piece as it is now, first element of a chunk, the chunk as it is now) -> the chunk as it was, on the same device; None for zeros.

Shapes: both chunks [elements]."""


Sums = tuple[Tensor, Tensor]
"""A rank's part of the sums of squared changes, [tensors] fp64, and of bits, [tensors] int64 that may overflow."""


@dataclass(frozen=True)
class Followed:
    """A step that was just made.

    Args:
        step: Its number, counted from 1.
        lr: Its learning rate.
        result: What the engine returned.
        samples: [accumulation, micro_batch_size] this rank's samples, counted from the run's first.
        batch: Their tokens and targets.
    """

    step: int
    lr: float
    result: StepResult
    samples: np.ndarray
    batch: Batch


class Moved(NamedTuple):
    """What a step did to the optimizer's state, by tensor, each element counted once.

    Args:
        updates: Root of the sum of squared changes, fp64.
        bits: The sum of the new elements' bits as int32, modulo 2^64, hexadecimal.
    """

    updates: dict[str, float]
    bits: dict[str, str]


class _Measuring(NamedTuple):
    """A step whose updates a thread is summing.

    Args:
        facts: All but the updates.
        names: Of the tensors.
        task: Sums this rank's part of them.
        hook: Keeps the optimizer from its next step until the task is over.
    """

    facts: NextStep
    names: list[str]
    task: Task[Sums]
    hook: RemovableHandle


class Certifier:
    """Between a save and the step after it, and between a resume and its first step.

    Args:
        root: Folder of the run's checkpoints.
        config: The run.
        mesh: Its ranks.
    """

    def __init__(self, root: Path, *, config: RunConfig, mesh: ParallelMesh):
        self.root, self.config, self.mesh, self.world = root, config, mesh, mesh.world
        self._saved: tuple[int, HostCopy | None] | None = None  # the newest save, until the step after it is made
        self._measuring: _Measuring | None = None  # until the step after that one, or until somebody waits for it
        self._measured: NextStep | None = None  # until the checkpoint before it is published
        self._expected: tuple[Checkpoint, NextStep] | None = None  # until the first step of a resumed run is made
        self._same_state = False  # whether a resumed run began with the very state that was saved

    def saved(self, step: int, copy: HostCopy | None) -> None:
        """The state after `step` was saved; `copy` holds it until the next save."""
        self._saved = step, copy

    def waits_for(self, step: int) -> bool:
        """Whether `follow` has something to do at `step`."""
        follows = self._saved is not None and self._saved[0] == step - 1
        return follows or self._expected is not None or self._measuring is not None

    @property
    def tasks(self) -> list[Task[Sums]]:
        """What a thread is doing for it, if anything."""
        return [self._measuring.task] if self._measuring else []

    def follow(self, engine: Engine, followed: Followed) -> None:
        """Compare the step with what is expected of it, or measure it, beside the next step where there is a copy to measure against.

        Collective.

        Raises:
            CheckpointError: It is not the one that was recorded, and `checkpoint.on_mismatch` is `stop`.
        """
        self.collect()
        if self._expected is not None:
            (checkpoint, recorded), self._expected = self._expected, None
            with checkpoint:
                self._hold(engine, followed, checkpoint, recorded)
        elif self._saved is not None:
            (step, copy), self._saved = self._saved, None
            if copy is not None:
                self._begin(engine, followed, copy)
                return
            with everywhere(self.world, lambda: Checkpoint.open(store.step_path(self.root, step))) as checkpoint:
                self._measured = self._facts(engine, followed, self._moved(engine, followed, old_on_disk(checkpoint)))

    def collect(self) -> None:
        """Wait for what is being measured, if anything. Collective; the copy is needed no more afterwards."""
        measuring, self._measuring = self._measuring, None
        if measuring is None:
            return
        measuring.hook.remove()
        sums = everywhere(self.world, measuring.task.result)
        assert sums is not None, "a task that raised nothing has a result"
        moved = _joined(measuring.names, sums, self.world)
        self._measured = replace(measuring.facts, updates=moved.updates, bits=moved.bits)

    def forget(self) -> None:
        """The checkpoint before the newest step will not be published: nothing is to be certified."""
        if self._measuring is not None:
            self._measuring.task.wait()
            self._measuring.hook.remove()
        self._saved = self._measuring = self._measured = None

    def write(self) -> None:
        """Put what was measured, if anything, beside the checkpoint before it, which is published. Collective.

        Raises:
            RunError: No space.
        """
        measured, self._measured = self._measured, None
        if measured is not None:
            on_first(self.world, lambda: write_next_step(store.step_path(self.root, measured.step - 1), measured))

    def expect(self, checkpoint: Checkpoint, *, same_state: bool) -> None:
        """Hold the next step to what followed `checkpoint`; see `Saver.expect`. `same_state`: its fingerprint agrees. Collective."""
        self._same_state = same_state
        found = on_first(self.world, lambda: read_next_step(checkpoint.folder))
        recorded = gather_objects(found, self.world)[0]
        if recorded is not None and recorded.step != checkpoint.step + 1:
            raise CheckpointError(
                f"{checkpoint.folder / NEXT_STEP_NAME} is of step {recorded.step}, that of step {checkpoint.step + 1} belongs there; "
                "delete the file, and the resume will say that it could not do the step again"
            )
        if recorded is not None:
            self._expected = checkpoint, recorded
            return
        checkpoint.close()  # its files are mapped: pruned later, they would keep their space
        logger.info(
            "NOT CHECKED by doing the next step again: %s has no %s (saved at a signal or as the last of a run, killed before the next "
            "step, or written by a tool); each piece of it has the digest that was recorded for it",
            *(checkpoint.folder.name, NEXT_STEP_NAME),
        )

    def _hold(self, engine: Engine, followed: Followed, checkpoint: Checkpoint, recorded: NextStep) -> None:
        now = circumstances(self.config, self.mesh, engine.model.embedding.weight.device)
        what = scope(recorded, now, there=from_dict(checkpoint.metadata["config"]), here=self.config, lr=followed.lr)
        old = None if what.updates else old_on_disk(checkpoint)
        found = self._facts(engine, followed, self._moved(engine, followed, old))
        on_first(self.world, lambda: self._judge(checkpoint.folder, recorded, found, what))

    def _judge(self, folder: Path, recorded: NextStep, found: NextStep, what: Scope) -> None:
        difference, unchecked = compare(recorded, found, what, same_state=self._same_state)
        for sentence in unchecked:
            logger.info("step %d: NOT CHECKED against %s of %s: %s", found.step, NEXT_STEP_NAME, folder.name, sentence)
        if difference is None:
            if not what.loss and found.tokens == recorded.tokens:
                how = "" if recorded.circumstances == found.circumstances else ", to rounding"
                logger.info("step %d, done again, is the one that followed %s when it was saved%s", found.step, folder.name, how)
            return
        told = f"step {found.step}, done again from {folder}: {difference}"
        if self.config.checkpoint.on_mismatch == "continue":
            logger.warning("%s; going on all the same, as checkpoint.on_mismatch is continue", told)
            return
        suspects = "the data, the code or the machine" if self._same_state else "the state, the data, the code or the machine"
        raise CheckpointError(
            f"{told}; so {suspects} is not what it was when that was recorded; resume from another step "
            f"({other_step(folder, found.step - 1)}), or go on from this one with --checkpoint.on_mismatch continue"
        )

    def _begin(self, engine: Engine, followed: Followed, copy: HostCopy) -> None:
        """Masters and moments stay as they are until the optimizer's next step, and forward and backward passes need no waiting."""
        facts = self._facts(engine, followed, Moved({}, {}))
        if not followed.result.applied:
            self._measured = facts
            return
        names, pieces, old = state_names(engine), list(engine.state_pieces()), old_on_host(copy)
        stream = side_stream(engine.model.embedding.weight.device)

        def sums() -> Sums:
            with stream:
                return _own_sums(pieces, old, names)

        task = Task(sums, background=True)
        hook = engine.optimizer.register_step_pre_hook(lambda *_: task.wait())
        self._measuring = _Measuring(facts, names, task, hook)

    @staticmethod
    def _moved(engine: Engine, followed: Followed, old: Old | None) -> Moved:
        return moved_since(engine, old) if old is not None and followed.result.applied else Moved({}, {})

    def _facts(self, engine: Engine, followed: Followed, moved: Moved) -> NextStep:
        result = followed.result
        return NextStep(
            step=followed.step,
            tokens=tokens_digest(followed.samples, followed.batch, self.mesh.dp),
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=followed.lr,
            applied=result.applied,
            updates=moved.updates,
            bits=moved.bits,
            circumstances=circumstances(self.config, self.mesh, engine.model.embedding.weight.device),
        )


def circumstances(config: RunConfig, mesh: ParallelMesh, device: torch.device) -> Circumstances:
    """Those of this run; rank 0's device stands for all."""
    return Circumstances(
        dp=mesh.dp.size,
        tp=mesh.tp.size,
        ep=mesh.ep.size,
        zero_stage=config.parallel.zero_stage,
        micro_step_samples=config.micro_batch(mesh.dp.size) * mesh.dp.size,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        dtype=config.precision.dtype,
        grad_dtype=config.precision.grad_dtype,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        optimizer=config.optim.implementation,
        norm=config.precision.norm,
        fp8=config.precision.fp8.recipe,
    )


def _processor() -> str:
    """The CPU's model, and the instructions that PyTorch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def tokens_digest(samples: np.ndarray, batch: Batch, dp: Axis) -> str:
    """Digest of a step's samples, whichever rank holds which. Collective over `dp`.

    Args:
        samples: [accumulation, micro_batch_size] number of each sample of this rank, counted from the run's first.
        batch: Its tokens and targets.
        dp: The data-parallel axis.
    """
    value = 0
    for place, number in np.ndenumerate(samples):
        hasher = blake3(int(number).to_bytes(8, "little"))
        for array in (batch.tokens, batch.labels):
            hasher.update(np.ascontiguousarray(array[place], dtype="<i8").tobytes())
        value += int.from_bytes(hasher.digest(length=8), "little")
    # In halves, so that no sum over ranks leaves int64.
    low, high = total(torch.tensor([value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF]), dp).tolist()
    return f"{(low + (high << 32)) % (1 << 64):016x}"


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """For a thread that reads what is there now: on GPUs a stream of its own, so that its copies do not hold up training's kernels."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def moved_since(engine: Engine, old: Old) -> Moved:
    """What changed since `old`. Collective over the world."""
    world, names = engine.mesh.world, state_names(engine)
    return _joined(names, everywhere(world, lambda: _own_sums(list(engine.state_pieces()), old, names)), world)


def state_names(engine: Engine) -> list[str]:
    """The tensors that are measured, such as `exp_avg/NAME`; the same on all ranks."""
    return [f"{kind}/{name}" for kind in engine.kinds for name in engine.labels]


def _joined(names: list[str], sums: Sums, world: Axis) -> Moved:
    squares, bits = (total(part, world).tolist() for part in sums)
    updates = {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}
    return Moved(updates, {name: f"{value % (1 << 64):016x}" for name, value in zip(names, bits, strict=True)})


@torch.no_grad()
def _own_sums(pieces: list[Piece], old: Old, names: list[str]) -> Sums:
    """Uses no collective; raises where a disk fails."""
    place = {name: number for number, name in enumerate(names)}
    pieces = [piece for piece in pieces if piece.name in place]
    device = pieces[0].tensor.device if pieces else torch.device("cpu")
    squares, bits = (torch.zeros(len(names), dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
    for piece in pieces:
        now = piece.tensor.detach().reshape(-1)
        for start in range(0, now.numel(), CHUNK_ELEMENTS):
            chunk = now[start : start + CHUNK_ELEMENTS]
            before = old(piece, start, chunk)
            moved = chunk if before is None else chunk - before
            squares[place[piece.name]] += torch.linalg.vector_norm(moved, dtype=torch.float64).square()
            bits[place[piece.name]] += chunk.view(torch.int32).sum()
    return squares.cpu(), bits.cpu()


def old_on_host(copy: HostCopy) -> Old:
    """The state as the copy of a save still holds it."""

    def find(piece: Piece, start: int, like: Tensor) -> Tensor | None:
        held = copy.find(piece.name, piece.offset)
        return None if held is None else held.view(-1)[start : start + like.numel()].to(like.device)

    return find


def old_on_disk(checkpoint: Checkpoint) -> Old:
    """The state as a checkpoint of any layout holds it, read chunk by chunk.

    Raises (when called):
        CheckpointError: A tensor has another shape there.
    """

    def find(piece: Piece, start: int, like: Tensor) -> Tensor | None:
        if piece.name not in checkpoint.tensors:
            return None
        chunk = torch.empty(like.numel(), dtype=piece.tensor.dtype)
        where = {"full_shape": piece.full_shape, "shard_offset": piece.offset, "shard_shape": tuple(piece.tensor.shape)}
        read_flat(checkpoint, piece.name, **where, start=start, flat=chunk)
        return chunk.to(like.device)

    return find
