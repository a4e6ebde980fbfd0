"""The peer of all that reads and writes large files: `cp`, and an fsync of each file."""

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

from megagate.analysis.benchmark.interleave import Work


def copy(source: str, output: str) -> Work:
    """`cp` of all files of a folder, then an fsync of each; notes: seconds, processor time, bytes."""

    def work() -> dict[str, float]:
        shutil.rmtree(output, ignore_errors=True)
        os.mkdir(output)
        files = sorted(Path(source).iterdir())
        for path in files:
            touch(path)
        before, begin = _cpu(), time.perf_counter()
        subprocess.run(["cp", "--reflink=never", "--", *map(str, files), output], check=True)
        for path in [*Path(output).iterdir(), Path(output)]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        seconds, cpu = time.perf_counter() - begin, _cpu() - before
        size = sum(path.stat().st_size for path in files)
        shutil.rmtree(output)
        return {"seconds": seconds, "cpu": cpu, "bytes": size}

    return work


def touch(path: Path) -> None:
    """Bring a file into the file cache, so that copying it does not wait for the disk to read."""
    memory = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def _cpu() -> float:
    """Seconds of the processor of this process and of those that it has waited for."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
