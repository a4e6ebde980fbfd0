"""Loss spikes: records whose loss is far above what the losses before let expect. For `tools/find_spikes.py` and the trainer; no torch.

The rule (`RULE`) looks back only, and counts records, not steps, so that it does not matter how steps are spaced. Its constants are a
trade between spikes missed and false alarms. On white noise (60,000 windows) a loss is far above once in so many records; the other
columns say how many spikes are found whose loss is 5 sigma above the trend, or 5, 6, 8 sigma above where the noise would have put it:

| THRESHOLD | K | false alarms | at 5 | noise + 5 | noise + 6 | noise + 8 |
|---|---|---|---|---|---|---|
| 3.3 | 3.66, 4.26 | 1 in 1,600 | 99.7 % | 89 % | 98 % | 100 % |
| 3.7 (ours) | 4.10, 4.78 | 1 in 4,900 | 96 % | 80 % | 96 % | 99.97 % |
| 4.1 | 4.55, 5.30 | 1 in 15,000 | 82 % | 67 % | 91 % | 99.9 % |
| 4.5 | 4.99, 5.81 | 1 in 47,000 | 56 % | 53 % | 82 % | 99.6 % |

On a steep decay, where line and sigma are known worse, fewer are found: of noise + 6 sigma 80 %, of noise + 8 sigma 99 %, 250 records into
400 sigma * exp(-t / 200), and 50 % and 89 % 150 records into 400 sigma * exp(-t / 100). A curve without noise that never rises has no
event, whatever its shape, since a loss far above is above the one before. Tried and left: one window (100 losses see nothing on such
decays, 50 find a fifth less on flat noise), parabolas (they lose more to noise than they win on a decay), and the spread of the last 256
forecast errors (better on flat noise, blind for hundreds of records after a steep beginning).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

FloatArray = npt.NDArray[np.float64]

WINDOWS = (128, 48)
"""Losses that a record is compared with: many know line and noise well, few see less of a steep decay's curve, which counts as noise."""
LEAST = 20
"""The same at the beginning: the first records are not judged."""
THRESHOLD, SMALL_SAMPLES = 3.7, 14.0
"""K = THRESHOLD * (1 + SMALL_SAMPLES / n): the fewer losses, the less is known of line and noise."""
NEWEST = 6
"""The newest 1 / NEWEST of the window lifts the line where it lies above it, as on a convex decay."""
QUIET = 10
"""Records in a row below the threshold that end an event."""
LASTING = 50
"""Records of one event above the threshold after which this is the new level."""
RESOLUTION = 1e-7
"""Of fp32: the noise is at least this share of the loss."""

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_BLOCKS = (16, 4096)  # records judged at once, the least and the most


def threshold(n: int) -> float:
    """K for n losses."""
    return THRESHOLD * (1 + SMALL_SAMPLES / n)


_KS = " and ".join(f"{threshold(n):.2f}" for n in WINDOWS)
RULE = f"""\
a loss is far above when it is above the one before it and more than K sigma above the line through the n losses before it, for
n = {WINDOWS[0]} or n = {WINDOWS[1]} (at the beginning fewer, at least {LEAST}). The line has the slope from the median of their older half
to that of their newer half, and as many of them above as below it; where the median of their newest 1/{NEWEST} is above it, it is
lifted to that.
sigma is {_MAD_TO_SIGMA} times the median absolute deviation (MAD) from the line before it is lifted, at least half of the smallest step
between two of the {WINDOWS[0]}, and {RESOLUTION:g} of their size. K = {THRESHOLD} (1 + {SMALL_SAMPLES:g} / n): {_KS}.
Losses far above do not count among those before later ones, unless {LASTING} of one event are: then they are the new level. An event ends
with {QUIET} losses in a row that are not far above; it is told once, at its first, and `excess` is what that is above the line, in nats.
Losses are counted by record, so the spacing of steps does not matter; those that are not finite are left out."""


@dataclass(frozen=True)
class Spike:
    """The first record of an event.

    Args:
        index: Of the loss among those taken, counted from 0.
        excess: Above the line, nats.
        sigma: The noise around the line, nats.
    """

    index: int
    excess: float
    sigma: float


class SpikeDetector:
    """Takes losses in order and finds the events among them, see `RULE`. It does not matter in how many parts they come."""

    def __init__(self) -> None:
        self._before: FloatArray = np.empty(0)  # the window
        self._event: list[float] = []  # what is far above in the event under way, since the level is what it is
        self._quiet = QUIET  # losses since the newest that was far above
        self._taken = 0

    def take(self, losses: Sequence[float] | FloatArray) -> list[Spike]:
        """The events that begin in these losses, all finite, nats."""
        coming = np.asarray(losses, dtype=np.float64)
        assert np.isfinite(coming).all(), "losses that are not finite are left out by the caller"
        found, at, block = [], 0, _BLOCKS[0]
        while at < coming.size:
            # While the window grows each loss has a window of another length.
            many = block if self._before.size == WINDOWS[0] else 1
            part = coming[at : at + many]
            quiet, excess, sigma = _judge(self._before, part)
            self._keep(part[:quiet])
            at += quiet
            if quiet == part.size:
                block = min(2 * block, _BLOCKS[1])
                continue
            if self._rise(float(part[quiet])):
                found.append(Spike(self._taken + at, excess, sigma))
            at, block = at + 1, _BLOCKS[0]
        self._taken += coming.size
        return found

    def _keep(self, losses: FloatArray) -> None:
        self._before = np.concatenate([self._before, losses])[-WINDOWS[0] :]
        self._quiet += losses.size

    def _rise(self, loss: float) -> bool:
        """Take a loss that is far above; returns whether an event begins with it."""
        begins = self._quiet >= QUIET
        self._event = [loss] if begins else [*self._event, loss]
        self._quiet = 0
        if len(self._event) == LASTING:
            self._before, self._event = np.array(self._event), []
        return begins


def _judge(before: FloatArray, coming: FloatArray) -> tuple[int, float, float]:
    """How many losses come before the first that is far above, each judged by the `before.size` before it; excess and sigma of that."""
    if before.size < LEAST:
        return coming.size, 0.0, 0.0
    return min((_first(before, coming, n=n) for n in WINDOWS), key=lambda found: found[0])


def _first(before: FloatArray, coming: FloatArray, *, n: int) -> tuple[int, float, float]:
    """The same by the line through the newest n alone, or through all where there are fewer."""
    n = min(n, before.size)
    series = np.concatenate([before, coming])
    rows = np.flatnonzero(coming > series[before.size - 1 : -1])
    excess, sigma = _against_line(sliding_window_view(series[before.size - n :], n)[rows], coming[rows])
    for at in np.flatnonzero(excess > threshold(n) * sigma).tolist():
        row = int(rows[at])
        window = series[row : row + before.size]
        noise = max(float(sigma[at]), _smallest_step(window) / 2, RESOLUTION * float(np.abs(window).max()))
        if excess[at] > threshold(n) * noise:
            return row, float(excess[at]), noise
    return coming.size, 0.0, 0.0


def _against_line(windows: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """[rows, n] windows, [rows] losses that follow them -> [rows] what those are above the line, [rows] sigma without its least value."""
    n = windows.shape[1]
    half = n // 2
    older, newer = _median(windows[:, :half]), _median(windows[:, n - half :])
    slope = (newer - older) / (n - half)
    rest = windows - slope[:, None] * np.arange(n)
    level = _median(rest)
    rest -= level[:, None]
    sigma = _MAD_TO_SIGMA * _median(np.abs(rest))
    lift = np.maximum(_median(rest[:, -max(n // NEWEST, 1) :]), 0)
    return losses - (level + lift + slope * n), sigma


def _median(rows: FloatArray) -> FloatArray:
    """[rows, n] -> [rows]; the same bits for a row alone and among others."""
    low, high = (rows.shape[1] - 1) // 2, rows.shape[1] // 2
    ordered = np.partition(rows, (low, high), axis=1)
    return ordered[:, low] + (ordered[:, high] - ordered[:, low]) / 2


def _smallest_step(window: FloatArray) -> float:
    """Between two different losses: what they may have been rounded to; 0 where all are the same."""
    steps = np.diff(np.unique(window))
    return float(steps.min()) if steps.size else 0.0
