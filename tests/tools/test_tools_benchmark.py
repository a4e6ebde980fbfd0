"""The benchmark command: paired statistics, entrants that always end, an instant --help, and a table from a small run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import gone

from megagate.analysis.benchmark.interleave import Entrant, run_rounds
from megagate.analysis.benchmark.paired import paired_ratio
from megagate.errors import RunError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark.py"
LIMIT_S = 60


# ---- entrants, made in processes of their own


def counting(start: int):
    state = {"value": start}

    def work() -> dict[str, float]:
        state["value"] += 1
        time.sleep(0.01)
        return {"value": state["value"], "pid": os.getpid()}

    return work


def failing():
    raise ValueError("no such thing")


def stuck(pids: str):
    child = subprocess.Popen(["sleep", "60"])
    Path(pids).write_text(f"{os.getpid()} {child.pid}")
    return lambda: time.sleep(60)


def run_stuck(pids: str) -> None:
    run_rounds([entrant("stuck", "stuck", pids=pids)], rounds=1, deadline=soon())


def entrant(name: str, function: str, *, warmup: int = 0, **arguments) -> Entrant:
    return Entrant(name, f"test_tools_benchmark:{function}", arguments, {"PYTHONPATH": os.pathsep.join(sys.path)}, warmup)


def soon() -> float:
    return time.monotonic() + LIMIT_S


# ---- statistics


def test_a_ratio_is_paired_by_round() -> None:
    mood = [1.0, 5.0, 2.0, 9.0, 1.5, 3.0]  # the machine's: common to both, far larger than the difference
    ratio = paired_ratio([1.1 * m for m in mood], mood)
    assert ratio.median == pytest.approx(1.1)
    assert (ratio.low, ratio.high) == (pytest.approx(1.1), pytest.approx(1.1))


def test_the_interval_holds_the_median_and_ignores_one_wild_round() -> None:
    times = [1.00, 1.02, 1.04, 1.06, 1.08, 1.10, 1.12, 1.14, 1.16, 50.0]
    ratio = paired_ratio(times, [1.0] * 10)
    assert ratio.median == pytest.approx(1.09)
    assert 1.0 < ratio.low < ratio.median < ratio.high < 2.0
    assert ratio == paired_ratio(times, [1.0] * 10), "the bootstrap is seeded"


def test_more_rounds_narrow_the_interval() -> None:
    few, many = ([1.0 + 0.01 * (i % 7) for i in range(n)] for n in (7, 70))
    wide, narrow = paired_ratio(few, [1.0] * 7), paired_ratio(many, [1.0] * 70)
    assert narrow.high - narrow.low < wide.high - wide.low


def test_too_few_rounds_have_no_interval() -> None:
    assert paired_ratio([2.0, 4.0], [1.0, 1.0]) == (3.0, None, None)
    assert str(paired_ratio([2.0], [1.0])) == "2.000"
    with pytest.raises(ValueError, match="at least one round"):
        paired_ratio([], [])
    with pytest.raises(ValueError):
        paired_ratio([1.0, 1.0], [1.0])


# ---- processes in turns


def test_rounds_are_complete_and_warm_up_is_not_counted() -> None:
    entrants = [entrant("a", "counting", start=0, warmup=2), entrant("b", "counting", start=100)]
    series = run_rounds(entrants, rounds=3, deadline=soon())
    assert [note["value"] for note in series["a"].notes] == [3, 4, 5]
    assert [note["value"] for note in series["b"].notes] == [101, 102, 103]
    assert all(0.01 <= s < LIMIT_S for s in series["a"].seconds + series["b"].seconds)
    assert series["a"].peak_rss > 1_000_000
    assert gone(one.notes[0]["pid"] for one in series.values())


def test_a_failure_is_told_with_the_end_of_its_output() -> None:
    with pytest.raises(RunError, match=r"(?s)'bad' ended with exit code 1.*no such thing"):
        run_rounds([entrant("good", "counting", start=0), entrant("bad", "failing")], rounds=1, deadline=soon())


def test_the_limit_ends_a_stuck_entrant_and_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    entrants = [entrant("quick", "counting", start=0), entrant("stuck", "stuck", pids=str(pids))]
    series = run_rounds(entrants, rounds=5, deadline=time.monotonic() + 8)
    assert series["quick"].seconds == series["stuck"].seconds == [], "an incomplete round does not count"
    assert gone(map(int, pids.read_text().split()))


def test_a_stuck_entrant_and_its_children_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = [sys.executable, "-c", f"import {__name__} as here; here.run_stuck({str(pids)!r})"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as caller:
        deadline = soon()
        while not (pids.exists() and pids.read_text()):
            assert time.monotonic() < deadline and caller.poll() is None
            time.sleep(0.05)
        caller.kill()
    assert gone(map(int, pids.read_text().split()))


# ---- the command


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    for command in (["--help"], ["gate", "--help"], ["data", "--help"], ["step", "--help"]):
        result = run(*command, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
        assert result.returncode == 0, result.stderr
    assert "--rounds" in result.stdout


def test_an_unknown_row_is_told() -> None:
    result = run("step", "--rows", "plain,fast")
    assert result.returncode == 2
    assert "no row fast" in result.stderr and "headwise" in result.stderr


def test_a_small_run_ends_with_a_table(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = ["step", "--shape", "tiny", "--rows", "headwise", "--rounds", "2", "--threads", "1", "--json", str(record)]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    table = [line for line in lines if line.startswith("| megagate")]
    assert [line.count("|") for line in table] == [8, 8]
    assert "(`plain`)" in table[0] and "1.000" in table[0] and "(`headwise`)" in table[1]
    assert "2 rounds" in lines[0] and "1 threads" in lines[0] and "torch" in lines[0]
    assert lines[-1].strip() == f"python tools/benchmark.py {' '.join(command)}"
    rows = json.loads(record.read_text())["rows"]
    losses = [note["loss"] for note in rows["plain"]["notes"]]
    assert len(losses) == 2 and all(5.0 < loss < 6.0 for loss in losses), "ln 256 is 5.5"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_command_is_stopped(number: int) -> None:
    command = [sys.executable, str(TOOL), "step", "--shape", "tiny", "--rows", "plain", "--rounds", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = soon()
        while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        process.wait(timeout=LIMIT_S)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert gone(child.pid for child in children)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
