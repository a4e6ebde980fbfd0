"""The session's rule on skips: each is printed, and one that is not on the list fails the session."""

import shutil
import subprocess
import sys
from pathlib import Path

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
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
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
