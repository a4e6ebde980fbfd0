"""`tools/benchmark.py gate`: its statistics and verdicts on series whose truth is known, its stop rule, resumption, and a small run."""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

import pytest
from test_tools_benchmark import LIMIT_S, run

from megagate.analysis.benchmark.gate import BASE, GATES, MIN_PAIRS, SESSION, TWIN, Line, Record, cycle, lines, study, widest_half
from megagate.analysis.benchmark.paired import paired_shift
from megagate.analysis.benchmark.step import SHAPES
from megagate.analysis.benchmark.step_plain import alternating, turns
from megagate.errors import RunError

COSTS = {BASE: 1.0, TWIN: 1.0, "headwise": 1.03, "elementwise": 1.05}
CONDITIONS = {"shape": "S", "threads": 1, "machine": "one"}


@pytest.fixture(autouse=True)
def _this_file_is_importable(monkeypatch) -> None:
    """By the processes of a study."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def synthetic(shape: str, gates: dict[str, str | None], first: int):
    """Steps that take no time: a moody machine, noise of 1 %, and a headwise gate that costs 3 %."""
    draw = random.Random(os.getpid())

    def work() -> dict[str, float]:
        mood = draw.choice([1.0, 1.0, 1.5])
        times = {name: mood * COSTS[name] * math.exp(draw.gauss(0, 0.01)) for name in gates}
        return {f"{name}.{measure}": time for name, time in times.items() for measure in ("seconds", "cpu_seconds", "loss")}

    return work


# ---- statistics


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


# ---- the study


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


@pytest.mark.parametrize("key", [TWIN, *GATES])
def test_without_an_interval_there_is_no_verdict(key: str) -> None:
    assert line_of(key, 1.0, pairs=6).verdict == "not separable"


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
    deadline = time.monotonic() + seconds
    study(record, deadline=deadline, save=lambda now: saved.append(now.pairs), target="test_tools_benchmark_gate:synthetic", **options)
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


# ---- the command


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
    assert [cells[3] for cells in table] == ["half-width", "-", "-"] and "[" not in table[2][2], "three pairs have no interval"
    assert table[2][7:9] == ["<= 1.00", "not separable"]
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
