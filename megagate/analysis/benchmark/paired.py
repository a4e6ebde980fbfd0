"""Paired statistics of times taken in turns: a busy machine slows neighbours in one round alike, so their ratio holds."""

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 4000
SEED = 1234


class Ratio(NamedTuple):
    """A median ratio and its 95 % bootstrap interval; without one where there are fewer than three rounds."""

    median: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.median:.3f}{interval}"


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """The median over rounds of times[i] / base[i], with the percentile bootstrap interval over rounds.

    Args:
        times: One per round.
        base: The base's, of the same rounds.

    Raises:
        ValueError: The two do not pair.
    """
    ratios = [time / other for time, other in zip(times, base, strict=True)]
    if not ratios:
        raise ValueError("a ratio needs at least one round")
    middle = statistics.median(ratios)
    if len(ratios) < 3:
        return Ratio(middle, None, None)
    draw = random.Random(SEED)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return Ratio(middle, medians[round(0.025 * (RESAMPLES - 1))], medians[round(0.975 * (RESAMPLES - 1))])
