"""The loss of each step as a file of JSON lines tells it: `RUN/metrics.jsonl`, or what other programs write. No torch."""

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from megagate.errors import DataError

_WANTED, _MEND = "JSON lines, unpacked and in UTF-8", "mend or remove that line"


@dataclass(frozen=True)
class Curve:
    """Losses by step.

    Args:
        steps: Rising.
        losses: Of each step, nats; NaN for one that is not finite, which JSON holds as null.
        notes: What was left out, in words.
        lost: Steps that the file has and `steps` has not: a run that went back replaced them and has not done them again (yet).
    """

    steps: list[int]
    losses: list[float]
    notes: list[str]
    lost: int

    def finite(self) -> tuple[list[int], list[float]]:
        """Steps and losses of the records whose loss is finite."""
        keep = list(map(math.isfinite, self.losses))
        return list(compress(self.steps, keep)), list(compress(self.losses, keep))


def read_curve(path: Path, *, last_step: int | None = None) -> Curve:
    """Read the records that have both `step` and `loss`.

    A record whose step is not above the one before it is of a run that went back to a checkpoint: it takes the place of all from its step
    on. A last line that is half written is left out. Steps may have any spacing.

    Args:
        path: Of the file.
        last_step: Leave out what comes after this step, and any line that cannot be read, as a resume does.

    Raises:
        DataError: The file cannot be read. Without `last_step` also: there is no such record in it, or a line is no JSON object, or its
            step or loss is no number.
    """
    notes = _Notes()
    steps: list[int] = []
    losses: list[float] = []
    seen: set[int] = set()
    for number, line, last in _lines(path):
        try:
            record = _record(line, path, number)
            if "step" not in record or "loss" not in record:
                notes.add("without `step` or `loss`", f"line {number}")
                continue
            step, loss = _step(record["step"], path, number), _loss(record["loss"], path, number)
        except DataError as error:
            if last and not line.endswith(b"\n") and _parsed(line) is None:
                notes.add("that was half written when its run ended, left out", f"line {number}, the last")
            elif last_step is not None:
                notes.add("that cannot be read, left out", str(error))
            else:
                raise
            continue
        if last_step is not None and step > last_step:
            continue
        if steps and step <= steps[-1]:
            kept = bisect_left(steps, step)
            notes.add("that went back to an earlier step", f"step {step} in line {number} replaces {len(steps) - kept}", len(steps) - kept)
            del steps[kept:], losses[kept:]
        if not math.isfinite(loss):
            notes.add("whose loss is not finite", f"step {step}")
        seen.add(step)
        steps.append(step)
        losses.append(loss)
    if not steps and last_step is None:
        raise DataError(f"{path} holds no record with both `step` and `loss`; name a run's metrics.jsonl, or {_WANTED} with both keys")
    return Curve(steps, losses, notes.texts(), len(seen) - len(steps))


class _Notes:
    """Counts what is left out, and remembers where it was first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.replaced: Counter[str] = Counter()

    def add(self, what: str, where: str, replaced: int = 0) -> None:
        self.counts[what] += 1
        self.first.setdefault(what, where)
        self.replaced[what] += replaced

    def texts(self) -> list[str]:
        return [
            f"{many} record{'s' * (many > 1)} {what} (first: {self.first[what]}"
            f"{f'; {self.replaced[what]} replaced in all' * bool(self.replaced[what])})"
            for what, many in self.counts.items()
        ]


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(number, line, whether it is the last) of each line that is not empty."""
    before: tuple[int, bytes] | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if before is not None:
                    yield *before, False
                before = number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a run's metrics.jsonl") from error
    if before is not None:
        yield *before, True


def _parsed(line: bytes) -> Any:
    """None for what is no JSON, and for null."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # text that is not UTF-8, too
        return None


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    record = _parsed(line)
    if record is None:
        rule = "each line must be a JSON object; only the last may be half written"
        raise _refused(path, number, "is no JSON", rule, f"name a file of {_WANTED}" if number == 1 else _MEND)
    if not isinstance(record, dict):
        raise _refused(path, number, f"holds {_shown(record)}", "each line must be a JSON object with `step` and `loss`")
    return record


def _step(value: Any, path: Path, number: int) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise _refused(path, number, f"has the step {_shown(value)}", "a step must be a whole number of 0 or more")
    return int(value)


def _loss(value: Any, path: Path, number: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(path, number, f"has the loss {_shown(value)}", "a loss must be a number, or null where it was not finite")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _refused(path: Path, number: int, what: str, rule: str, remedy: str = _MEND) -> DataError:
    return DataError(f"{path}: line {number} {what}; {rule}; {remedy}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
