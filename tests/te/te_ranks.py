"""Ranks in which Transformer Engine's Python layer runs (`shim.py`): a pool of their own, since what the shim patches stays patched."""

from collections.abc import Callable
from typing import Any

import pytest
import ranks
from te import shim

from megagate.parallel.spawn import RankError, RankPool

REASON = shim.why_not()
needs_te = pytest.mark.skipif(REASON is not None, reason=f"{REASON}; .ci/run installs it")


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(RankContext, *args)` returned in each rank; see `megagate.parallel.spawn.run_ranks`."""
    __tracebackhide__ = True
    ranks.start()
    try:
        return POOL.run(function, world_size, *args, timeout=timeout)
    except RankError as error:
        raise error.with_traceback(None)  # noqa: B904 - its text has the rank's own; the way through the pool tells nothing


def before_call() -> None:
    """In a rank: the shim, once."""
    ranks.before_call()
    shim.install()


def after_call() -> None:
    """In a rank: forget what delayed scaling has gathered in TE's one global state."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    ranks.after_call()


POOL = RankPool(environment={**ranks.ENVIRONMENT, **shim.ENVIRONMENT}, before=before_call, after=after_call)
