"""Local ranks: results in order, failures and hangs reported and ended, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from processes import gone

from megagate.parallel.spawn import RankContext, RankError, RankPool, RankTimeoutError, run_ranks

LIMIT_S = 60


# ---- functions that run in ranks


def describe(context: RankContext, word: str) -> tuple:
    print("a line of another call")
    value = torch.full((2,), float(context.rank))
    return word, context.rank, context.world_size, os.getpid(), value, dist.get_rank(), dist.get_world_size()


def collective(context: RankContext) -> torch.Tensor:
    """Random numbers, a sum over all ranks and one over a subgroup: whatever an earlier call left would show."""
    value = torch.randn(5, dtype=torch.float64) * (context.rank + 1)
    dist.all_reduce(value)
    pair = dist.new_group([0, 1])
    if context.rank < 2:
        dist.all_reduce(value, group=pair)
    return value


def fail_in_rank_1(context: RankContext) -> None:
    print("about to fail")
    if context.rank == 1:
        raise KeyError("seven")
    dist.barrier()


def fail_in_all(context: RankContext) -> None:
    time.sleep(0.05 * (3 - context.rank))
    raise ValueError(f"from rank {context.rank}")


def leave_in_rank_0(context: RankContext, code: int) -> None:
    if context.rank == 0:
        sys.exit(code)
    time.sleep(LIMIT_S)


def hang_in_odd_ranks(context: RankContext) -> None:
    if context.rank % 2:
        wait_for_ever()


def wait_for_ever() -> None:
    time.sleep(1000)


def kill_rank_1(context: RankContext) -> None:
    dist.barrier()
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def fail_in_rank_0_and_die_in_rank_1(context: RankContext) -> None:
    if context.rank == 0:
        raise ConnectionError("lost a peer")
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def start_sleeper_and_hang(context: RankContext, file: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    Path(file).write_text(str(child.pid))
    wait_for_ever()


def soil(context: RankContext) -> None:
    """Everything a careless test might leave."""
    os.environ["SOILED"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(99)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.new_group([0])


def state(context: RankContext) -> tuple:
    return os.environ.get("SOILED"), os.getcwd(), torch.get_default_dtype(), torch.rand(1), signal.getsignal(signal.SIGTERM)


def note_before() -> None:
    os.environ["NOTES"] = f"before: group {dist.is_initialized()}"


def note_after() -> None:
    with open(os.environ["NOTEBOOK"], "a") as file:
        file.write(f"{os.environ['NOTES']}, after: group {dist.is_initialized()}")


def note(context: RankContext) -> None:
    os.environ["NOTES"] += f", call: {os.environ['COLOUR']}"


def unpicklable(context: RankContext) -> object:
    return lambda: None


# ---- tests


@pytest.fixture
def pool():
    with RankPool() as made:
        yield made


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order_and_no_process_remains(world_size):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    results = run_ranks(describe, world_size, "hello", timeout=LIMIT_S)
    for rank, (word, got_rank, got_size, _, value, dist_rank, dist_size) in enumerate(results):
        assert (word, got_rank, got_size, dist_rank, dist_size) == ("hello", rank, world_size, rank, world_size)
        assert torch.equal(value, torch.full((2,), float(rank)))
    pids = [result[3] for result in results]
    assert len(set(pids)) == world_size
    assert gone(pids)
    after = psutil.Process().children(recursive=True)
    names = [" ".join(child.cmdline()) for child in after if child.pid not in before]
    assert all("forkserver" in name or "resource_tracker" in name for name in names), names


def test_a_failing_rank_is_reported_at_once_with_its_traceback(pool):
    pool.run(describe, 4, "", timeout=LIMIT_S)
    pids, start = pool.pids, time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(fail_in_rank_1, 4, timeout=LIMIT_S)
    assert time.monotonic() - start < LIMIT_S / 2, "long before the limit, at which the others are ended"
    text = str(caught.value)
    assert caught.value.ranks[0] == 1
    assert "rank 1 of 4 failed in test_spawn.fail_in_rank_1" in text
    assert 'raise KeyError("seven")' in text and "about to fail" in text and "another call" not in text
    assert isinstance(caught.value.__cause__, KeyError)
    assert gone(pids)


def test_the_first_of_several_failures_comes_first(pool):
    with pytest.raises(RankError) as caught:
        pool.run(fail_in_all, 4, timeout=LIMIT_S)
    assert caught.value.ranks == (3, 2, 1, 0)
    assert str(caught.value.__cause__) == "from rank 3"
    assert "rank 0 failed too: ValueError: from rank 0" in str(caught.value)


def test_a_death_comes_before_the_exceptions_it_causes(pool):
    with pytest.raises(RankError, match="rank 1 of 2 failed in .*\n\nthe process was killed by SIGKILL") as caught:
        pool.run(fail_in_rank_0_and_die_in_rank_1, 2, timeout=LIMIT_S)
    assert caught.value.ranks == (1, 0) and "rank 0 failed too: ConnectionError: lost a peer" in str(caught.value)


def test_an_exit_is_a_failure(pool):
    with pytest.raises(RankError, match="SystemExit: 0"):
        pool.run(leave_in_rank_0, 2, 0, timeout=LIMIT_S)


def test_hanging_ranks_are_killed_at_the_limit_and_named_with_their_place(pool):
    pool.run(describe, 4, "", timeout=LIMIT_S)
    pids, start = pool.pids, time.monotonic()
    with pytest.raises(RankTimeoutError) as caught:
        pool.run(hang_in_odd_ranks, 4, timeout=0.5)
    assert 0.5 <= time.monotonic() - start < LIMIT_S / 2
    text = str(caught.value)
    assert caught.value.ranks == (1, 3)
    assert "did not finish in 0.5 s" in text and "still running: 1, 3" in text
    assert text.count("in wait_for_ever") == 2 and "end_with_parent" not in text
    assert gone(pids)


def test_what_a_rank_started_ends_with_it(pool, tmp_path):
    with pytest.raises(RankTimeoutError):
        pool.run(start_sleeper_and_hang, 1, str(tmp_path / "pid"), timeout=1)
    assert gone([int((tmp_path / "pid").read_text())])


@pytest.mark.parametrize("deadly_signal", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_caller(tmp_path, deadly_signal):
    """The caller is killed, or interrupted, while its ranks hang."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom test_spawn import run_ranks, start_sleeper_and_hang\n"
        "if __name__ == '__main__': run_ranks(start_sleeper_and_hang, 1, sys.argv[1], timeout=60)\n"
    )
    note = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, program, note], env=environment, stderr=subprocess.PIPE) as caller:
        while not (note.exists() and note.read_text()) and caller.poll() is None:
            time.sleep(0.02)
        family = [child.pid for child in psutil.Process(caller.pid).children(recursive=True)]
        assert int(note.read_text()) in family
        caller.send_signal(deadly_signal)
        caller.wait(LIMIT_S)
        assert gone(family)
    assert not list(tmp_path.glob("megagate-ranks-*"))


def test_a_pool_keeps_its_processes(pool):
    first = [result[3] for result in pool.run(describe, 4, "", timeout=LIMIT_S)]
    for world_size in (2, 4, 1, 2, 4) * 4:
        pids = [result[3] for result in pool.run(describe, world_size, "", timeout=LIMIT_S)]
        assert pids == first[:world_size]


def test_a_killed_rank_is_reported_and_the_next_call_works(pool):
    with pytest.raises(RankError, match="rank 1 of 2 failed in .*\n\nthe process was killed by SIGKILL"):
        pool.run(kill_rank_1, 2, timeout=LIMIT_S)
    assert len(pool.run(describe, 2, "", timeout=LIMIT_S)) == 2


def test_a_rank_that_died_between_calls_is_reported(pool):
    pool.run(describe, 2, "", timeout=LIMIT_S)
    os.kill(pool.pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 0 of 2 failed in .*\n\nthe process was killed by SIGKILL"):
        pool.run(describe, 2, "", timeout=LIMIT_S)
    assert len(pool.run(describe, 2, "", timeout=LIMIT_S)) == 2


def test_a_pooled_collective_equals_a_fresh_one(pool):
    fresh = run_ranks(collective, 4, timeout=LIMIT_S)
    for _ in range(3):
        pool.run(soil, 4, timeout=LIMIT_S)
        pooled = pool.run(collective, 4, timeout=LIMIT_S)
        assert all(torch.equal(a, b) for a, b in zip(fresh, pooled, strict=True))


def test_a_call_finds_the_state_of_a_new_process(pool, tmp_path, monkeypatch):
    fresh = run_ranks(state, 1, timeout=LIMIT_S)[0]
    pool.run(soil, 1, timeout=LIMIT_S)
    assert pool.run(state, 1, timeout=LIMIT_S)[0] == fresh
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOILED", "by the caller")
    assert pool.run(state, 1, timeout=LIMIT_S)[0][:2] == ("by the caller", str(tmp_path))


def test_the_pool_adds_its_environment_and_calls_its_hooks(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK", str(tmp_path / "notes"))
    monkeypatch.setenv("COLOUR", "red")
    with RankPool(environment={"COLOUR": "blue"}, before=note_before, after=note_after) as pool:
        pool.run(note, 1, timeout=LIMIT_S)
    assert (tmp_path / "notes").read_text() == "before: group False, call: blue, after: group True"


def test_what_cannot_be_pickled_is_an_error(pool):
    with pytest.raises(RankError, match="lambda"):
        pool.run(unpicklable, 1, timeout=LIMIT_S)
    with pytest.raises((AttributeError, TypeError), match="lambda"):
        pool.run(lambda context: None, 1, timeout=LIMIT_S)


def test_groups_and_files_do_not_pile_up(pool):
    def open_files() -> list[int]:
        return [psutil.Process(pid).num_fds() + psutil.Process(pid).num_threads() for pid in [os.getpid(), *pool.pids]]

    pool.run(collective, 2, timeout=LIMIT_S)
    before = open_files()
    for _ in range(50):
        pool.run(collective, 2, timeout=LIMIT_S)
    assert open_files() == before
