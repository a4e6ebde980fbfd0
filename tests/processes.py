"""Whether processes have ended. A signal that kills is sent at once and obeyed a moment later, on a busy machine some moments."""

import time
from collections.abc import Iterable

import psutil

GONE_WITHIN_S = 30


def gone(pids: Iterable[int]) -> bool:
    """Whether all of them end in reasonable time."""
    left, limit = list(pids), time.monotonic() + GONE_WITHIN_S
    while (left := [pid for pid in left if _alive(pid)]) and time.monotonic() < limit:
        time.sleep(0.01)
    return not left


def _alive(pid: int) -> bool:
    """One that ended and waits to be reaped, by whoever adopted it, is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
