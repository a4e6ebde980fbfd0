"""A rank of `spawn`, on its own side: it takes one call after the other, and has for each the state of a new process."""

import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from megagate.parallel.init import LaunchEnv, init_process_group

_SEED = 1234
HELD_BACK = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""By the server: what terminals and `timeout` send to a whole process group is the caller's to hand on."""


@dataclass(frozen=True)
class RankContext:
    """What a function that runs in all ranks is told about its own."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class Task:
    """One call, as sent to one rank."""

    context: RankContext
    call: bytes  # pickled (before, function, args, after): a failing import is reported like any error
    rendezvous: str  # the file of this call
    environment: dict[str, str]
    folder: str
    path: list[str]
    timeout: float


@dataclass(frozen=True)
class Reply:
    """A rank's answer: `result`, then, once released, `idle`; or `error`, and nothing more."""

    kind: str
    payload: bytes = b""  # pickled result, or the pickled exception where that is possible
    text: str = ""  # traceback
    moment: float = field(default_factory=time.monotonic)


def leave_group() -> None:
    """First thing in a process forked from the server: a session of its own, and signals again, which the server holds back."""
    with suppress(PermissionError):  # already a leader
        os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


def serve(connection: Connection, output: Path, stacks: Path) -> None:
    """The life of a rank: one task after the other, until the caller closes the connection or dies."""
    leave_group()
    threading.Thread(target=end_with_parent, args=(output.parent,), daemon=True).start()
    _redirect_output(output)
    dumps = stacks.open("w")
    faulthandler.enable(dumps)
    faulthandler.register(signal.SIGQUIT, dumps)
    torch.set_num_threads(1)
    gc.freeze()  # what is loaded stays: the collection after each call need not visit it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        os.truncate(output, 0)
        try:
            _run(task, connection)
        except BaseException as error:  # SystemExit too: the caller must hear of it; then it kills this process
            connection.send_bytes(pickle.dumps(_error_reply(error)))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run(task: Task, connection: Connection) -> None:
    """One call in this rank: the state a new process would have, the process group, the function, and everything undone."""
    set_environ(task.environment)
    os.chdir(task.folder)
    sys.path[:] = task.path
    before, function, args, after = pickle.loads(task.call)
    random.seed(_SEED)
    torch.manual_seed(_SEED)
    dtype = torch.get_default_dtype()
    if before is not None:
        before()
    # Later than the caller's own limit: its report says more than a collective's time-out would.
    limit = timedelta(seconds=task.timeout + 60)
    init_process_group(LaunchEnv.read(), device=torch.device("cpu"), init_method=f"file://{task.rendezvous}", timeout=limit)
    result = pickle.dumps(function(task.context, *args))
    connection.send_bytes(pickle.dumps(Reply("result", result)))
    connection.recv_bytes()
    torch.set_default_dtype(dtype)
    del args, result
    if after is not None:
        after()
    gc.collect()  # what holds groups in a cycle would keep their threads and sockets
    gc.freeze()
    if dist.is_initialized():
        dist.destroy_process_group()
    connection.send_bytes(pickle.dumps(Reply("idle")))


def _error_reply(error: BaseException) -> Reply:
    text = "".join(traceback.format_exception(error))
    try:
        return Reply("error", pickle.dumps(error), text)
    except Exception:  # anything may be inside an exception
        return Reply("error", b"", text)


def _redirect_output(path: Path) -> None:
    """Send everything this process prints, libraries in C included, to a file: ranks would write over each other."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)


def end_with_parent(files: Path) -> None:
    """Thread: when the caller's process is gone, however it ended, remove the pool's files, and end this rank and what it started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        shutil.rmtree(files, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def set_environ(values: Mapping[str, str]) -> None:
    """Make these the environment of this process, and nothing else."""
    for key in set(os.environ) - set(values):
        del os.environ[key]
    os.environ.update(values)
