"""A mean of few paired values with its 95 % intervals: Student's, and a seeded bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

RESAMPLES, SEED = 10_000, 1234
LEAST = 3
"""Values below which no claim is made of an interval."""


@dataclass(frozen=True)
class Interval:
    """A mean and two intervals of 95 %, each None below two values.

    Args:
        n: Values.
        mean: Of them; None where there is none.
        low: Of Student's t-interval.
        high: The same.
        boot_low: Of the percentile bootstrap of the mean; with n values there are only C(2n - 1, n) different resamples, 10 for n = 3.
        boot_high: The same.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    boot_low: float | None
    boot_high: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        around = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.mean:+.3f}{around}, n={self.n}"


def interval(values: Sequence[float | None]) -> Interval:
    """Of those values that are there, in any order: the same bits for each."""
    there = sorted(value for value in values if value is not None)
    n = len(there)
    if n < 2:
        return Interval(n, there[0] if n else None, None, None, None, None)
    mean = fmean(there)
    half = t_975(n - 1) * stdev(there) / math.sqrt(n)
    draws = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(np.array(there)[draws].mean(axis=1), [0.025, 0.975])
    return Interval(n, mean, mean - half, mean + half, float(low), float(high))


def t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many whole degrees of freedom, by bisection of `_within`."""
    low, high = 1.9, 12.8
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t).

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
