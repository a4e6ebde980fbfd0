"""The loss of each step as a file of JSON lines tells it: `RUN/metrics.jsonl`, or what other programs write. No torch."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from megagate.errors import DataError


@dataclass(frozen=True)
class Curve:
    """Losses by step.

    Args:
        steps: Rising.
        losses: Of each step, nats; NaN for one that is not finite, which JSON holds as null.
        notes: What was left out, in words.
    """

    steps: list[int]
    losses: list[float]
    notes: list[str]

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
        last_step: Leave out what comes after this step, as a resume does.

    Raises:
        DataError: There is no such file, or no such record in it; a line that is no JSON object, or whose step or loss is no number.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    steps: list[int] = []
    losses: list[float] = []

    def note(what: str, where: str) -> None:
        counts[what] += 1
        first.setdefault(what, where)

    for number, record in _records(path, note):
        if "step" not in record or "loss" not in record:
            note("without `step` or `loss`", f"line {number}")
            continue
        step, loss = _step(record["step"], path, number), _loss(record["loss"], path, number)
        if steps and step <= steps[-1]:
            note("that went back to an earlier step", f"step {step} in line {number}; what it had from there on is replaced")
            while steps and steps[-1] >= step:
                steps.pop()
                losses.pop()
        if last_step is not None and step > last_step:
            continue
        if not math.isfinite(loss):
            note("whose loss is not finite", f"step {step}")
        steps.append(step)
        losses.append(loss)
    if not steps and last_step is None:
        raise DataError(f"{path} holds no record with both `step` and `loss`; name a run's metrics.jsonl, or JSON lines with both keys")
    return Curve(steps, losses, [f"{many} record{'s' * (many > 1)} {what} (first: {first[what]})" for what, many in counts.items()])


def _records(path: Path, note: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line that is not empty."""
    broken: tuple[int, str] | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if broken is not None:
                    break
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # text that is not UTF-8, too
                    broken = number, "" if line.endswith(b"\n") else str(error)
                    continue
                if not isinstance(record, dict):
                    raise _refused(path, number, f"holds {_shown(record)}", "each line must be a JSON object with `step` and `loss`")
                yield number, record
            else:
                if broken is not None and broken[1]:
                    note("that was half written when its run ended, left out", f"line {broken[0]}, the last")
                    broken = None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a run's metrics.jsonl") from error
    if broken is not None:
        raise _refused(path, broken[0], "is no JSON", "each line must be a JSON object; only the last may be half written")


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


def _refused(path: Path, number: int, what: str, rule: str) -> DataError:
    return DataError(f"{path}: line {number} {what}; {rule}; mend or remove that line")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
