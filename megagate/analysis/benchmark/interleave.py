"""Processes that work in turns, so that only one of them is busy at a time and a change of the machine's mood hits all alike.

Each entrant is a process of its own (its own kernel caches, its own peak of memory): it makes what it measures, says it is ready, and
then does one unit of work per request. The caller never loads torch.
"""

import importlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from megagate.errors import RunError

Work = Callable[[], Mapping[str, float]]
"""One unit of work; returns numbers worth keeping."""

QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of an idle process sleep at once instead of spinning."""
_LOG_LINES = 15  # of a failed entrant's output, shown with the error


@dataclass(frozen=True)
class Entrant:
    """One process to drive.

    Args:
        name: Of the row.
        target: `module:function`; called with `arguments`, it returns the `Work`.
        arguments: What JSON can carry.
        environment: Added to the process's environment.
        warmup: Units of work before the first round, not counted.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    warmup: int = 0


@dataclass
class Series:
    """What one entrant measured.

    Args:
        seconds: Per round.
        cpu_seconds: Processor time of all threads, per round: what the work costs where others use the machine too.
        peak_rss: Largest resident set of the process, bytes.
        notes: What the work returned, per round.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_rss: int = 0
    notes: list[dict[str, float]] = field(default_factory=list)


class _OutOfTimeError(Exception):
    pass


def run_rounds(
    entrants: Sequence[Entrant],
    *,
    rounds: int,
    deadline: float,
    tell: Callable[[str], None] = lambda text: None,
    enough: Callable[[dict[str, Series]], bool] = lambda series: False,
) -> dict[str, Series]:
    """Drive the entrants round by round and end their processes, whatever happens.

    Each round begins with another entrant, so that none always follows the same one.

    Args:
        entrants: At least one; names differ.
        rounds: Rounds to measure.
        deadline: On `time.monotonic`'s clock; when it passes, what complete rounds gave is returned.
        tell: Gets a line of progress.
        enough: Gets what there is after each complete round; true ends the measurement.

    Returns:
        dict: The series of each entrant by name, all of the same length, in the order given.

    Raises:
        RunError: An entrant failed; the end of its output is in the message.
    """
    series = {entrant.name: Series() for entrant in entrants}
    with _processes(entrants) as processes, suppress(_OutOfTimeError):
        for process in processes:
            process.answer(deadline)
        for process in processes:
            tell(f"warming up: {process.entrant.name}")
            for _ in range(process.entrant.warmup):
                process.work(deadline)
        for done in range(rounds):
            tell(f"round {done + 1} of {rounds}")
            first = done % len(processes)
            replies = {process.entrant.name: process.work(deadline) for process in processes[first:] + processes[:first]}
            for name, reply in replies.items():
                series[name].seconds.append(reply["seconds"])
                series[name].cpu_seconds.append(reply["cpu_seconds"])
                series[name].notes.append(reply["notes"])
                series[name].peak_rss = reply["peak_rss"]
            if enough(series):
                break
    return series


@contextmanager
def _processes(entrants: Sequence[Entrant]) -> Iterator[list["_Process"]]:
    processes: list[_Process] = []
    try:
        for entrant in entrants:
            processes.append(_Process(entrant))
        yield processes
    finally:
        for process in processes:
            process.kill()


class _Process:
    """An entrant's process as the caller sees it. Its standard input carries requests, a pipe of its own the answers."""

    def __init__(self, entrant: Entrant):
        self.entrant = entrant
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        answers, write_end = os.pipe()
        command = [sys.executable, "-m", __name__, entrant.target, json.dumps(dict(entrant.arguments)), str(write_end)]
        self.popen = subprocess.Popen(
            command,
            env={**os.environ, **QUIET, **entrant.environment},
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[write_end],
            start_new_session=True,  # Ctrl-C reaches the caller alone, which ends all
        )
        os.close(write_end)
        self.answers = os.fdopen(answers, "rb")

    def work(self, deadline: float) -> dict[str, Any]:
        """One unit of work."""
        with suppress(BrokenPipeError):  # a death is reported by `answer`
            self.popen.stdin.write(b"\n")
            self.popen.stdin.flush()
        return self.answer(deadline)

    def answer(self, deadline: float) -> dict[str, Any]:
        """The next answer."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise _OutOfTimeError
        line = self.answers.readline()
        if not line:
            raise RunError(f"the process of '{self.entrant.name}' ended with exit code {self.popen.wait()}:\n{self._tail()}")
        return json.loads(line)

    def _tail(self) -> str:
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])

    def kill(self) -> None:
        """End the process and all that it started (it leads a group of its own)."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        with suppress(BrokenPipeError):
            self.popen.stdin.close()
        self.answers.close()
        self.log.close()


# ---- the entrant's side


def _serve(target: str, arguments: str, descriptor: str) -> None:
    """Make the work, then do it once per line of standard input, until the caller closes it or dies."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    module, function = target.split(":")
    work: Work = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    with os.fdopen(int(descriptor), "w") as answers:
        _answer(answers)
        while True:
            requests.get()
            start, cpu_start = time.perf_counter(), time.process_time()
            notes = dict(work())
            cpu_seconds, seconds = time.process_time() - cpu_start, time.perf_counter() - start
            _answer(answers, seconds=seconds, cpu_seconds=cpu_seconds, peak_rss=_peak_rss(), notes=notes)


def _answer(stream: IO[str], **values: Any) -> None:
    stream.write(json.dumps(values) + "\n")
    stream.flush()


def _listen(requests: "queue.SimpleQueue[bytes]") -> None:
    """Thread: pass requests on; when the caller is gone, however it ended, end this process and what it started."""
    with open(0, "rb", buffering=0) as stream:
        while line := stream.readline():
            requests.put(line)
    os.killpg(0, signal.SIGKILL)


def _peak_rss() -> int:
    """Bytes. Not `getrusage`: its peak counts what the process was before it became this program."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
