"""What megagate does in the rows of `tools/benchmark.py data`, each in a process of its own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megagate.analysis.benchmark.interleave import Work
from megagate.analysis.benchmark.resident import Growth, import_cost
from megagate.errors import RunError

SEED = 1234
_TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
_LOG_LINES = 10


def start(folder: str, seq_len: int) -> Work:
    """From a folder to the first sample: manifest read and checked, shards checked, the order known, one sample read."""
    cost = import_cost("megagate.data.dataset", "megagate.data.loader")
    from megagate.data.dataset import open_dataset  # noqa: PLC0415  imports are measured apart
    from megagate.data.loader import TrainLoader  # noqa: PLC0415

    def work() -> dict[str, float]:
        growth = Growth()
        data = open_dataset(folder, vocab_size=1 << 31, directory=Path(folder))
        options = {"seq_len": seq_len, "global_batch_size": 1, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "seed": SEED}
        batch = TrainLoader(data.train, **options).step(0)
        assert batch.tokens.shape == (1, 1, seq_len), batch.tokens.shape
        return {**growth.notes(), **cost}

    return work


def sample(folder: str, seq_len: int, samples: int, micro_batch: int, micro_steps: int) -> Work:
    """The first samples of an open data set, again and again, in steps of `micro_steps` micro-batches."""
    from megagate.data.dataset import open_dataset  # noqa: PLC0415  as above
    from megagate.data.loader import TrainLoader  # noqa: PLC0415

    data = open_dataset(folder, vocab_size=1 << 31, directory=Path(folder))
    size = micro_batch * micro_steps
    options = {"seq_len": seq_len, "global_batch_size": size, "micro_batch_size": micro_batch, "dp_rank": 0, "dp_size": 1, "seed": SEED}
    loader = TrainLoader(data.train, **options)
    assert samples % size == 0 and samples <= loader.windows_per_epoch, f"{samples} samples in steps of {size}"

    def work() -> dict[str, float]:
        for index in range(samples // size):
            loader.step(index)
        return {}

    return work


def lookup(windows: int, block: int, blocks: int) -> Work:
    """Positions of an epoch's order, in blocks; a block's own are drawn anew each time."""
    import numpy as np  # noqa: PLC0415  as above

    from megagate.data.permutation import KeyedPermutation  # noqa: PLC0415

    order, draw = KeyedPermutation(windows, SEED), np.random.default_rng(SEED)

    def work() -> dict[str, float]:
        positions = draw.integers(0, windows, size=(blocks, block))
        start = time.process_time()
        for row in positions:
            order.lookup(row)
        return {"cpu": time.process_time() - start}

    return work


def shuffle(entries: int) -> Work:
    """numpy's shuffle of as many entries, as Megatron builds its orders: the peer of `lookup`, without Megatron's other work."""
    import numpy as np  # noqa: PLC0415  as above

    state = np.random.RandomState(SEED)

    def work() -> dict[str, float]:
        order = np.arange(entries, dtype=np.uint32)
        start = time.process_time()
        state.shuffle(order)
        return {"cpu": time.process_time() - start}

    return work


def preprocess(options: Sequence[str], output: str) -> Work:
    """The whole command `tools/preprocess_data.py`, imports and all of its processes included."""
    command = [sys.executable, str(_TOOL), *options, "--output", output]

    def work() -> dict[str, float]:
        shutil.rmtree(output, ignore_errors=True)
        log = Path(output + ".log")
        begin = time.time()
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise RunError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{tail}")
        # of the largest of its processes, whatever their number
        return {"cpu": usage.ru_utime + usage.ru_stime, "peak": 1024 * usage.ru_maxrss, "begin": begin}

    return work
