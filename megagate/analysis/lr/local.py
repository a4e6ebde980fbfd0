"""Runs of a study on this machine: the pretraining job in processes forked from one that has torch and DeepSpeed loaded, a few at a time.

A fork costs a fraction of a second where a launcher costs seconds. The job is called through its entry module by name, in the forked
process, exactly as a launcher's rank calls it: this floor knows the job as a program (its arguments, exit codes and files), not as code.
"""

import fcntl
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.study import Study
from megagate.analysis.processes import LAUNCHER_VARIABLES, running_processes
from megagate.config.run import RunConfig
from megagate.errors import NotFiniteError, RunError

_JOB = "megagate.train.main"
_PRELOAD = ("deepspeed", "torch._dynamo", "megagate.train.job", _JOB)
_POLL_S = 0.2
_LOOK_S = 2.0  # between two looks at the records of a run
_ATTEMPTS = 3  # of a run whose process is killed
_FAILURES = 3  # runs that fail by themselves until no further one is begun: what stops all of them is not the run's


def run_local(
    study: Study,
    configs: Mapping[RunKey, RunConfig],
    *,
    jobs: int,
    threads: int,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Do the runs that are not over yet; one that was begun goes on from its checkpoint. Stopped by an exception, it saves what runs.

    Args:
        study: Claimed and locked by the caller.
        configs: Of the runs, in the order in which to begin them.
        jobs: Runs at a time.
        threads: Of each.
        tell: Gets a line for each run that is over, and for each that was killed.

    Raises:
        RunError: Some runs failed; all others were done, up to the third failure.
    """
    waiting, attempts, failures = [key for key in configs if study.outcome(key) is None], dict.fromkeys(configs, 0), []
    for key in [key for key in waiting if _settled(study, key, configs[key], tell)]:  # over, but the caller was killed before it said so
        waiting.remove(key)
    torn = {key: gap for key in waiting if (gap := study.gap(key))}  # theirs alone, so they do not count as failures
    waiting = [key for key in waiting if key not in torn]
    if waiting:
        _start_server()
    with running_processes() as running:
        while running or (waiting and len(failures) < _FAILURES):
            while waiting and len(running) < jobs and len(failures) < _FAILURES:
                key = waiting.pop(0)
                attempts[key] += 1
                running[key] = _Run(study, key, configs[key], threads=threads)
            multiprocessing.connection.wait([run.process.sentinel for run in running.values()], timeout=_POLL_S)
            for key, run in list(running.items()):
                code = run.code()
                if code is None:
                    if run.is_due() and study.has_diverged(key, configs[key]):
                        run.end(time.monotonic())  # nothing of it is needed any more
                        del running[key]
                        _settled(study, key, configs[key], tell)
                    continue
                del running[key]
                if _settled(study, key, configs[key], tell, not_finite=code == NotFiniteError.exit_code):
                    continue
                if _was_killed(code) and attempts[key] < _ATTEMPTS:
                    tell(f"{key}: its process was killed at step {len(study.records(key))}; it goes on from its checkpoint")
                    waiting.insert(0, key)
                else:
                    failures.append(f"the run {key} ended with exit code {code}; the end of {study.log(key)}:\n{study.log_tail(key)}")
    if torn or failures:
        raise RunError("\n".join([*torn.values(), *failures]))


def _settled(study: Study, key: RunKey, config: RunConfig, tell: Callable[[str], None], *, not_finite: bool = False) -> bool:
    over = study.settle_if_over(key, config, tell=tell, not_finite=not_finite)
    if over:
        study.write_record()
    return over


def _was_killed(code: int) -> bool:
    return code < 0 or code in (255, 128 + signal.SIGTERM)  # 255: the server is gone, and could not tell


def _start_server() -> None:
    from megagate.parallel.spawn import start_server  # noqa: PLC0415 - torch

    start_server(preload=_PRELOAD, environment={"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})


class _Run:
    """One run's process, which leads a process group: Ctrl-C reaches the caller alone, which stops all."""

    def __init__(self, study: Study, key: RunKey, config: RunConfig, *, threads: int):
        settings = study.write_config(key, config)
        self._looked = time.monotonic()
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_work, args=(str(settings), str(study.log(key)), threads), name=str(key))
        self.process.start()

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        code = self.process.exitcode
        if code is not None:
            self.tell(signal.SIGKILL)  # whatever it left, and the run itself where only the server is gone
        return code

    def is_due(self) -> bool:
        """Whether its records were not looked at for a while."""
        if time.monotonic() < self._looked + _LOOK_S:
            return False
        self._looked = time.monotonic()
        return True

    def tell(self, number: int) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def end(self, limit: float) -> None:
        """Wait until then, and kill."""
        self.process.join(max(0.0, limit - time.monotonic()))
        self.tell(signal.SIGKILL)
        self.process.kill()  # it may not lead a group yet
        self.process.join()


# ---- the run's side


def _work(settings: str, log: str, threads: int) -> None:
    """The job in a forked process, as a world of one."""
    from megagate.parallel.rank import leave_group  # noqa: PLC0415 - torch, loaded by the server

    leave_group()
    threading.Thread(target=_stop_with_caller, daemon=True).start()
    _redirect_output(Path(log))
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    # The caller's choice and not the server's, which has one.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import torch  # noqa: PLC0415

    torch.set_num_threads(threads)
    sys.exit(importlib.import_module(_JOB).main(["--config", settings]))


def _stop_with_caller() -> None:
    """Thread: when the caller is gone, however it ended, the run stops, and saves."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _redirect_output(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # One process a run: that of a caller that was killed may still be saving, and is waited for. As long as the log is open, so to its end.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
