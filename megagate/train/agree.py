"""Errors of one rank, known to all."""

from collections.abc import Callable
from typing import TypeVar

import torch

from megagate.errors import MegagateError, RunError
from megagate.parallel.comm import gather_objects, maximum
from megagate.parallel.mesh import Axis

T = TypeVar("T")


def everywhere(world: Axis, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, all ranks raise the first rank's error, so that none waits for one that left.

    Collective over `world`. Errors that a user can mend and those of disks are shared; a bug shows as that rank's own traceback.

    Raises:
        MegagateError: What the first failing rank raised; RunError for an OSError.
    """
    value, problem = None, None
    try:
        value = action()
    except MegagateError as error:
        problem = error
    except OSError as error:
        problem = RunError(f"{error} (rank {world.rank}); look after that disk, then start the same command again")
    try:
        # A number is enough where all is well, and cheap enough for every step.
        if maximum(torch.tensor(int(problem is not None)), world):
            raise next(found for found in gather_objects(problem, world) if found is not None)
        return value
    finally:
        # An error knows this frame, and this frame the error: such a ring keeps process groups alive until Python ends, which aborts then.
        problem = None


def on_first(world: Axis, action: Callable[[], T]) -> T | None:
    """Run `action` on the first rank alone, its errors shared with all; the others get None. Collective over `world`."""
    return everywhere(world, lambda: action() if world.rank == 0 else None)
