"""The session's rule on skips: each is printed, and one that is not on the list fails the session, whatever the number of processes."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import debian
import pytest

TESTS = Path(__file__).parent
CASE = """
import pytest

@pytest.mark.skip(reason="no such tool")
def test_skipped(): ...

@pytest.mark.xfail(reason="known")
def test_expected_to_fail(): assert False

def test_passes(): ...
"""


@pytest.fixture
def session(tmp_path):
    """Runs pytest in a folder with this suite's conftest; returns the exit code and the output."""
    shutil.copy(TESTS / "conftest.py", tmp_path)

    def run(allowed: str, case: str = CASE, *options: str) -> tuple[int, str]:
        (tmp_path / "allowed_skips.txt").write_text(allowed)
        (tmp_path / "test_case.py").write_text(case)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path), *options]
        # This session may be one of several processes, of which the other one is not.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize(
    "allowed", ["", "# test_case.py::test_skipped | no such tool", "*other* | no such tool", "test_case.py::* | another reason"]
)
def test_an_unlisted_skip_fails_the_session(session, allowed):
    code, output = session(allowed)
    assert code == 1
    assert "NOT ALLOWED test_case.py::test_skipped | no such tool" in output


def test_a_listed_skip_is_printed(session):
    code, output = session("# why\n\ntest_case.py::test_skip* | no such *\n")
    assert code == 0
    assert "\ntest_case.py::test_skipped | no such tool" in output


def test_where_no_skips_are_allowed_a_listed_one_fails_the_session(session):
    code, output = session("* | *", CASE, "--no-skips")
    assert code == 1
    assert "NOT ALLOWED test_case.py::test_skipped | no such tool" in output
    assert "1 skips are not allowed here: the session fails" in output


def test_a_skipped_file_counts(session):
    code, output = session("", 'import pytest\npytest.importorskip("no_such_module")\n')
    assert code == 1
    assert "NOT ALLOWED test_case.py | could not import 'no_such_module'" in output


@pytest.mark.parametrize(("allowed", "code"), [("", 1), ("*::test_skipped | no such tool", 0)])
def test_the_rule_holds_over_several_processes(session, allowed, code):
    found, output = session(allowed, CASE, "--numprocesses=auto")
    assert found == code and output.count("test_case.py::test_skipped | no such tool") == 1
    assert output.count("NOT ALLOWED") == code


@pytest.mark.parametrize(("options", "processes"), [((), "2"), (("-m", "gpu"), None)])
def test_there_are_two_processes_and_for_a_gpu_one(session, options, processes):
    case = f"import os\nassert os.environ.get('PYTEST_XDIST_WORKER_COUNT') == {processes!r}\ndef test_passes(): ...\n"
    code, output = session("", case, "--numprocesses=auto", *options)
    assert code == (0 if processes else pytest.ExitCode.NO_TESTS_COLLECTED), output


# ---- packages that are installed where that can be done


def test_one_process_at_a_time_installs_and_what_another_has_installed_is_not_asked_for_again(tmp_path, monkeypatch):
    seen, there = [], set()

    def install(packages):
        with debian._LOCK.open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(packages)
        return ""

    def lock(descriptor, kind):
        there.add("first")  # by the other process, while this one waits
        flock(descriptor, kind)

    flock = fcntl.flock
    monkeypatch.setattr(debian, "_LOCK", tmp_path / "lock")
    monkeypatch.setattr(debian, "_install", install)
    monkeypatch.setattr(debian.shutil, "which", lambda program: program if program in there else None)
    with monkeypatch.context() as patch:
        patch.setattr(debian.fcntl, "flock", lock)
        debian.require({"first": "one"})
    assert seen == []
    debian.require({"first": "one", "second": "two", "third": "two"})
    assert seen == [["two"]]


def test_a_package_that_cannot_be_had_skips_the_test_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(debian, "_LOCK", tmp_path / "lock")
    monkeypatch.setattr(debian, "_install", lambda packages: "no root, or no apt-get")
    with pytest.raises(pytest.skip.Exception, match="needs the Debian packages no-such-package: no root, or no apt-get"):
        debian.require({"no-such-program": "no-such-package"})
