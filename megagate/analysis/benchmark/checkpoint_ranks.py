"""What is measured in the rows of `tools/benchmark.py checkpoint`: ranks that save, load, read or copy a state.

The ranks are processes of their own in a gloo group. They do one unit of work at a time, from a barrier to a barrier; what makes room for
it, and takes its files away, is not timed.
"""

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megagate.analysis.benchmark.checkpoint_state import KINDS, Cut, Layout, cut, made_up_shapes
from megagate.analysis.benchmark.interleave import Work
from megagate.checkpoint import reshard, store
from megagate.checkpoint.staging import HostCopy
from megagate.errors import RunError
from megagate.parallel.comm import barrier
from megagate.parallel.init import LaunchEnv, init_process_group
from megagate.parallel.mesh import ParallelMesh

Job = Callable[[], dict[str, float]]
"""One rank's unit of work, begun and ended by all at once."""
STEP = 1


def ranks(job: str, folder: str, layout: dict[str, int], megabytes: float) -> Work:
    """Ranks that do `job` of this module; notes: seconds from barrier to barrier, processor time of all, bytes of the state."""
    one = Layout(**layout)
    context = multiprocessing.get_context("fork")  # torch is loaded once, and has no threads yet
    pipes = []
    # A file of its own: the folder may lie on a disk that knows no locks.
    rendezvous = Path(tempfile.mkdtemp(prefix="megagate-")) / "ranks"
    for rank in range(one.world_size):
        ours, theirs = context.Pipe()
        arguments = (theirs, str(rendezvous), rank, job, Path(folder), one, megabytes)
        context.Process(target=_rank, args=arguments, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    _all(pipes)
    shutil.rmtree(rendezvous.parent, ignore_errors=True)

    def work() -> dict[str, float]:
        for pipe in pipes:
            pipe.send(None)
        answers = _all(pipes)
        return {**answers[0], **{name: sum(answer[name] for answer in answers) for name in ("cpu", "bytes")}}

    return work


def _all(pipes: list[Connection]) -> list[dict[str, float]]:
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RunError("a rank ended; what it wrote stands above") from None


# ---- one rank


def _rank(pipe: Connection, rendezvous: str, rank: int, name: str, folder: Path, layout: Layout, megabytes: float) -> None:
    torch.set_num_threads(1)
    env = LaunchEnv(rank, rank, layout.world_size, layout.world_size)
    init_process_group(env, device=torch.device("cpu"), init_method=f"file://{rendezvous}", timeout=timedelta(minutes=10))
    mesh = ParallelMesh.build(tp=layout.tp, ep=layout.ep)
    mine = cut(made_up_shapes(megabytes), layout)[rank]
    job = _JOBS[name](mesh, folder, mine)
    pipe.send({})
    while True:
        try:
            pipe.recv()
        except EOFError:  # the caller is gone
            return
        pipe.send(job())


def _timed(mesh: ParallelMesh, action: Callable[[], None]) -> dict[str, float]:
    """From the moment that all are here to the moment that all are done."""
    barrier(mesh.world)
    begin, cpu = time.perf_counter(), time.process_time()
    action()
    mine = time.process_time() - cpu  # without the wait, which may spin
    barrier(mesh.world)
    return {"seconds": time.perf_counter() - begin, "cpu": mine}


def _buffers(mine: list[Cut]) -> list[torch.Tensor]:
    """Memory for what the rank holds, one fragment after the other, each of its pages touched."""
    generator = torch.Generator().manual_seed(0)
    return [torch.empty(one.stop - one.start).uniform_(generator=generator) for _ in KINDS for one in mine]


def _pieces(mine: list[Cut], flats: list[torch.Tensor]) -> list[store.Piece]:
    pieces = []
    for (kind, one), flat in zip(((kind, one) for kind in KINDS for one in mine), flats, strict=True):
        shard = {"full_shape": one.full_shape, "shard_offset": one.shard.offset, "shard_shape": one.shard.shape}
        pieces += reshard.flat_pieces(f"{kind}/{one.name}", **shard, start=one.start, flat=flat)
    return pieces


def _save(mesh: ParallelMesh, folder: Path, mine: list[Cut]) -> Job:
    flats = _buffers(mine)

    def action() -> None:
        if mesh.world.rank == 0:
            store.begin(folder, STEP)
        barrier(mesh.world)
        store.write_rank(store.staging_path(folder, STEP), mesh.world.rank, _pieces(mine, flats))
        barrier(mesh.world)
        if mesh.world.rank == 0:
            store.publish(folder, STEP, world_size=mesh.world.size, metadata={})

    def job() -> dict[str, float]:
        if mesh.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return {**_timed(mesh, action), "bytes": _bytes(flats)}

    return job


def _load(mesh: ParallelMesh, folder: Path, mine: list[Cut]) -> Job:
    flats = _buffers(mine)
    cuts = [(kind, one) for kind in KINDS for one in mine]

    def action() -> None:
        with store.Checkpoint.open(folder) as checkpoint:
            for (kind, one), flat in zip(cuts, flats, strict=True):
                shard = {"full_shape": one.full_shape, "shard_offset": one.shard.offset, "shard_shape": one.shard.shape}
                reshard.read_flat(checkpoint, f"{kind}/{one.name}", **shard, start=one.start, flat=flat)

    return lambda: {**_timed(mesh, action), "bytes": _bytes(flats)}


def _verify(mesh: ParallelMesh, folder: Path, mine: list[Cut]) -> Job:
    def action() -> None:
        with store.Checkpoint.open(folder) as checkpoint:
            checkpoint.verify(rank=mesh.world.rank, world_size=mesh.world.size)

    return lambda: {**_timed(mesh, action), "bytes": 4 * len(KINDS) * sum(one.stop - one.start for one in mine)}


def _read(mesh: ParallelMesh, folder: Path, mine: list[Cut]) -> Job:
    """As many bytes as `_load`, each rank its share of the files' from the first to the last, into memory that is there."""
    memory = bytearray(4 * len(KINDS) * sum(one.stop - one.start for one in mine))
    share = len(memory)

    def action() -> None:
        room = memoryview(memory)
        paths = sorted(store.resolve(folder).glob("*.safetensors"))
        for path in paths[mesh.world.rank % len(paths) :] + paths[: mesh.world.rank % len(paths)]:
            with path.open("rb", buffering=0) as file:
                while room and (got := file.readinto(room[: 1 << 24])):
                    room = room[got:]

    return lambda: {**_timed(mesh, action), "bytes": share}


def _stage(mesh: ParallelMesh, folder: Path, mine: list[Cut]) -> Job:
    """The copy to host memory that a save in the background begins with; the memory is there already."""
    flats, host = _buffers(mine), HostCopy()
    host.take(_pieces(mine, flats))
    return lambda: {**_timed(mesh, lambda: host.take(_pieces(mine, flats))), "bytes": _bytes(flats)}


def _bytes(flats: list[torch.Tensor]) -> int:
    return sum(flat.nbytes for flat in flats)


_JOBS = {"save": _save, "load": _load, "verify": _verify, "read": _read, "stage": _stage}
