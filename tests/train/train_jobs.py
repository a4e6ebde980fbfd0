"""Starts the pretraining job for tests: by the public command, or, a hundred times, forked from the warm server of the ranks.

A forked job runs `megagate.train.main.main` in processes of its own, as the launcher would start them, without the seconds of imports: it
has real exit codes and can be killed or sent signals. Whatever is started is killed with all that it started in turn.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import ranks

import megagate.engine.zero  # noqa: F401  so that the server of the ranks loads DeepSpeed's parts before the first job
from megagate.parallel.rank import leave_group

ROOT = Path(__file__).parents[2]
NANO = ROOT / "examples" / "configs" / "nano.yaml"
SCRIPT = ROOT / "examples" / "pretrain_moe.sh"
DEEPSPEED = Path(sysconfig.get_path("scripts")) / "deepspeed"
LIMIT_S = 240.0  # on a machine that is busy, as it is with the tests themselves
MEASURED = {
    *("step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "peak_memory_bytes"),
    *("checkpoint_stall_seconds", "observe_seconds"),
}
"""Keys of a record that differ between two runs of the same numbers."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
}
LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
Record = dict[str, Any]


class Jobs:
    """Starts jobs in `folder` and, at `close`, ends whatever is left of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._started: list[Job] = []

    def fork(self, *argv: object, world: int = 1, config: Path | None = NANO, folders: Sequence[Path] = ()) -> "Job":
        """Start `main(argv)` on so many ranks; `config` comes before `argv`.

        With `folders` each rank is a machine of its own and stands in its own folder, where relative paths lead to other disks.
        """
        words = [*(["--config", str(config)] if config else []), *map(str, argv)]
        output, port = self._output(), free_port()
        places = folders or [self.folder] * world
        start = {"machines": bool(folders), "port": port, "output": output}
        job = Job(output, forked=[_fork(words, rank, world, folder=place, **start) for rank, place in enumerate(places)])
        self._started.append(job)
        return job

    def run(self, *argv: object, world: int = 1, expect: int = 0, **how: Any) -> "Job":
        """As `fork`, but wait; all ranks must leave with the code `expect`."""
        job = self.fork(*argv, world=world, **how)
        assert job.wait() == [expect] * world, job.text
        return job

    def command(self, words: Sequence[object], **environment: str) -> "Job":
        """Start a command line in a session of its own."""
        output = self._output()
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_SETS}
        env["PATH"] = f"{DEEPSPEED.parent}:{env['PATH']}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=self.folder,
                env=env | ENVIRONMENT | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job = Job(output, process=process)
        self._started.append(job)
        return job

    def deepspeed(self, options: Sequence[object], argv: Sequence[object], *, config: Path = NANO) -> "Job":
        """Start `deepspeed OPTIONS examples/pretrain_moe.sh --config NANO ARGV`."""
        return self.command([DEEPSPEED, "--master_port", free_port(), *options, SCRIPT, "--config", config, *argv])

    def close(self) -> None:
        """Kill what still runs."""
        for job in self._started:
            job.kill()

    def _output(self) -> Path:
        return self.folder / f"output-{len(self._started)}.txt"


@dataclass(frozen=True)
class Job:
    """A started job.

    Args:
        output: Takes what all its processes write.
        forked: Its ranks; empty where it is a command.
        process: The command.
    """

    output: Path
    forked: Sequence[BaseProcess] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def text(self) -> str:
        """What it wrote up to now."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = LIMIT_S) -> list[int]:
        """The exit codes of its ranks, or the command's alone; a job that takes longer is an error."""
        deadline = time.monotonic() + seconds
        if self.process is not None:
            try:
                return [self.process.wait(seconds)]
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None
        for process in self.forked:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.forked]
        assert None not in codes, f"still running after {seconds} s: {codes}\n{self.text}"
        return [code for code in codes if code is not None]

    def until(self, condition: Callable[[], object], seconds: float = LIMIT_S) -> None:
        """Wait for a condition that must come true while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running() and time.monotonic() < deadline, f"it did not come:\n{self.text}"
            time.sleep(0.005)

    def running(self) -> bool:
        """Whether any of it is alive."""
        return self.process.poll() is None if self.process is not None else any(process.is_alive() for process in self.forked)

    def send(self, number: int) -> None:
        """Send a signal to every forked rank."""
        for process in self.forked:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def find(self, word: str) -> list[psutil.Process]:
        """The command's processes with `word` in their command line; they may have lost their parent."""
        assert self.process is not None
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and any(word in part for part in process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """End it and all it started."""
        if self.process is not None:
            for process in self.find(""):
                with suppress(psutil.Error):
                    process.kill()
            self.process.wait(10)
        for process in self.forked:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(10)


def _fork(argv: list[str], rank: int, world_size: int, *, port: int, folder: Path, output: Path, machines: bool) -> BaseProcess:
    ranks.start()
    local_rank, local_size = (0, 1) if machines else (rank, world_size)
    environment = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(local_size)}
    if world_size > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = get_context("forkserver").Process(target=_rank, args=(argv, ENVIRONMENT | environment, folder, output), daemon=True)
    process.start()
    return process


def _rank(argv: list[str], environment: dict[str, str], folder: Path, output: Path) -> None:
    """In the forked process: one rank of a job."""
    leave_group()
    os.chdir(folder)
    for name in LAUNCHER_SETS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))

    from tqdm.std import TqdmDefaultWriteLock

    from megagate.train.main import main

    TqdmDefaultWriteLock.mp_lock = None  # a semaphore of a killed process would be called leaked, at the end of all tests
    sys.exit(main(argv))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def metrics(run: Path) -> list[Record]:
    """The records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_recorded(run: Path) -> int:
    """Whole lines in a run's metrics up to now."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def numbers(records: Sequence[Record]) -> list[Record]:
    """Records without what was measured by a clock."""
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file under a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
