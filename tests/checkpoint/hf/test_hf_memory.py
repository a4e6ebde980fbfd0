"""What an export of 5 GB with experts takes of memory: of the process's own, mapped files left out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagate.analysis.benchmark.convert_work import make_checkpoint

MEGABYTES = 5000
GROWTH = 400e6
"""Bytes: the issue allows 2 GB of the whole process, of which 0.2 GB are torch; one row of the mapping, or a block, is 0.1 GB at most."""
EXPORT = """
import sys
from pathlib import Path
from megagate.analysis.benchmark.convert_work import measured
from megagate.checkpoint.hf.export import export

notes = measured(lambda: export(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3]))
print(int(notes["private"]))
"""


@pytest.mark.slow
def test_a_large_export_takes_little_memory(tmp_path: Path) -> None:
    try:
        make_checkpoint(tmp_path / "run", MEGABYTES)
        command = [sys.executable, "-c", EXPORT, str(tmp_path / "run"), str(tmp_path / "hf"), "bf16"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")) > MEGABYTES * 1e6 / 2 * 0.98
        assert int(done.stdout) < GROWTH
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
