"""What a piece of work adds to a process's memory, and what an import costs, as the kernel counts it (Linux)."""

import importlib
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Growth:
    """Growth of this process's memory since the object was made, in bytes.

    `peak`: of the largest resident set, mapped pages of files included. `private`: of what is the process's own now, files left out.
    """

    def __init__(self) -> None:
        _CLEAR_REFS.write_text("5")  # the peak begins anew
        self._before = _fields("VmRSS", "RssAnon")

    def notes(self) -> dict[str, float]:
        """{"peak": bytes, "private": bytes}"""
        peak, private = _fields("VmHWM", "RssAnon")
        return {"peak": peak - self._before[0], "private": private - self._before[1]}


def import_cost(*modules: str) -> dict[str, float]:
    """Imports modules that were not imported yet: {"import_cpu": seconds of the processor, "import_bytes": of memory}."""
    before, start = _fields("VmRSS")[0], time.process_time()
    for module in modules:
        importlib.import_module(module)
    return {"import_cpu": time.process_time() - start, "import_bytes": _fields("VmRSS")[0] - before}


def _fields(*names: str) -> list[int]:
    found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return [1024 * int(found[name].split()[0]) for name in names]
