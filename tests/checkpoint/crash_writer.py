"""A warm process that forks a writer of checkpoints for each line it reads, lets it be killed with -9, and says how it ended.

soon ROOT LOG SECONDS   save again and again; kill after SECONDS
at ROOT LOG N           run `scripted` once; the writer kills itself before its N-th operation on files
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch

from megagate.checkpoint import store

WORLD = 2
RECORD_NAME, RECORD = "next_step.json", b"x" * 500
"""What a run puts into a folder that is published already."""
SHAPE = (8, 512)


def save(root: Path, log: Path, step: int, number: int) -> None:
    """Save one value in all elements, and log it once the checkpoint is said to be complete."""
    staging = store.begin(root, step)
    rows = SHAPE[0] // WORLD
    for rank in range(WORLD):
        tensor = torch.full((rows, SHAPE[1]), float(number))
        store.write_rank(staging, rank, [store.Piece(name, SHAPE, (rank * rows, 0), tensor) for name in ("master/w", "exp_avg/w")])
    store.publish(root, step, world_size=WORLD, metadata={"number": number})
    with log.open("a") as file:
        file.write(f"{number}\n")


def record(root: Path, step: int) -> None:
    """What the step after it did, once it is done."""
    store.write_file(store.step_path(root, step) / RECORD_NAME, RECORD)


def endless(root: Path, log: Path) -> None:
    """New steps, the same step again, its record, a `best`, and pruning, until killed."""
    for number in itertools.count(1):
        save(root, log, 10 + number // 2, number)
        record(root, 10 + number // 2)
        if number % 5 == 0:
            store.set_pointer(root, "best", 10 + number // 2)
        store.prune(root, keep=1)


def scripted(root: Path, log: Path) -> None:
    """Every way in which a root changes, once."""
    save(root, log, 10, 1)
    record(root, 10)
    store.set_pointer(root, "best", 10)
    save(root, log, 10, 2)
    save(root, log, 11, 3)
    record(root, 11)
    save(root, log, 12, 4)
    store.prune(root, keep=1)
    store.clean_leftovers(root)


def die_before(operation: int, root: Path) -> None:
    """Let this process kill itself before its n-th operation that may change a file of `root`."""
    left = [operation]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[object, ...]) -> None:
        # shutil.rmtree works with names relative to a descriptor, so its events count whatever they name.
        if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir") or (event == "open" and str(root) in str(args[0])):
            count()

    write = os.write
    os.write = lambda descriptor, data: (count(), write(descriptor, data))[1]
    os.fsync = lambda descriptor: count()  # a kill loses nothing that the kernel has, and this is run a hundred times
    sys.addaudithook(audit)


def child(kind: str, root: Path, log: Path, number: str) -> None:
    """The writer."""
    torch.set_num_threads(1)
    if kind == "at":
        die_before(int(number), root)
        scripted(root, log)
    else:
        endless(root, log)


def main() -> None:
    """Serve requests from standard input."""
    store.Piece("warm", (1,), (0,), torch.zeros(1))
    for line in sys.stdin:
        kind, root, log, number = line.split()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                child(kind, Path(root), Path(log), number)
                status = 0
            finally:
                os._exit(status)
        if kind == "soon":
            time.sleep(float(number))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print("killed" if os.WIFSIGNALED(status) else f"ended {os.WEXITSTATUS(status)}", flush=True)


if __name__ == "__main__":
    main()
