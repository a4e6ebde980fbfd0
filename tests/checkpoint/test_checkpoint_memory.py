"""Loading takes a rank's own shard and a few MB, however the checkpoint was cut; saving takes one chunk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import memory_child
import pytest

import megagate
from megagate.checkpoint.safefile import CHUNK_BYTES

MB = 1 << 20
PIECE = 4 * memory_child.ROWS * memory_child.COLUMNS // 8
"""The smallest piece of `w` on the disk, 8 MB: what a reader would hold that copies one before it cuts out its part."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    path = os.pathsep.join([str(Path(megagate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, memory_child.__file__, str(tmp_path_factory.mktemp("memory"))]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_loading_takes_the_shard_and_little_more(grown: dict[str, int]) -> None:
    loads = {name: size for name, size in grown.items() if name.startswith(("all", "columns", "flat"))}
    assert len(loads) == 6
    assert all(-MB < size < PIECE * 3 // 4 for size in loads.values()), loads


def test_digests_take_little(grown: dict[str, int]) -> None:
    assert max(grown["verify rows"], grown["verify columns"]) < PIECE * 3 // 4, grown


def test_comparing_takes_a_few_blocks(grown: dict[str, int]) -> None:
    assert grown["compare"] < 48 * MB, grown


def test_saving_takes_a_chunk(grown: dict[str, int]) -> None:
    assert grown["write"] < CHUNK_BYTES + 3 * MB, grown
