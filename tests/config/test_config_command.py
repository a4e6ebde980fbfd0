"""What the commands in tools/ share: numbers as arguments, being stopped, and nobody who reads what they say."""

import os
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import megagate
from megagate.config.command import NewFolder, Stopped, above_zero, exit_code, exit_code_of, positive, stoppable
from megagate.errors import ConfigError

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # so that something is kept back
ENVIRONMENT["PYTHONPATH"] = str(Path(megagate.__file__).parents[1])
NUMBERS = (signal.SIGTERM, signal.SIGHUP)


def test_numbers() -> None:
    assert (positive("1"), positive("12"), above_zero("0.5"), above_zero("3")) == (1, 12, 0.5, 3.0)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_what_is_no_whole_number_from_1_on(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{text} must be a whole number from 1 on$"):
        positive(text)


@pytest.mark.parametrize("text", ["0", "-0.1", "nan", "inf", "x"])
def test_what_is_no_number_above_0(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{text} must be a number above 0, and finite$"):
        above_zero(text)


@pytest.fixture
def harmless() -> Iterator[list[object]]:
    """Signals that nothing in a test takes do nothing, rather than end the tests; gives the handlers."""
    before = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
    yield [signal.getsignal(number) for number in NUMBERS]
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_stops_and_others_wait_until_all_is_cleared_away(number: int, harmless: list[object]) -> None:
    cleared = False
    with pytest.raises(Stopped) as caught, stoppable():
        try:
            os.kill(os.getpid(), number)
            pytest.fail("went on")
        finally:
            for each in NUMBERS:
                os.kill(os.getpid(), each)
            cleared = True
    assert cleared and exit_code(caught.value) == 128 + number and str(caught.value) == signal.Signals(number).name
    assert [signal.getsignal(each) for each in NUMBERS] == harmless
    assert exit_code(KeyboardInterrupt()) == 130


@pytest.mark.usefixtures("harmless")
def test_what_nohup_has_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    except Stopped:
        pytest.fail("it was not ignored")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def stopping() -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return 0


@pytest.mark.usefixtures("harmless")
def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: 5) == 5 and capsys.readouterr().err == ""
    assert exit_code_of(raising(ConfigError("a: must be b"))) == 2 and capsys.readouterr().err == "ConfigError: a: must be b\n"
    assert exit_code_of(raising(ConfigError("a: must be b")), failed=1) == 1
    capsys.readouterr()
    assert exit_code_of(raising(KeyboardInterrupt())) == 130 and capsys.readouterr().err == ""
    assert exit_code_of(stopping, stopped=lambda stop: (f"stopped by {stop}", exit_code(stop))) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours is seen whole
        exit_code_of(raising(ZeroDivisionError()))


def test_whether_the_folder_was_made(tmp_path: Path) -> None:
    folder, used = NewFolder(tmp_path / "new"), NewFolder(tmp_path)
    assert folder.interrupted(KeyboardInterrupt()) == ("interrupted; nothing was written", 130)
    assert folder.interrupted(Stopped(signal.SIGTERM)) == ("stopped by SIGTERM; nothing was written", 143)
    (tmp_path / "new").mkdir()
    assert folder.interrupted(KeyboardInterrupt()) == ("interrupted; nothing was written", 130)
    (tmp_path / "new" / "file").touch()
    assert folder.interrupted(Stopped(signal.SIGHUP)) == (f"stopped by SIGHUP; {tmp_path / 'new'} stands, whole, and was not verified", 1)
    assert NewFolder(tmp_path / "new").interrupted(KeyboardInterrupt()) == ("interrupted; nothing was written", 130)
    assert used.interrupted(KeyboardInterrupt()) == (f"interrupted; {tmp_path} stands, whole, and was not verified", 1)


@pytest.mark.parametrize("words", [10, 100_000])
def test_nobody_reads_what_is_said(words: int) -> None:
    """The pipe breaks when the program ends, or while it says more than is kept back; its exit code is what it would be."""
    code = (
        "import sys\nfrom megagate.config.command import unread_stdout\n"
        f"with unread_stdout():\n    print('word ' * {words})\n    print('more', flush=True)\n    print('end')\nsys.exit(7)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (7, b"")


def test_what_is_said_is_read() -> None:
    code = "from megagate.config.command import unread_stdout\nwith unread_stdout():\n    print('word')\nprint('after')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"word\nafter\n", b"")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", code], env=ENVIRONMENT, timeout=60, check=False)
    assert closed.returncode == 0
