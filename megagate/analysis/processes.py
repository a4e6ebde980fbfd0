"""Runs of the pretraining job as processes of a tool, and their end with it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# What a launcher tells its ranks: a run by itself is told none of it, wherever the tool was started.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE_S = 60.0  # for a run that is told to stop to save


class Process(Protocol):
    """One run's process."""

    def tell(self, number: int) -> None:
        """Send a signal; nothing where it is gone."""

    def end(self, limit: float) -> None:
        """Wait for it until then, by `time.monotonic`, and kill it."""


@contextmanager
def running_processes() -> Iterator[dict[Any, Process]]:
    """For the block to keep those in that are going: however it ends, they are told to stop, which saves them, and are waited for."""
    running: dict[Any, Process] = {}
    try:
        yield running
    finally:
        for process in running.values():
            process.tell(signal.SIGTERM)
        limit = time.monotonic() + _GRACE_S
        for process in running.values():
            process.end(limit)
