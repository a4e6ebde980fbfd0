"""Several processes that make units: who they are, what they say, and what is said of one that fails."""

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megagate.data.files import clean_errors, make_folder
from megagate.data.preprocess.backends import Backend, make_encoder
from megagate.data.preprocess.plan import Plan
from megagate.data.preprocess.units import UNITS_FOLDER, OnError, Progress, UnitRecord, write_unit
from megagate.data.tokenizer import load_tokenizer
from megagate.errors import DataError

_TRIM_THRESHOLD = -1  # glibc's name of it, M_TRIM_THRESHOLD
_GRACE = 20.0  # seconds in which workers remove what they have not finished


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; the plan's tokenizer lies in `folder`."""

    plan: Plan
    folder: Path
    backend: Backend
    on_error: OnError


def run_units(job: Job, units: Sequence[int], *, workers: int, report: Callable[[Progress], None]) -> list[UnitRecord]:
    """Makes units with several processes, and returns their records in the order of `units`.

    Args:
        job: The plan and how to do it.
        units: Indices of units.
        workers: Processes; at least 1.
        report: Called in this process as work is done.

    Raises:
        DataError: The first error of a worker, or one was killed; what is finished stays, and the next run goes on from there.
    """
    if workers < 1:
        raise DataError(f"--workers is {workers}; it must be at least 1")
    if not units:
        return []
    with clean_errors("write", job.folder):
        make_folder(job.folder / UNITS_FOLDER)
    context = multiprocessing.get_context("spawn")  # a fork would share the ends of pipes, and none would notice that this process died
    waiting = list(reversed(units))
    done: dict[int, UnitRecord] = {}
    team: dict[Connection, _Member] = {}
    try:
        for _ in range(min(workers, len(units))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, theirs), daemon=True)
            with _interrupts_held():
                process.start()
            theirs.close()
            team[ours] = _Member(process, waiting.pop())
            team[ours].begin(ours)
        while len(done) < len(units):
            for end in wait(list(team)):
                assert isinstance(end, Connection)
                answer = _receive(end, team[end])
                if isinstance(answer, Progress):
                    report(answer)
                    continue
                done[team[end].unit] = answer
                if waiting:
                    team[end].unit = waiting.pop()
                    team[end].begin(end)
                else:
                    _leave(end, team.pop(end))
    finally:
        for end in team:
            end.close()  # which stops the workers after their batch
        for end in list(team):
            _leave(end, team.pop(end))
    return [done[unit] for unit in units]


class _Member:
    """A worker and the unit it makes."""

    def __init__(self, process: BaseProcess, unit: int) -> None:
        self.process, self.unit = process, unit

    def begin(self, end: Connection) -> None:
        """Sends the unit; what is read from the pipe next says so if the worker is dead."""
        with suppress(OSError):
            end.send(self.unit)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started here never see Ctrl-C, not even while they still import: this process tells them by closing their pipe."""
    resource_tracker.ensure_running()  # else the first start does so, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(end: Connection, member: _Member) -> Progress | UnitRecord:
    try:
        answer = end.recv()
    except (EOFError, OSError) as error:
        member.process.join(_GRACE)
        code = member.process.exitcode
        cause = "that is often a lack of memory: then lower --workers" if code == -signal.SIGKILL else "its own message may stand above"
        raise DataError(
            f"the worker at unit {member.unit} died (exit code {code}); {cause}; finished units are kept, run again to go on"
        ) from error
    if isinstance(answer, BaseException):
        raise answer
    assert isinstance(answer, Progress | UnitRecord)
    return answer


def _leave(end: Connection, member: _Member) -> None:
    end.close()
    member.process.join(_GRACE)
    if member.process.is_alive():
        member.process.kill()
        member.process.join()


def _work(job: Job, end: Connection) -> None:
    """A worker's life: takes units until the other end closes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each worker; the package reads it here only
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    with suppress(OSError, AttributeError):  # only glibc has it, and only glibc keeps 60 MB of what batches freed
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 1 << 20)

    talk = _Talk(end)
    unit = None
    # An unfinished unit is discarded once nobody listens, after its batch at most.
    with suppress(_AloneError):
        try:
            tokenizer = load_tokenizer(job.folder, job.plan.settings.tokenizer)
            assert tokenizer is not None, "a plan always has a tokenizer"
            encoder = make_encoder(tokenizer, job.backend)
            while True:
                unit = talk.receive()
                talk.send(write_unit(job.plan, unit, folder=job.folder, encoder=encoder, on_error=job.on_error, report=talk.send))
        except _AloneError:
            raise
        except DataError as error:
            talk.send(error)
        except Exception as error:  # of this program or a package: whatever it is, the parent must hear of it
            what = f"the worker at unit {unit} failed ({type(error).__name__}: {error})"
            talk.send(DataError(f"{what}; report it with what follows; finished units are kept\n{traceback.format_exc()}"))


class _AloneError(Exception):
    """The other end of the pipe is closed, or its process dead."""


class _Talk:
    """A worker's end of its pipe. Only its failures mean that the parent is gone: inputs raise `OSError` and `EOFError` too."""

    def __init__(self, end: Connection) -> None:
        self._end = end

    def receive(self) -> int:
        try:
            unit = self._end.recv()
        except (EOFError, OSError) as error:
            raise _AloneError from error
        assert isinstance(unit, int)
        return unit

    def send(self, value: Progress | UnitRecord | DataError) -> None:
        try:
            self._end.send(value)
        except OSError as error:
            raise _AloneError from error
