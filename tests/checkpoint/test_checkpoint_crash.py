"""Killed with -9 at any moment, a writer leaves a complete checkpoint, not older than the last one it finished.

A kill does not lose what the kernel has; that bytes are flushed before names is tested in test_checkpoint_folders.py.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import crash_writer
import pytest
import torch

import megagate
from megagate.checkpoint import store

Run = Callable[[str, Path, Path, float], str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Ask the warm process for one writer; returns how it ended."""
    path = os.pathsep.join([str(Path(megagate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, crash_writer.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None and server.stdout is not None
    requests, answers = server.stdin, server.stdout

    def ask(kind: str, root: Path, log: Path, number: float) -> str:
        requests.write(f"{kind} {root} {log} {number}\n")
        requests.flush()
        return answers.readline().strip()

    yield ask
    requests.close()
    server.wait(timeout=10)
    answers.close()


def number_of(path: Path) -> int:
    """The number that the checkpoint says it holds, after a check that it is whole and holds nothing else."""
    with store.Checkpoint.open(path) as checkpoint:
        assert checkpoint.verify() == 2 * crash_writer.WORLD
        number = checkpoint.metadata["number"]
        for name in ("master/w", "exp_avg/w"):
            assert torch.equal(checkpoint.read_whole(name), torch.full(crash_writer.SHAPE, float(number)))
    return int(number)


def check(root: Path, log: Path) -> int:
    """What a run that starts now finds; it must be the last finished save, or the one that was under way."""
    finished = int(log.read_text().split()[-1])
    found = number_of(root)
    assert finished <= found <= finished + 1
    for step in store.complete_steps(root):
        number_of(store.step_path(root, step))
        record = store.resolve(store.step_path(root, step)) / crash_writer.RECORD_NAME
        assert not record.exists() or record.read_bytes() == crash_writer.RECORD
    best = store.read_pointer(root, "best")
    store.clean_leftovers(root)
    assert number_of(root) == found and store.read_pointer(root, "best") == best
    assert not [path.name for path in [*root.iterdir(), *root.glob("*/*.tmp")] if path.suffix], "clean_leftovers left something"
    return found


def start(tmp_path: Path, name: str) -> tuple[Path, Path]:
    root, log = tmp_path / name, tmp_path / f"{name}.log"
    crash_writer.save(root, log, 9, 0)
    return root, log


def test_killed_at_random_moments(tmp_path: Path, run: Run) -> None:
    rng = random.Random(0)
    root, log = start(tmp_path, "root")
    found = []
    for _ in range(30):
        log.write_text("0\n")
        begin = time.perf_counter()
        crash_writer.save(root, log, 9, 0)
        one_save = time.perf_counter() - begin
        assert run("soon", root, log, rng.uniform(0, 3 * one_save)) == "killed"
        found.append(check(root, log))
    assert len(set(found)) > 1, f"the writer was always killed in the same save: {found}"


def test_killed_before_each_operation_on_files(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    found = []
    for operation in range(1000):
        root, log = start(tmp_path, f"root{operation}")
        how = run("at", root, log, operation)
        found.append(check(root, log))
        if how != "killed":
            assert how == "ended 0"
            break
    assert found == sorted(found) and set(found) == {0, 1, 2, 3, 4}
    assert len(found) > 60
    assert store.complete_steps(root) == [10, 12] and store.read_pointer(root, "best") == 10
