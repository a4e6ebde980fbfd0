"""`tools/benchmark.py gate`: what the gate adds to a full training step, measured until the interval is narrow enough to say.

Pure: the steps themselves run in a process of their own (`step_plain.alternating`).

Method: all models live in one process and do the same step by turns: two equal models without a gate, the base and its twin, and between
them the gated ones. A pair is one round: log of a gated model's time over the geometric mean of base and twin, which takes a quarter off
the variance and costs no step more, for the twin runs anyway: its time over the base's is the method's own error, a row whose interval must
hold 0 (one in twenty does not by chance).

Why one process: in short runs twins in processes of their own and twins in one were alike within the noise (processor time, 16 pairs, two
runs each: -1.6 [-4.2, 0.4] and 0.6 [-2.1, 2.9] % apart, 2.5 [-1.9, 5.1] and 0.3 [-1.4, 2.9] % in one), so neither has the smaller bias that
could be shown. One process builds and warms up faster, and therefore can be replaced every `SESSION` rounds: where memory
lies, which stays as it is for a process's whole life and may favour one model, is then drawn again instead of being measured as cost, and
another model is built first (with the base always first the twin seemed 0.5 [0.1, 0.9] % slower in processor time, 265 pairs).
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megagate.analysis.benchmark import record as records
from megagate.analysis.benchmark.interleave import Entrant, Series, run_rounds
from megagate.analysis.benchmark.paired import Shift, paired_shift
from megagate.analysis.benchmark.step import SHAPES, Shape, gated
from megagate.config.count import flops_per_token
from megagate.errors import RunError

BASE, TWIN = "base", "twin"
GATES = ("headwise", "elementwise")
TITLES = {TWIN: "A/A: the base again", **{gate: f"{gate} gate, G1" for gate in GATES}}
SESSION = 40
MIN_PAIRS = 16
"""Before these an interval may be narrow by luck."""
Verdict = Literal["met", "missed", "not separable"]
_WARMUP = 3
_MEASURES = ("seconds", "cpu_seconds", "loss")
WORK = f"{__package__}.step_plain:alternating"
_STEP_FOLDERS = ("backend", "engine", "model", "nn", "parallel", "probe")


@dataclass
class Record:
    """What was measured so far: the numbers of every round by model and measure, and what they are only comparable under.

    Args:
        conditions: Shape, threads, machine and versions, and a digest of the code that is timed.
        numbers: `numbers[model][measure]` has one value per round; measures are `seconds`, `cpu_seconds` and `loss`.
        sessions: Rounds of each process.
    """

    conditions: dict[str, Any]
    numbers: dict[str, dict[str, list[float]]]
    sessions: list[int]

    @classmethod
    def empty(cls, conditions: Mapping[str, Any], gates: Sequence[str]) -> "Record":
        """Nothing yet."""
        models = cycle(gates)
        return cls(
            {**conditions, "code": records.code_digest(_STEP_FOLDERS)},
            {model: {measure: [] for measure in _MEASURES} for model in models},
            [],
        )

    @property
    def pairs(self) -> int:
        """Complete rounds."""
        return sum(self.sessions)

    def write(self, path: Path) -> None:
        """Replace the file."""
        records.write(path, vars(self))

    def resume(self, path: Path) -> None:
        """Take what the file holds.

        Raises:
            RunError: It is no such record, or was measured under other conditions.
        """
        try:
            other = Record(**json.loads(path.read_text()))
            same_length = {len(values) for model in other.numbers.values() for values in model.values()} == {other.pairs}
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(f"--json {path}: no record of this command ({error}); give another name") from error
        if other.numbers.keys() != self.numbers.keys() or not same_length:
            raise RunError(
                f"--json {path}: holds {', '.join(other.numbers)}, not complete rounds of {', '.join(self.numbers)};"
                " give the same --rows or another name"
            )
        records.require_same(path, other.conditions, self.conditions)
        self.numbers, self.sessions = other.numbers, other.sessions


@dataclass(frozen=True)
class Line:
    """What the table says of a row, all in %.

    Args:
        key: The model.
        wall: Overhead in wall time.
        cpu: Overhead in processor time, which others on the machine disturb less, and which does not see waiting.
        flops: The FLOPs added, share of the base's.
        target: The most that is allowed; for the twin 0, which the interval must hold.
        verdict: Of the wall time.
    """

    key: str
    wall: Shift
    cpu: Shift
    flops: float
    target: float
    verdict: Verdict


def study(
    record: Record,
    *,
    pairs: int,
    half_width: float,
    deadline: float,
    save: Callable[[Record], None] = lambda record: None,
    tell: Callable[[str], None] = lambda text: None,
    target: str = WORK,
) -> None:
    """Measure until every row's interval is narrow enough, there are enough pairs, or the time is over.

    The rule looks only at widths, never at where an interval lies, so that stopping by it does not favour a verdict.

    Args:
        record: Grows in place.
        pairs: Stop at these, with the record's own.
        half_width: Stop when no row's interval in wall time is wider, in %.
        deadline: On `time.monotonic`'s clock.
        save: Gets the record after every round.
        tell: Gets a line of progress.
        target: Makes the alternating steps.
    """
    conditions = record.conditions
    gates = {model: model if model in GATES else None for model in record.numbers}
    arguments = {"shape": conditions["shape"], "gates": gates}
    environment = {"OMP_NUM_THREADS": str(conditions["threads"])}

    def enough(series: dict[str, Series]) -> bool:
        _add(record, series[BASE].notes[-1])
        save(record)
        widest = widest_half(record)
        tell(f"{record.pairs} of at most {pairs} pairs, half-width {widest:.2f} %")
        return widest <= half_width

    while record.pairs < pairs and widest_half(record) > half_width and time.monotonic() < deadline:
        entrant = Entrant(BASE, target, {**arguments, "first": len(record.sessions)}, environment, _WARMUP)
        record.sessions.append(0)
        run_rounds([entrant], rounds=min(SESSION, pairs - record.pairs), deadline=deadline, enough=enough)
    record.sessions = [rounds for rounds in record.sessions if rounds]


def _add(record: Record, note: Mapping[str, float]) -> None:
    for model, measures in record.numbers.items():
        for measure, values in measures.items():
            values.append(note[f"{model}.{measure}"])
    record.sessions[-1] += 1


def widest_half(record: Record) -> float:
    """The largest half-width of the rows' wall times, in %; infinite before `MIN_PAIRS`."""
    if record.pairs < MIN_PAIRS:
        return math.inf
    return max(overhead(record.numbers, model, "seconds").half_width for model in record.numbers if model != BASE)


def lines(record: Record) -> list[Line]:
    """The table's lines; none before the first complete round."""
    if not record.pairs:
        return []
    shape = SHAPES[record.conditions["shape"]]
    found = []
    for model in record.numbers:
        if model != BASE:
            wall, cpu = overhead(record.numbers, model, "seconds"), overhead(record.numbers, model, "cpu_seconds")
            flops = added_flops(shape, model)
            target = {TWIN: 0.0, "headwise": 1.0}.get(model, flops + 1.0)
            found.append(Line(model, wall, cpu, flops, target, verdict(model, wall, target)))
    return sorted(found, key=lambda line: list(TITLES).index(line.key))


def overhead(numbers: Mapping[str, Mapping[str, Sequence[float]]], model: str, measure: str) -> Shift:
    """A model's time over the base's, less 1, in %: a gated one against base and twin, the twin against the base."""
    times, base, twin = ([math.log(value) for value in numbers[key][measure]] for key in (model, BASE, TWIN))
    against = base if model == TWIN else [(one + other) / 2 for one, other in zip(base, twin, strict=True)]
    shift = paired_shift([time - other for time, other in zip(times, against, strict=True)])
    return Shift(*(100 * math.expm1(value) for value in shift))


def added_flops(shape: Shape, model: str) -> float:
    """FLOPs that the model's gate adds, in % of the base's."""
    base = flops_per_token(shape.model, shape.seq_len)
    gate = model if model in GATES else None
    return 100 * (flops_per_token(gated(shape.model, gate), shape.seq_len) - base) / base


def verdict(model: str, wall: Shift, target: float) -> Verdict:
    """Whether the whole interval lies on one side of the target; for the twin, whether it holds it."""
    if not math.isfinite(wall.half_width):
        return "not separable"
    if model == TWIN:
        return "met" if wall.low <= target <= wall.high else "missed"
    if wall.high <= target:
        return "met"
    return "missed" if wall.low > target else "not separable"


def cycle(gates: Sequence[str]) -> list[str]:
    """The models in the order of a round, the twin opposite the base: each gated one beside one of them, and with two gates beside both."""
    half = (len(gates) + 1) // 2
    return [BASE, *gates[:half], TWIN, *gates[half:]]


def median_seconds(record: Record, model: str) -> float:
    """Of a step."""
    return statistics.median(record.numbers[model]["seconds"])


def table(record: Record, *, machine: str) -> list[str]:
    """Lines of markdown: what was measured where, and a row for each model beside the base."""
    shape = record.conditions["shape"]
    head = f"Shape {shape}, {SHAPES[shape].tokens} tokens a step, bf16; {record.pairs} pairs in {len(record.sessions)} processes"
    rows = [
        f"{head}; base step {median_seconds(record, BASE):.3f} s; {machine}.\n",
        "| row | overhead, % [95 %] | half-width | pairs | in CPU time, % [95 %] | share of FLOPs, % | target, % | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines(record):
        target = "holds 0" if line.key == TWIN else f"<= {line.target:.2f}"
        cells = [
            f"{TITLES[line.key]} (`{line.key}`)",
            interval(line.wall),
            f"{line.wall.half_width:.2f}" if line.wall.half_width < float("inf") else "-",
            str(record.pairs),
            interval(line.cpu),
            f"{line.flops:.2f}",
            target,
            line.verdict,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def interval(shift: Shift) -> str:
    """In words, without the interval where that is infinite."""
    bounds = f" [{shift.low:+.2f}, {shift.high:+.2f}]" if shift.half_width < float("inf") else ""
    return f"{shift.centre:+.2f}{bounds}"
