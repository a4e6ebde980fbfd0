"""A save beside training: what is written, when it counts, and who waits for whom."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ranks
import torch
from certified import RUN, resume, saver_of, step, write
from parity.engines import Layout, batch, build_engine

from megagate.checkpoint import rankfile, store
from megagate.checkpoint.certificate import read_next_step
from megagate.checkpoint.durable import write_all
from megagate.checkpoint.store import Checkpoint
from megagate.engine.base import Engine
from megagate.errors import RunError
from megagate.parallel.comm import barrier
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.train import certify

DP2 = Layout(2, ep=2)
LONG_S = 30


@contextmanager
def held_writer(held: bool) -> Iterator[threading.Event]:
    """Inside, writing begins only once the event is set, where it is `held`; nothing else is changed."""
    released, write_rank = threading.Event(), store.write_rank

    def wait_and_write(*arguments: Any) -> None:
        assert released.wait(LONG_S if held else 0) or not held
        write_rank(*arguments)

    with patch.object(store, "write_rank", wait_and_write):
        yield released


def masters(engine: Engine) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    return {(piece.name, piece.offset): piece.tensor.clone() for piece in engine.state_pieces()}


def until(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    """Act until the condition holds; every rank acts as often, since the condition is of what all see."""
    for _ in range(10_000):
        if condition():
            return
        action()
    raise AssertionError("it never came")


def save_beside(context: RankContext, root: Path) -> list[list[int]]:
    """Rank 1 writes late: two steps go on meanwhile, then another save has to wait. Returns what was complete at each moment."""
    engine = build_engine(RUN, DP2, ParallelMesh.build(tp=1, ep=2))
    world, saver, seen = engine.mesh.world, saver_of(engine, root, keep=1), []

    def look() -> None:
        barrier(world)
        seen.append(store.complete_steps(root))
        barrier(world)

    step(engine, saver, 1)
    step(engine, saver, 2)
    before = masters(engine)
    assert saver.stall() == {}
    with held_writer(context.rank == 1) as released:
        saver.save(engine, step=2, best_val_loss=None)
        assert 0 < saver.stall()["checkpoint_stall_seconds"] < LONG_S / 2
        step(engine, saver, 3)
        look()
        step(engine, saver, 4)
        released.set()
        until(lambda: saver._flight is None, saver.poll)
    look()
    with Checkpoint.open(store.step_path(root, 2)) as checkpoint:
        assert checkpoint.verify()
        for (name, offset), expected in before.items():
            found = torch.empty_like(expected)
            checkpoint.read(name, offset, found)
            assert torch.equal(found, expected), f"{name} is not what it was at step 2"
    followed = read_next_step(store.step_path(root, 2))
    assert followed is not None and followed.step == 3, "measured at step 3, written after step 4"
    with held_writer(context.rank == 0) as released:
        saver.save(engine, step=4, best_val_loss=None)
        look()
        timer = threading.Timer(0.2, released.set)
        timer.start()
        saver.save(engine, step=5, best_val_loss=None)  # as a run that saves faster than the disk writes
        look()
        saver.finish()
        timer.join()
    look()
    return seen


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """And `keep` counts what is complete: the last such one stays while the next is in flight."""
    none, first, still, second, third = ranks.run_ranks(save_beside, 2, tmp_path)[0]
    assert (none, first, still, third) == ([], [2], [2], [5])
    assert second in ([4], [5]), "the save in flight was published before the next began"


def full_in_one(context: RankContext, root: Path) -> str:
    """Rank 1 has no space at once; rank 0 begins to write only later. What each is told."""
    engine = build_engine(RUN, DP2, ParallelMesh.build(tp=1, ep=2))
    saver = saver_of(engine, root)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with held_writer(context.rank == 0) as released, patch.object(rankfile, "write_all", full if context.rank else write_all):
        saver.save(engine, step=1, best_val_loss=None)
        if context.rank == 1:
            saver._flight.task.wait()
        barrier(engine.mesh.world)
        timer = threading.Timer(0.3, released.set)
        timer.start()
        try:
            saver.poll()  # a single one: who has failed is not trained on for, until all others are through
        except RunError as error:
            return str(error)
        finally:
            timer.join()
            saver._flight = None
    return "not told"


def test_no_space_in_one_rank_is_told_as_that_by_all(tmp_path: Path) -> None:
    told, other = ranks.run_ranks(full_in_one, 2, tmp_path)
    assert "rank-00001.safetensors: no space for its" in told, told
    assert other == told and list(tmp_path.iterdir()) == []


def test_a_bug_waits_for_the_threads(tmp_path: Path) -> None:
    """Python would end the process under them, which aborts where one is in C++; a disk that hangs is not waited for."""
    engine = build_engine(RUN, Layout(), ParallelMesh.single())
    saver = saver_of(engine, tmp_path)
    saver.abandon(seconds=LONG_S)
    with held_writer(True) as released:
        step(engine, saver, 1)
        saver.save(engine, step=1, best_val_loss=None)
        saver.abandon(seconds=0.01)
        writing = saver._flight.task
        assert not writing.done
        timer = threading.Timer(0.2, released.set)
        timer.start()
        saver.abandon(seconds=LONG_S)
        assert writing.done
        timer.join()
    sums = certify._own_sums
    with patch.object(certify, "_own_sums", lambda *given: (time.sleep(0.2), sums(*given))[1]):
        step(engine, saver, 2)  # the step after the save, which a thread measures
        (measuring,) = saver._certifier.tasks
        assert not measuring.done
        saver.abandon(seconds=LONG_S)
        assert measuring.done


def test_training_draws_no_random_numbers_and_a_resume_goes_on_with_the_same(tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    write(tmp_path)
    engine = build_engine(RUN, Layout(), ParallelMesh.single())
    engine.evaluate(zip(*batch(0, engine.mesh), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    resume(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def drawn_in_ranks(context: RankContext) -> bool:
    before = torch.get_rng_state()
    engine = build_engine(RUN, DP2, ParallelMesh.build(tp=1, ep=2))
    saver = saver_of(engine, Path("nowhere"))
    before = torch.get_rng_state()
    step(engine, saver, 1)
    step(engine, saver, 2)
    return torch.equal(torch.get_rng_state(), before)


def test_nor_do_ranks() -> None:
    assert all(ranks.run_ranks(drawn_in_ranks, 2))
