"""Rows of a table, each some entrants driven in turns: what the subcommands of `tools/benchmark.py` that need files share.

Light: what a row measures is imported when it is measured, and runs in processes of its own.
"""

import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from megagate.analysis.benchmark.interleave import Entrant, Series, run_rounds
from megagate.analysis.benchmark.paired import Ratio
from megagate.errors import RunError

_PACKAGE = __package__
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Limits:
    """What every subcommand is told.

    Args:
        folder: Empty, for files; the caller removes it.
        rounds: Of each row; None for each row's own.
        deadline: On `time.monotonic`'s clock.
    """

    folder: Path
    rounds: int | None
    deadline: float


L = TypeVar("L", bound=Limits)


@dataclass(frozen=True)
class Line:
    """A line of the table: figures of both sides as text, how many times ours the peer's is, and whether the target is met, all of it.

    `times` is None where the peer did not do the same, `met` where the interval holds the target. `wall` is the time on the clock of both,
    where it is not what `ours` and `peer` say.
    """

    key: str
    title: str
    ours: str
    peer: str
    times: Ratio | None
    wall: str
    target: str
    met: bool | None


@dataclass
class Result:
    """What rows gave: lines, what has to be said beside them, and all numbers by row and entrant."""

    lines: list[Line] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    series: dict[str, dict[str, Series]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench(Generic[L]):
    """One row at work: what it is told, and where it puts what it finds."""

    key: str
    options: L
    rounds: int
    tell: Callable[[str], None]
    result: Result

    def run(
        self, entrants: Sequence[Entrant], *, after_round: Callable[[dict[str, Series]], bool] = lambda series: False
    ) -> dict[str, Series] | None:
        """Drives the entrants; None where time was up before a round was complete."""
        series = run_rounds(entrants, rounds=self.rounds, deadline=self.options.deadline, tell=self.tell, enough=after_round)
        done = len(next(iter(series.values())).seconds)
        if done < self.rounds:
            self.remark(f"time was up after {done} of {self.rounds} rounds.")
        self.result.series[self.key] = series
        return series if done else None

    def line(self, title: str, ours: str, peer: str, times: Ratio | None, *, wall: str = "-", target: str, met: bool | None) -> None:
        """Adds a line to the table; `times` is None where there is no peer, `met` where the interval holds the target."""
        self.result.lines.append(Line(self.key, title, ours, peer, times, wall, target, met))

    def remark(self, text: str) -> None:
        """Adds what has to be said beside it."""
        self.result.remarks.append(f"{self.key}: {text}")


@dataclass(frozen=True)
class Row(Generic[L]):
    """What is measured in the same turns; may be several lines of the table.

    Args:
        title: What it is.
        target: `module:function` of this package, called with a `Bench`.
        rounds: Without `--rounds`.
        bytes_needed: Of disk.
    """

    title: str
    target: str
    rounds: int
    bytes_needed: Callable[[L], float]


def measure(rows: Mapping[str, Row[L]], keys: Sequence[str], options: L, *, tell: Callable[[str], None]) -> Result:
    """Measure rows one after another, each beside its peer.

    Args:
        rows: By key, in the order of the table.
        keys: Those to measure.
        options: What is measured.
        tell: Gets a line of progress.

    Raises:
        MegagateError: There is no space or no input, a process failed, or both sides did not do the same.
    """
    require_space(options.folder, int(sum(rows[key].bytes_needed(options) for key in keys)))
    result = Result()
    for key, row in rows.items():
        if key in keys:
            module, function = row.target.split(":")
            bench = Bench(key, options, options.rounds or row.rounds, lambda text, key=key: tell(f"{key}: {text}"), result)
            getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)(bench)
    return result


def report(result: Result, head: str) -> list[str]:
    """Lines of markdown: the head, a row for each line, and the remarks."""
    rows = [
        f"{head}\n",
        "| row | ours | peer | peer / ours [95 %] | wall, ours / peer | target | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in result.lines:
        cells = [f"{line.title} (`{line.key}`)", line.ours, line.peer, str(line.times or "-"), line.wall, line.target]
        verdict = {True: "met", False: "missed", None: "-" if line.target == "-" else "open"}[line.met]
        rows.append(f"| {' | '.join([*cells, verdict])} |")
    return [*rows, "", *(f"- {remark}" for remark in result.remarks)]


def require_space(folder: Path, wanted: int) -> None:
    """Refuses to begin what would fill the disk.

    Raises:
        RunError: There is less space than wanted, in bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        sizes = f"{free / 1e9:.2f} GB free; these rows need {wanted / 1e9:.2f} GB"
        raise RunError(f"{folder} has {sizes}; choose another --folder, or fewer --rows")


def entrant(name: str, target: str, *, warmup: int = 0, **arguments: Any) -> Entrant:
    """A process of `target`, `module:function` of this package."""
    return Entrant(name, f"{_PACKAGE}.{target}", arguments, _QUIET, warmup)


def reaches(times: Ratio, wanted: float) -> bool | None:
    """Whether a ratio is at least what is wanted; None where its interval holds both answers."""
    if times.low is None or times.high is None:
        return times.median >= wanted
    return None if times.low < wanted <= times.high else times.low >= wanted


def single(numerator: float, denominator: float) -> Ratio:
    """A ratio of two figures that are not of rounds."""
    return Ratio(numerator / max(denominator, 1), None, None)
