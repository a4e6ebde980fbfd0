"""What the commands in tools/ share. It imports next to nothing but Python's own modules: their `--help` is instant."""

import io
import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from megagate.errors import MegagateError


def positive(text: str) -> int:
    """A whole number from 1 on, as the `type` of an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"{text} must be a whole number from 1 on")
    return number


def above_zero(text: str) -> float:
    """A finite number above 0, as the `type` of an argument."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{text} must be a number above 0, and finite")
    return number


class Stopped(KeyboardInterrupt):
    """Asked to stop by a signal other than that of Ctrl-C, which it is treated like.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise `Stopped`, so that what was begun is cleared away; only the first does. Of the main thread.

    What is ignored stays so: nohup, and a second signal while the first one's clearing goes on.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(stop: KeyboardInterrupt) -> int:
    """As shells count: 128 and the signal's number."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def exit_code_of(
    run: Callable[[], int],
    *,
    failed: int | None = None,
    stopped: Callable[[KeyboardInterrupt], tuple[str, int]] = lambda stop: ("", exit_code(stop)),
) -> int:
    """Do the work of a command, in the main thread; what it raises is told on the standard error, and a reader that goes is no error.

    Args:
        run: Returns the exit code.
        failed: The exit code after an error of ours; by default the error's.
        stopped: What to say, where there is something to say, and the exit code, after Ctrl-C, SIGTERM or SIGHUP.

    Returns:
        int: The exit code.
    """
    with unread_stdout():
        try:
            with stoppable():
                return run()
        except MegagateError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            return error.exit_code if failed is None else failed
        except KeyboardInterrupt as stop:
            said, code = stopped(stop)
            if said:
                sys.stderr.write(f"{said}\n")
            return code


class NewFolder:
    """The folder that a command makes, whole or not at all; when it is stopped, it says which.

    Args:
        folder: It; noted is whether something is there already.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._in_use = folder, _holds_something(folder)

    def interrupted(self, stop: KeyboardInterrupt) -> tuple[str, int]:
        """What to say, and the exit code: 1 where the folder was made, else that of the signal."""
        word = f"stopped by {stop}" if isinstance(stop, Stopped) else "interrupted"
        if not self._in_use and _holds_something(self._folder):
            return f"{word}; {self._folder} stands, whole, and was not verified", 1
        return f"{word}; nothing was written", exit_code(stop)


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # not there, or none that this user may look into
        return False


@contextmanager
def unread_stdout() -> Iterator[None]:
    """In the block it is no error that nobody reads the standard output: what is said is lost, the work and its exit code are not."""
    if sys.stdout is None:
        yield
        return
    with redirect_stdout(_Unread(sys.stdout)) as stream:
        try:
            yield
        finally:
            stream.flush()


class _Unread(io.TextIOBase):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._lose()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lose()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def _lose(self) -> None:
        """From now on, and for what the stream still holds, which Python writes when it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
