"""Programs of Debian packages that a few tests need: installed where that can be done, else the test is skipped with the reason."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_LIMIT_S = 180
_LOCK = Path(tempfile.gettempdir(), "megagate-tests-apt-get.lock")


def require(programs: dict[str, str]) -> None:
    """Have programs on the path, or skip the test.

    Args:
        programs: Each with its package.
    """
    if not _missing(programs):
        return
    with _LOCK.open("w") as lock:  # the tests' other process may be installing, and apt-get does not wait for another
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = _missing(programs)
        reason = _install(missing) if missing else ""
    if reason:
        pytest.skip(f"needs the Debian packages {', '.join(missing)}: {reason}")


def _missing(programs: dict[str, str]) -> list[str]:
    return sorted({package for program, package in programs.items() if not shutil.which(program)})


def _install(packages: list[str]) -> str:
    """Empty, or why they could not be installed."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no root, or no apt-get"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]} took more than {_LIMIT_S} s"
        if done.returncode:
            return f"apt-get {command[0]} failed: {(done.stderr.splitlines() or ['-'])[-1]}"
    return ""
