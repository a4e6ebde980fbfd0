"""Programs of Debian packages that a few tests need: installed where that can be done, else the test is skipped with the reason."""

import os
import shutil
import subprocess

import pytest

_LIMIT_S = 180


def require(programs: dict[str, str]) -> None:
    """Have programs on the path, or skip the test.

    Args:
        programs: Each with its package.
    """
    missing = sorted({package for program, package in programs.items() if not shutil.which(program)})
    reason = _install(missing) if missing else ""
    if reason:
        pytest.skip(f"needs the Debian packages {', '.join(missing)}: {reason}")


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
