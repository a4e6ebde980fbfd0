"""The rows of `tools/benchmark.py data`: start-up, samples, preprocessing and orders, beside Megatron's own code in the same turns.

Light: what loads numpy is imported when rows are measured (`data_reader.py`, `data_text.py`), and what is measured, Megatron's packages
among it, runs in processes of its own (`data_ours.py`, `data_megatron.py`).
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagate.analysis.benchmark.interleave import Entrant, Series, run_rounds
from megagate.analysis.benchmark.paired import Ratio

SAMPLED_DOCUMENTS = 2_000_000
"""At most so many with tokens that are really there."""
_PACKAGE = __package__
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        folder: Empty, for files; the caller removes it.
        documents: Of the made-up data set of `start`; that of `sample` has at most `SAMPLED_DOCUMENTS`.
        shards: Of the data set of many shards of `start`, of 10^10 tokens each.
        rounds: Of each row; None for each row's own.
        deadline: On `time.monotonic`'s clock.
        text: A `.jsonl` for `preprocess` and `workers`; None for the files of this Python.
        megabytes: Most of it, MB of 10^6.
        tokenizer: For `tools/preprocess_data.py`; None to train one on the text.
        gigatoken: Why its row is left out; empty to measure it.
    """

    folder: Path
    documents: int
    shards: int
    rounds: int | None
    deadline: float
    text: Path | None
    megabytes: float
    tokenizer: str | None
    gigatoken: str

    @property
    def sampled_documents(self) -> int:
        """Documents with tokens."""
        return min(self.documents, SAMPLED_DOCUMENTS)


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
class Bench:
    """One key of `ROWS` at work: what it is told, and where it puts what it finds."""

    key: str
    options: Options
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
class Row:
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
    bytes_needed: Callable[[Options], float]


ROWS: dict[str, Row] = {
    "start": Row("from files to the first sample", "data_reader:start", 5, lambda o: 25.0 * o.documents + 40_000 * o.shards),
    "sample": Row("one sample, warm", "data_reader:sample", 9, lambda o: 500.0 * o.sampled_documents),
    "preprocess": Row("text to shards", "data_text:preprocess", 5, lambda o: 6e6 * o.megabytes),
    "workers": Row("text to shards by two workers, beside one", "data_text:workers", 5, lambda o: 5e6 * o.megabytes),
    "permutation": Row("a place in an epoch's order", "data_reader:permutation", 9, lambda o: 0.0),
}
"""In the order of the table."""


def bytes_needed(keys: Sequence[str], options: Options) -> int:
    """Of disk, for these rows."""
    return int(sum(ROWS[key].bytes_needed(options) for key in keys))


def measure(keys: Sequence[str], options: Options, *, tell: Callable[[str], None]) -> Result:
    """Measure rows one after another, each beside its peer.

    Args:
        keys: Of `ROWS`.
        options: What is measured.
        tell: Gets a line of progress.

    Raises:
        DataError: There is no space, or no text.
        RunError: A process failed, or ids differ.
    """
    result = Result()
    for key, row in ROWS.items():
        if key in keys:
            module, function = row.target.split(":")
            bench = Bench(key, options, options.rounds or row.rounds, lambda text, key=key: tell(f"{key}: {text}"), result)
            getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)(bench)
    return result


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
