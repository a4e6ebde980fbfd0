"""Start local ranks, run a function in all of them with a time limit, and leave no process behind.

Ranks are forked from a server that has torch loaded, so that a start costs a fraction of a second. They meet in a file, new for each call:
no port to choose, and no name service (a TCPStore looks 127.0.0.1 up for every connection, and a slow server then costs seconds).
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from megagate.parallel.rank import HELD_BACK, RankContext, Reply, Task, end_with_parent, serve, set_environ

_OUTPUT_LINES = 20  # of a failed rank's output, shown with its error
_GRACE_S = 0.2  # between the first failure that is seen and the report: the cause may arrive after its consequences
_DUMP_S = 1.0  # for a hanging rank to write where it stands
_KILL_S = 10.0  # for the kernel to end a killed process


class RankError(RuntimeError):
    """A rank raised or died. The message carries its traceback; its own exception, where it can be pickled, is `__cause__`.

    Args:
        message: What is shown.
        ranks: The ranks that failed, the likely cause first.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class RankTimeoutError(RankError):
    """Some ranks (`ranks`) had not finished in time. The message says where they stood."""


def start_server(*, preload: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
    """Start the process that ranks are forked from; where it runs already, nothing happens.

    Returns at once: the server loads its modules while the caller goes on. It ends with the caller and not by a signal to its group: by it
    alone the caller knows how a process ended. What is forked from it calls `rank.leave_group` first.

    Args:
        preload: Modules to load beside torch. Only what is safe to fork (no threads, no CUDA context).
        environment: Set for the server alone, for modules that read the environment when they are loaded.
    """
    multiprocessing.set_forkserver_preload(["torch", *preload])
    multiprocessing.resource_tracker.ensure_running()  # else the server's start does it, and takes signals again behind it
    # One OpenMP thread must be asked for before torch and numpy are loaded: a pool of threads would not survive the fork.
    with _environ({"OMP_NUM_THREADS": "1", **(environment or {})}), _held_back(HELD_BACK):
        multiprocessing.forkserver.ensure_running()


@contextmanager
def _held_back(signals: Sequence[int]) -> Iterator[None]:
    """What is started in the block gets none of these; this process gets them behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
    """Run `function(RankContext, *args)` in `world_size` new processes, inside a gloo process group.

    Args:
        function: Importable by name.
        world_size: Number of ranks.
        args: Passed on; pickled.
        timeout: Seconds for everything, the start of the processes included.

    Returns:
        list[Any]: What the ranks returned, in rank order; pickled (tensors are fine).

    Raises:
        RankError: A rank raised or died. The others were killed.
        RankTimeoutError: Not all ranks finished in time. All were killed.
    """
    with RankPool() as pool:
        return pool.run(function, world_size, *args, timeout=timeout)


class RankPool:
    """Ranks that stay alive between calls, so that imports are paid once. A context manager.

    Processes are started when a call first needs them; a call of world size n uses the first n. Every call has a fresh default process
    group and the caller's present environment, working folder and import path. A failure kills all ranks; the next call starts new ones.

    Args:
        environment: Variables for the ranks, over the caller's.
        before: Called in each rank before the process group of a call is made. Importable by name.
        after: Called in each rank when all have finished, before the process group of a call is destroyed. Importable by name.
    """

    def __init__(
        self,
        *,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._environment = dict(environment or {})
        self._before, self._after = before, after
        self._ranks: list[_Rank] = []
        self._calls = 0
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the living ranks, in rank order."""
        return [rank.process.pid for rank in self._ranks if rank.process.pid is not None]

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
        """As `run_ranks`, in this pool's processes."""
        deadline = time.monotonic() + timeout
        name = f"{function.__module__}.{function.__qualname__}"
        call = pickle.dumps((self._before, function, args, self._after))
        try:
            self._start(world_size)
            self._calls += 1
            ranks = self._ranks[:world_size]
            for index, rank in enumerate(ranks):
                rank.send(self._task(RankContext(index, world_size), call, timeout))
            results = _collect(ranks, name, deadline, timeout)
            # Only now may a rank leave the group: its peers may still be reading what it sent.
            for rank in ranks:
                rank.send(None)
            _collect(ranks, f"the end of {name}", deadline, timeout)
            return [pickle.loads(result) for result in results]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill all ranks and what they started. The pool may be used again."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.join()
        self._ranks.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def _start(self, world_size: int) -> None:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="megagate-ranks-")
        start_server()
        while len(self._ranks) < world_size:
            self._ranks.append(_Rank.start(len(self._ranks), Path(self._files.name)))

    def _task(self, context: RankContext, call: bytes, timeout: float) -> Task:
        launch = {
            "RANK": str(context.rank),
            "LOCAL_RANK": str(context.rank),
            "WORLD_SIZE": str(context.world_size),
            "LOCAL_WORLD_SIZE": str(context.world_size),
            "OMP_NUM_THREADS": "1",
        }
        if sys.platform == "linux":  # else gloo looks the host name up, which need not resolve
            launch["GLOO_SOCKET_IFNAME"] = "lo"
        return Task(
            context=context,
            call=call,
            rendezvous=str(Path(self._files.name) / f"call{self._calls}"),
            environment={**os.environ, **launch, **self._environment},
            folder=os.getcwd(),
            path=list(sys.path),
            timeout=timeout,
        )


# ---- the caller's side


@dataclass(frozen=True)
class _Rank:
    """The caller's end of one rank."""

    index: int
    process: multiprocessing.process.BaseProcess
    connection: Connection
    output: Path
    stacks: Path

    @classmethod
    def start(cls, index: int, files: Path) -> "_Rank":
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        output, stacks = files / f"rank{index}.output", files / f"rank{index}.stacks"
        process = context.Process(target=serve, args=(theirs, output, stacks), name=f"rank{index}", daemon=True)
        process.start()
        theirs.close()  # so that our end reads end-of-file when the rank dies
        return cls(index, process, ours, output, stacks)

    def send(self, message: Task | None) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # a dead rank is reported by `receive`
            self.connection.send_bytes(pickle.dumps(message))

    def receive(self) -> Reply:
        """The next reply; a death is an `error` too."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(_KILL_S)
            return Reply("error", text=f"the process {_exit_text(self.process.exitcode)}\n{self.stack()}", moment=0.0)

    def kill(self) -> None:
        """Kill the rank and all processes it started (a rank leads its own process group)."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may not lead a group yet

    def join(self) -> None:
        self.process.join(_KILL_S)
        self.connection.close()

    def ask_stack(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGQUIT)

    def stack(self) -> str:
        """What faulthandler wrote, without the thread that watches for the caller's death."""
        blocks = self.stacks.read_text(errors="replace").split("\n\n") if self.stacks.exists() else []
        return "\n\n".join(block.strip() for block in blocks if end_with_parent.__name__ not in block)

    def tail(self) -> str:
        """The end of the rank's output in this call."""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        return "\n".join(["its last output:", *lines[-_OUTPUT_LINES:]]) if lines else ""


def _collect(ranks: Sequence[_Rank], name: str, deadline: float, timeout: float) -> list[bytes]:
    """One reply of each rank, or the error that tells why not."""
    replies: dict[int, Reply] = {}
    while len(replies) < len(ranks):
        waiting = [rank for rank in ranks if rank.index not in replies]
        replies.update(_receive(waiting, deadline - time.monotonic()) or _timed_out(waiting, len(ranks), name, timeout))
        if any(reply.kind == "error" for reply in replies.values()):
            time.sleep(_GRACE_S)
            replies.update(_receive([rank for rank in ranks if rank.index not in replies], 0.0))
            failures = {index: reply for index, reply in replies.items() if reply.kind == "error"}
            raise _failed(ranks, failures, name)
    return [replies[rank.index].payload for rank in ranks]


def _receive(ranks: Sequence[_Rank], seconds: float) -> dict[int, Reply]:
    """The replies that are there, by rank; waits for the first."""
    ready = multiprocessing.connection.wait([rank.connection for rank in ranks], timeout=max(0.0, seconds))
    return {rank.index: rank.receive() for rank in ranks if rank.connection in ready}


def _failed(ranks: Sequence[_Rank], failures: Mapping[int, Reply], name: str) -> RankError:
    """The error for failed ranks: the first in full, the others, most often its consequences, by their last lines."""
    order = sorted(failures, key=lambda index: failures[index].moment)  # deaths, then exceptions by their time
    first = order[0]
    parts = [f"rank {first} of {len(ranks)} failed in {name}", failures[first].text.strip(), ranks[first].tail()]
    parts += [f"rank {index} failed too: {failures[index].text.strip().splitlines()[-1]}" for index in order[1:]]
    error = RankError("\n\n".join(part for part in parts if part), order)
    with suppress(Exception):  # an exception whose class cannot be rebuilt here; its traceback is in the text
        error.__cause__ = pickle.loads(failures[first].payload)
    return error


def _timed_out(waiting: Sequence[_Rank], world_size: int, name: str, timeout: float) -> dict[int, Reply]:
    """Raise the error for ranks that have not finished, with the place where each stands."""
    for rank in waiting:
        rank.ask_stack()
    give_up = time.monotonic() + _DUMP_S
    while time.monotonic() < give_up and not all(rank.stack() for rank in waiting):
        time.sleep(_DUMP_S / 20)
    time.sleep(_DUMP_S / 20)  # a dump is written line by line
    indices = [rank.index for rank in waiting]
    listed = ", ".join(map(str, indices))
    parts = [f"{name} did not finish in {timeout:g} s; of {world_size} ranks these were still running: {listed}"]
    parts += [f"rank {rank.index} stood at:\n{rank.stack() or '(it did not answer)'}\n{rank.tail()}".strip() for rank in waiting]
    raise RankTimeoutError("\n\n".join(parts), indices)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


@contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for a moment."""
    saved = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        set_environ(saved)
