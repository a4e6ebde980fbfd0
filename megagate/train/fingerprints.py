"""The fingerprint of the live state, taken at a save and again after a load: the part that all ranks do together."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megagate.checkpoint.fingerprint import FINGERPRINT, differing, digits, recorded, sums
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.run import CheckpointConfig
from megagate.engine.base import Engine
from megagate.errors import CheckpointError
from megagate.log import logger
from megagate.parallel.comm import total
from megagate.parallel.mesh import Axis
from megagate.train.agree import everywhere
from megagate.train.background import Task
from megagate.train.certify import side_stream
from megagate.train.folder import other_step


class Taking(NamedTuple):
    """A fingerprint that is being taken.

    Args:
        names: Of the tensors.
        small: This rank's sums of what training may change before its optimizer does; [names] int64.
        task: Gives those of the rest.
        hook: Keeps the optimizer from its next step until the task is over; None where it is.
    """

    names: list[str]
    small: Tensor
    task: Task[Tensor]
    hook: RemovableHandle | None

    def result(self, world: Axis) -> dict[str, str]:
        """Wait for it; the fingerprint of the whole state. Collective over `world`."""
        own = everywhere(world, self.task.result)
        self.drop()
        assert own is not None, "a task that raised nothing has a result"
        # Whole numbers, whose sum wraps alike in any order.
        return dict(zip(self.names, map(digits, total(own + self.small, world).tolist()), strict=True))

    def drop(self) -> None:
        """Wait for it, and let the optimizer go on; nobody needs it any more."""
        self.task.wait()
        if self.hook is not None:
            self.hook.remove()


def take(engine: Engine, others: Iterable[Piece], *, names: Iterable[str], background: bool) -> Taking:
    """Begin to take the fingerprint of the engine's state as it is now, and of `others`.

    Args:
        engine: Its live pieces are read, not any copy: what a copy loses shows.
        others: This rank's pieces of what else a checkpoint holds.
        names: Of those, over all ranks.
        background: In a thread, beside the next step's forward and backward passes; its optimizer waits for it.
    """
    all_names = [*engine.state_names, *names]
    pieces = [*engine.state_pieces(), *others]
    # Masters and moments stay as they are until the optimizer's next step; routers' counters are few, and have their own ways.
    still = [piece for piece in pieces if piece.name.partition("/")[0] in engine.kinds]
    small = sums((piece for piece in pieces if piece.name.partition("/")[0] not in engine.kinds), all_names)
    stream = side_stream(engine.model.embedding.weight.device) if background else nullcontext()

    def rest() -> Tensor:
        with stream:
            return sums(still, all_names)

    task = Task(rest, background=background)
    hook = engine.optimizer.register_step_pre_hook(lambda *_: task.wait()) if background else None
    return Taking(all_names, small, task, hook)


def tell_changed_precision(engine: Engine, checkpoint: Checkpoint) -> None:
    """Say it where the histories of FP8 that this run keeps are not those that a checkpoint holds."""
    begun, left = engine.unmatched(checkpoint)
    if begun:
        logger.info(
            "%d tensors of FP8's delayed scaling begin fresh, such as %s: %s has none of this shape (saved without FP8, with another "
            "recipe, precision.fp8.amax_history or backend, or written by a tool such as retrofit_gate.py); the first micro-step may "
            "round more, then scales follow",
            *(len(begun), begun[0], checkpoint.folder.name),
        )
    if left:
        logger.info(
            "%d tensors of FP8's delayed scaling in %s are left there, such as %s: this run keeps none of this shape (precision.fp8.recipe "
            "%s); masters, moments and all else are taken",
            *(len(left), checkpoint.folder.name, left[0], engine.config.precision.fp8.recipe),
        )


def hold(engine: Engine, checkpoint: Checkpoint, others: Iterable[Piece], *, names: Iterable[str], config: CheckpointConfig) -> bool:
    """Compare the state that was just loaded with the one that was saved, under whatever layout. Collective.

    Args:
        engine: It has the state.
        checkpoint: It was loaded from here.
        others: This rank's pieces of what else was loaded.
        names: Of those, over all ranks.
        config: What to do where they differ.

    Returns:
        Whether it is the same; where nobody took a fingerprint, or histories of FP8 begin fresh, which is said, it is not known to be.

    Raises:
        CheckpointError: It is another one, and `checkpoint.on_mismatch` is `stop`.
    """
    world = engine.mesh.world
    there = recorded(checkpoint.metadata)
    if there is None:
        logger.info(
            "the loaded state is NOT COMPARED with the one that was saved: %s has no %s of it (imported, rewritten by a tool, or saved by "
            "an older version)",
            *(checkpoint.folder.name, FINGERPRINT),
        )
        return False
    here = everywhere(world, lambda: take(engine, others, names=names, background=False)).result(world)
    begun, left = engine.unmatched(checkpoint)
    here = {name: one for name, one in here.items() if name not in begun}
    # What this version of PyTorch could not take over, such as another generator's state, has no piece here.
    there = {name: one for name, one in there.items() if name not in left and (name in here or not name.startswith("rng/"))}
    wrong = differing(there, here)
    if not wrong:
        but = f", but {len(begun) + len(left)} of FP8 are not compared" if begun or left else ""
        logger.info("the loaded state is the one that was saved: %d tensors have the same fingerprints%s", len(here), but)
        return not begun
    name = wrong[0]
    others_too = f"; {len(wrong) - 1} other tensors differ too" if len(wrong) > 1 else ""
    told = (
        f"{name}, as loaded from {checkpoint.folder}, is not what was saved: its fingerprint is {here.get(name, 'missing')}, "
        f"{there.get(name, 'none')} was recorded from the state in memory (every bit must be the same, under any layout){others_too}"
    )
    if config.on_mismatch == "continue":
        logger.warning("%s; going on all the same, as checkpoint.on_mismatch is continue", told)
        return False
    raise CheckpointError(
        f"{told}; so it was damaged between that memory and this one: resume from another step "
        f"({other_step(checkpoint.folder, checkpoint.step)}), or go on from this one with --checkpoint.on_mismatch continue"
    )
