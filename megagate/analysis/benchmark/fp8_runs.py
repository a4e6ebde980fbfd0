"""The runs of `tools/benchmark.py fp8`: the pretraining job in processes of its own, a few at a time, stopped with what they have saved."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megagate.analysis.benchmark.fp8 import Key, Numbers, Record, keys, numbers_of, run_config, run_folder
from megagate.analysis.benchmark.interleave import QUIET
from megagate.analysis.processes import LAUNCHER_VARIABLES, running_processes
from megagate.config.cli import to_yaml
from megagate.config.rules import check
from megagate.config.run import RunConfig
from megagate.data.sources import open_sources, prepare_sources
from megagate.errors import DataError, RunError

_POLL_S = 0.2
_LOG_LINES = 15  # of a failed run's log, shown with the error


def study(
    record: Record,
    base: RunConfig,
    *,
    rows: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    valid_tokens: int,
    jobs: int,
    threads: int,
    save: Callable[[Record], None] = lambda record: None,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Do the runs that the record does not have; a run that was begun in `folder` goes on from its checkpoint.

    Args:
        record: Grows in place.
        base: The config under study.
        rows: Of `fp8.ROWS`.
        seeds: Of each row.
        folder: Has the data and the runs.
        valid_tokens: See `prepare`.
        jobs: Runs at a time.
        threads: Of each.
        save: Gets the record after each run.
        tell: Gets lines of progress.

    Raises:
        RunError: A run failed; the others were stopped, and saved.
    """
    steps = record.conditions["steps"]
    waiting = [key for key in keys(rows, seeds) if str(key) not in record.runs]
    configs = {key: run_config(base, key, steps=steps, valid_tokens=valid_tokens, folder=folder) for key in waiting}
    for config in configs.values():
        check(config, world_size=1)
    whole = len(waiting) + len(record.runs)
    with running_processes() as running:
        while waiting or running:
            while waiting and len(running) < jobs:
                key = waiting.pop(0)
                running[key] = _Run(key, configs[key], folder=folder, threads=threads)
            time.sleep(_POLL_S)
            for key in [key for key, run in running.items() if run.ended()]:
                record.runs[str(key)] = running.pop(key).numbers(steps)
                save(record)
            now = ", ".join(f"{key} at {run.step()} of {steps}" for key, run in running.items())
            tell(f"{len(record.runs)} of {whole} runs done; {now}")


class _Run:
    """One run's process. Its standard input is a pipe that nothing is written to: where its caller dies, it stops and saves."""

    def __init__(self, key: Key, config: RunConfig, *, folder: Path, threads: int):
        self.key, self.folder = key, run_folder(folder, key)
        settings, self.log = folder / f"{key}.yaml", folder / f"{key}.log"
        settings.write_text(to_yaml(config))
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", __name__, "--config", str(settings)],
                env={**environment, **QUIET, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the caller alone, which stops all
            )

    def ended(self) -> bool:
        """Raises what its log says where it failed."""
        code = self.popen.poll()
        if code:
            raise RunError(f"the run {self.key} ended with exit code {code}; the end of {self.log}:\n{self._tail()}")
        return code == 0

    def numbers(self, steps: int) -> Numbers:
        """Of the finished run, whose checkpoints are removed."""
        found = numbers_of(self.folder / "metrics.jsonl", steps=steps)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return found

    def step(self) -> int:
        """How far it is."""
        try:
            return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError, KeyError):
            return 0

    def tell(self, number: int) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def end(self, limit: float) -> None:
        """Wait until then, and kill."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(max(0.0, limit - time.monotonic()))
        self.tell(signal.SIGKILL)
        self.popen.wait()
        self.popen.stdin.close()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def prepare(base: RunConfig, folder: Path) -> tuple[str, int]:
    """Prepare the data of all runs once; returns its fingerprint, and the tokens of the largest validation set.

    Raises:
        DataError: It cannot be opened, or has no validation set.
    """
    directory = folder / "data"
    prepare_sources(base.data.path, base.data.valid, vocab_size=base.model.vocab_size, directory=directory)
    sources = open_sources(base.data.path, base.data.valid, vocab_size=base.model.vocab_size, directory=directory)
    if not sources.valid:
        raise DataError(f"data.path ({base.data.path}) has no validation tokens, which a study of losses needs; give another data set")
    return sources.fingerprint, max(split.tokens for split in sources.valid.values())


# ---- the run's side


def _main(arguments: Sequence[str]) -> None:
    """The job, told to stop when its caller is gone."""
    threading.Thread(target=_listen, daemon=True).start()
    sys.argv = ["megagate", *arguments]
    runpy.run_module("megagate.train.main", run_name="__main__", alter_sys=True)


def _listen() -> None:
    with open(0, "rb", buffering=0) as stream:
        stream.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _main(sys.argv[1:])
