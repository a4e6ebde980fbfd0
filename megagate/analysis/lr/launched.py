"""One run of a study by a command that starts its ranks: a launcher's on the machines of a host file, srun's in a job of Slurm.

The command is known by its exit code and by what its ranks write into the run's folder. SIGTERM makes it save and leave: who writes such a
command sees to it that the ranks get the signal.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.study import Study
from megagate.config.run import RunConfig
from megagate.errors import ConfigError, NotFiniteError, RunError

_LOOK_S = 2.0  # between two looks at the records, at least; those of 100,000 steps are 150 MB,
_LOOKS_SHARE = 50  # so the pause is this many times as long as the last look took
_STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)


def run_launched(
    study: Study,
    key: RunKey,
    config: RunConfig,
    command: Sequence[str],
    *,
    tell: Callable[[str], None] = lambda text: None,
    grace_s: float = 600.0,
) -> bool:
    """Do a run that is not over yet; one that was begun goes on from its checkpoint.

    It writes into the run's folder, its config and its log alone, so that several do so at the same time, each its own run; study.json is
    written by who looks at the study. Stopped by an exception (`stoppable` makes one of SIGTERM), it hands SIGTERM on to the command and
    waits for it before the exception goes on.

    Args:
        study: Claimed by the caller.
        key: The run.
        config: Its config.
        command: Gets `--config FILE` behind its own words. It starts in the caller's directory and environment, leads a session of its own,
            so that Ctrl-C reaches the caller alone, and says what it says into the run's log.
        tell: Gets a line where the run is over.
        grace_s: For a command that was told to stop, to save; then it is killed, and a stop loses the steps since the last checkpoint.

    Returns:
        bool: Whether the run is over. If not, its ranks were stopped by a signal of somebody else, and the next call goes on.

    Raises:
        ConfigError: There is no such command.
        RunError: The command failed, with the end of the log; or the run was begun and cannot go on.
    """
    if study.outcome(key) is not None:
        return True
    if study.settle_if_over(key, config, tell=tell):  # over, but the caller was killed before it said so
        return True
    if gap := study.gap(key):
        raise RunError(gap)
    words = [*command, "--config", str(study.write_config(key, config))]
    code = None
    try:
        with _started(words, study.log(key), grace_s=grace_s) as process:
            code = _wait(process, lambda: study.has_diverged(key, config))
    finally:  # also where it was over at the moment of a stop
        over = study.settle_if_over(key, config, tell=tell, not_finite=code == NotFiniteError.exit_code)
    if not over and code not in _STOPPED:
        raise RunError(f"the run {key} ended with exit code {code}; the end of {study.log(key)}:\n{study.log_tail(key)}")
    return over


@contextmanager
def _started(words: Sequence[str], log: Path, *, grace_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """The command for the time of the block, behind which it has ended: where it goes on, it is told to stop, and killed in the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # A signal between its start and the block would leave it behind with nobody to stop it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        with log.open("ab") as stream:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, before),
            )
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise ConfigError(f"{words[0]}: cannot be started ({error.strerror}); name a command that starts ranks") from None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it left
        process.wait()


def _wait(process: subprocess.Popen[bytes], diverged: Callable[[], bool]) -> int | None:
    """The exit code of the command; None where its run has diverged meanwhile, so that nothing of it is needed any more."""
    pause_s = _LOOK_S
    while True:
        try:
            return process.wait(pause_s)
        except subprocess.TimeoutExpired:
            began = time.monotonic()
            if diverged():
                return None
            pause_s = max(_LOOK_S, _LOOKS_SHARE * (time.monotonic() - began))
