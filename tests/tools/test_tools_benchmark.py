"""The benchmark command: paired statistics, entrants that always end, an instant --help, and a table from a small run."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megagate.analysis.benchmark.gate import BASE, GATES, MIN_PAIRS, SESSION, TWIN, Line, Record, cycle, lines, study, widest_half
from megagate.analysis.benchmark.interleave import Entrant, run_rounds
from megagate.analysis.benchmark.paired import paired_ratio, paired_shift
from megagate.analysis.benchmark.step import SHAPES
from megagate.analysis.benchmark.step_plain import alternating, turns
from megagate.errors import RunError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark.py"
LIMIT_S = 60
COSTS = {BASE: 1.0, TWIN: 1.0, "headwise": 1.03, "elementwise": 1.05}
CONDITIONS = {"shape": "S", "threads": 1, "machine": "one"}


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


def synthetic(shape: str, gates: dict[str, str | None]):
    """Steps that take no time: a moody machine, noise of 1 %, and a headwise gate that costs 3 %."""
    draw = random.Random(os.getpid())

    def work() -> dict[str, float]:
        mood = draw.choice([1.0, 1.0, 1.5])
        times = {name: mood * COSTS[name] * math.exp(draw.gauss(0, 0.01)) for name in gates}
        return {f"{name}.{measure}": time for name, time in times.items() for measure in ("seconds", "cpu_seconds", "loss")}

    return work


def entrant(name: str, function: str, *, warmup: int = 0, **arguments) -> Entrant:
    return Entrant(name, f"test_tools_benchmark:{function}", arguments, {"PYTHONPATH": str(Path(__file__).parent)}, warmup)


def soon() -> float:
    return time.monotonic() + LIMIT_S


def gone(pid: int) -> bool:
    """Ended; a process that nobody has waited for yet counts."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


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


@pytest.mark.parametrize("wild", [0.0, 0.15])
def test_the_interval_of_a_shift_holds_the_truth_as_often_as_it_says(wild: float) -> None:
    """Of 400 studies of 25 pairs, also where pairs are off by half in either direction."""
    draw, held = random.Random(5), 0
    for _ in range(400):
        pairs = [0.02 + draw.gauss(0, 0.03) + (draw.choice([-0.4, 0.4]) if draw.random() < wild else 0) for _ in range(25)]
        shift = paired_shift(pairs)
        held += shift.low <= 0.02 <= shift.high
    assert 0.92 < held / 400 < 0.98


def test_a_shift_is_the_middle_of_means_of_two() -> None:
    shift = paired_shift([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0])
    assert shift.centre == pytest.approx(3.0)
    assert (shift.low, shift.high) == (1.0, 52.0), "the third from either end, as the tables of the signed-rank test have it"
    assert paired_shift([1.0] * 6).half_width == math.inf
    wide, narrow = (paired_shift([0.01 * (i % 7) for i in range(n)]).half_width for n in (7, 70))
    assert narrow < wide / 2
    with pytest.raises(ValueError, match="at least one pair"):
        paired_shift([])


# ---- the gate's study


def record_of(costs: dict[str, float], *, pairs: int, noise: float = 0.01) -> Record:
    """A study whose true costs are known."""
    record, draw = Record.empty(CONDITIONS, [name for name in costs if name in GATES]), random.Random(7)
    for _ in range(pairs):
        mood = draw.choice([1.0, 1.0, 1.5])
        for name, measures in record.numbers.items():
            time_taken = mood * costs[name] * math.exp(draw.gauss(0, noise))
            measures["seconds"].append(time_taken)
            measures["cpu_seconds"].append(2 * time_taken / costs[name])
            measures["loss"].append(5.5)
    record.sessions.append(pairs)
    return record


def line_of(key: str, cost: float, **sizes) -> Line:
    return next(line for line in lines(record_of({**COSTS, key: cost}, **sizes)) if line.key == key)


@pytest.mark.parametrize(
    ("key", "cost", "noise", "expected"),
    [
        ("headwise", 1.005, 0.01, "met"),
        ("headwise", 1.015, 0.01, "missed"),
        ("headwise", 1.010, 0.01, "not separable"),
        ("headwise", 1.005, 0.10, "not separable"),
        ("elementwise", 1.078, 0.01, "met"),  # 7.4 % of the FLOPs and 1 % are allowed
        ("elementwise", 1.090, 0.01, "missed"),
        ("elementwise", 1.084, 0.02, "not separable"),
        (TWIN, 1.000, 0.01, "met"),
        (TWIN, 1.010, 0.01, "missed"),
        (TWIN, 0.990, 0.01, "missed"),
    ],
)
def test_the_verdict_on_a_known_cost(key: str, cost: float, noise: float, expected: str) -> None:
    line = line_of(key, cost, pairs=100, noise=noise)
    assert line.verdict == expected, line
    assert line.wall.low <= 100 * (cost - 1) <= line.wall.high
    assert line.cpu.low <= 0 <= line.cpu.high, "processor time is read apart"


def test_a_gate_is_compared_with_the_mean_of_base_and_twin() -> None:
    """A twin that is slower by 2 % takes 1 % off what is added."""
    costs = {BASE: 1.0, TWIN: 1.02, "headwise": 1.0302}
    by_key = {line.key: line.wall.centre for line in lines(record_of(costs, pairs=3, noise=0))}
    assert by_key == {TWIN: pytest.approx(2.0), "headwise": pytest.approx(100 * (1.0302 / 1.02**0.5 - 1))}


def test_the_share_of_flops_is_the_weights() -> None:
    line, model = line_of("elementwise", 1.05, pairs=7), SHAPES["S"].model
    gate = 6 * 4 * 512 * 512
    per_layer = 512 * (2 * 512 + 2 * 128) + 32 * 512 + 4 * 3 * 512 * 256
    base = 6 * (4 * per_layer + model.vocab_size * 512) + 6 * 4 * 512 * 512
    assert line.flops == pytest.approx(100 * gate / base)
    assert line.target == pytest.approx(line.flops + 1)
    assert line_of("headwise", 1.0, pairs=7).target == 1.0


def test_neighbours_and_orders_are_balanced() -> None:
    assert cycle(GATES) == [BASE, "headwise", TWIN, "elementwise"] and cycle(["headwise"]) == [BASE, "headwise", TWIN]
    orders = turns(list("abcd"))
    for position in range(4):
        assert sorted(order[position] for order in orders) == sorted(2 * "abcd")
    follows = [one + other for order in orders for one, other in zip(order, order[1:], strict=False)]
    assert all(follows.count(pair) == 3 for pair in ("ab", "ba", "bc", "cb", "cd", "dc", "da", "ad"))


def measured(record: Record, *, seconds: float = LIMIT_S, **options) -> list[int]:
    """Study the synthetic steps; returns the pairs at each save."""
    saved: list[int] = []
    options = {"pairs": 400, "half_width": 0.7, **options}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    deadline = time.monotonic() + seconds
    study(record, deadline=deadline, save=lambda now: saved.append(now.pairs), target="test_tools_benchmark:synthetic", **options)
    return saved


def test_a_study_ends_when_its_intervals_are_narrow() -> None:
    record = Record.empty(CONDITIONS, GATES)
    saved = measured(record, half_width=0.4)
    assert saved == list(range(1, record.pairs + 1)), "saved after every pair"
    assert widest_half(record) <= 0.4 and MIN_PAIRS <= record.pairs < 400
    for measures in record.numbers.values():
        for values in measures.values():
            del values[-1]
    record.sessions[-1] -= 1
    assert widest_half(record) > 0.4, "it went on no longer than it must"


def test_a_study_needs_some_pairs_whatever_their_interval() -> None:
    record = Record.empty(CONDITIONS, ["headwise"])
    measured(record, half_width=90.0)
    assert record.pairs == MIN_PAIRS


def test_a_study_ends_at_its_pairs_and_in_several_processes() -> None:
    record = Record.empty(CONDITIONS, GATES)
    measured(record, half_width=0.001, pairs=SESSION + 3)
    assert record.sessions == [SESSION, 3]
    measured(record, half_width=0.001, pairs=SESSION + 5)
    assert record.sessions == [SESSION, 3, 2] and record.pairs == len(record.numbers[TWIN]["loss"])
    assert not measured(record, half_width=0.001, pairs=SESSION), "there are more already"
    assert not measured(record, half_width=0.001, pairs=400, seconds=-1.0)


def test_a_record_is_resumed_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record_of(COSTS, pairs=4).write(path)
    again = Record.empty(CONDITIONS, GATES)
    again.resume(path)
    assert again == record_of(COSTS, pairs=4)
    assert [child.name for child in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": {**CONDITIONS, "machine": "other"}}, "machine = other, this run has one"),
        ({"conditions": {**CONDITIONS, "shape": "L"}}, "shape = L, this run has S"),
        ({"conditions": {**CONDITIONS, "code": "123"}}, "code = 123"),
        ({"sessions": [5]}, "not complete rounds"),
        ({"numbers": {BASE: {"seconds": [1.0] * 4}}}, "the same --rows"),
        ({"other": 1}, "no record of this command"),
    ],
)
def test_another_study_is_not_resumed(tmp_path: Path, change: dict, message: str) -> None:
    path, record = tmp_path / "record.json", record_of(COSTS, pairs=4)
    path.write_text(json.dumps({**vars(record), **change}))
    fresh = Record.empty(CONDITIONS, GATES)
    with pytest.raises(RunError, match=message):
        fresh.resume(path)
    assert fresh.pairs == 0


def test_models_of_one_process_see_the_same_tokens_and_twins_are_equal() -> None:
    work = alternating("tiny", {BASE: None, "headwise": "headwise", TWIN: None})
    first, second = work(), work()
    for note in (first, second):
        assert note[f"{BASE}.loss"] == note[f"{TWIN}.loss"] != note["headwise.loss"]
        assert all(note[f"{name}.{measure}"] > 0 for name in (BASE, "headwise", TWIN) for measure in ("seconds", "cpu_seconds"))
    assert first[f"{BASE}.loss"] != second[f"{BASE}.loss"], "new tokens"


# ---- processes in turns


def test_rounds_are_complete_and_warm_up_is_not_counted() -> None:
    entrants = [entrant("a", "counting", start=0, warmup=2), entrant("b", "counting", start=100)]
    series = run_rounds(entrants, rounds=3, deadline=soon())
    assert [note["value"] for note in series["a"].notes] == [3, 4, 5]
    assert [note["value"] for note in series["b"].notes] == [101, 102, 103]
    assert all(0.01 <= s < 5.0 for s in series["a"].seconds + series["b"].seconds)
    assert series["a"].peak_rss > 1_000_000
    assert all(gone(one.notes[0]["pid"]) for one in series.values())


def test_a_failure_is_told_with_the_end_of_its_output() -> None:
    with pytest.raises(RunError, match=r"(?s)'bad' ended with exit code 1.*no such thing"):
        run_rounds([entrant("good", "counting", start=0), entrant("bad", "failing")], rounds=1, deadline=soon())


def test_the_limit_ends_a_stuck_entrant_and_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    entrants = [entrant("quick", "counting", start=0), entrant("stuck", "stuck", pids=str(pids))]
    series = run_rounds(entrants, rounds=5, deadline=time.monotonic() + 3)
    assert series["quick"].seconds == series["stuck"].seconds == [], "an incomplete round does not count"
    assert all(gone(int(pid)) for pid in pids.read_text().split())


# ---- the command


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    for command in (["--help"], ["gate", "--help"], ["step", "--help"]):
        start = time.monotonic()
        result = run(*command, PYTHONPATH=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert time.monotonic() - start < 5  # 0.1 s, and a busy machine
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


def test_a_small_study_ends_with_a_table_and_is_continued(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = ["gate", "--shape", "tiny", "--rows", "headwise", "--threads", "1", "--json", str(record), "--pairs"]
    assert (result := run(*command, "2")).returncode == 0, result.stderr
    result = run(*command, "3", "--resume")
    assert result.returncode == 0, result.stderr
    out = result.stdout.splitlines()
    table = [[cell.strip() for cell in line.split("|")] for line in out if line.startswith("| ")]
    assert [len(cells) for cells in table] == [10] * 3
    assert [cells[4] for cells in table] == ["pairs", "3", "3"]
    assert table[1][1].startswith("A/A") and table[2][1] == "headwise gate, G1 (`headwise`)"
    assert table[2][7:9] == ["<= 1.00", "not separable"], "three pairs have no interval"
    assert "3 pairs in 2 processes" in out[0] and "torch" in out[0]
    assert out[-1].strip() == f"python tools/benchmark.py {' '.join([*command, '3', '--resume'])}"
    held = json.loads(record.read_text())
    assert held["sessions"] == [2, 1] and [len(model["seconds"]) for model in held["numbers"].values()] == [3] * 3


def test_bad_options_of_a_study_are_told_before_anything_is_written(tmp_path: Path) -> None:
    there, damaged = tmp_path / "there.json", tmp_path / "damaged.json"
    there.write_text("{}")
    damaged.write_text('{"conditions"')
    for options, message in [
        (["--rows", "headwise,fast"], "no row fast; there are headwise, elementwise"),
        (["--resume"], "needs --json"),
        (["--json", str(there)], "exists; give --resume"),
        (["--json", str(damaged), "--resume"], "no record of this command"),
        (["--json", str(tmp_path / "no" / "file")], "no folder"),
        (["--half-width", "0"], "--half-width"),
        (["--half-width", "nan"], "--half-width"),
        (["--pairs", "0"], "--pairs"),
        (["--seconds", "-1"], "--seconds"),
    ]:
        result = run("gate", "--shape", "tiny", *options)
        assert (result.returncode, result.stdout) == (2, ""), options
        assert message in result.stderr and "Traceback" not in result.stderr
    assert there.read_text() == "{}" and damaged.read_text() == '{"conditions"'
    assert len(list(tmp_path.iterdir())) == 2


def test_a_study_without_a_pair_says_so() -> None:
    result = run("gate", "--shape", "tiny", "--rows", "none", "--seconds", "0.01")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no pair was complete after 0.01 s" in result.stderr


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
    while not all(gone(child.pid) for child in children):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.05)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
