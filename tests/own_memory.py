"""Memory that a piece of work takes, in a process that did nothing else before and whose malloc keeps nothing back.

Counted is anonymous memory (RssAnon): pages of mapped files are the kernel's to take back.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LIMIT_S = 300
# Given back at once when it is freed. Without this setting malloc raises the bar by what was freed before, up to 32 MiB.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function of a test's module returns there. Arguments and result pass as JSON, paths as text."""
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", __name__, function.__module__, function.__name__, json.dumps(arguments, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def growth(work: Callable[[], object]) -> int:
    """By how many bytes this process's own memory grows, at most, until the work has ended and its result is there."""
    found, ended = [], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            found.append(_anonymous())
            time.sleep(0.0005)

    before, watcher = _anonymous(), threading.Thread(target=watch)
    watcher.start()
    try:
        kept = work()
        found.append(_anonymous())
    finally:
        ended.set()
        watcher.join()
    del kept
    return max(found) - before


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


if __name__ == "__main__":
    module, name, given = sys.argv[1:]
    result = getattr(importlib.import_module(module), name)(*json.loads(given))
    print(json.dumps(result))
