"""Imports point downward only, and each heavy library has one door: the contracts stand in pyproject.toml."""

import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_keep_the_contracts() -> None:
    tool = Path(sysconfig.get_path("scripts")) / "lint-imports"
    result = subprocess.run([str(tool), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
