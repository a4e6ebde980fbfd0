"""Loss spikes: records whose loss is far above what the losses before let expect. For `tools/find_spikes.py` and the trainer; no torch.

The rule (`RULE`) looks back only, and counts records, not steps, so that it does not matter how steps are spaced. Its constants are a
trade between spikes missed and false alarms. On white noise (`_against_line` of 60,000 windows of 128 standard normals, and the share of a
normal distribution beyond the least loss far above) a loss is far above once in so many records; the other columns say how many spikes are
found whose loss is 5 sigma above the trend, or 5, 6, 8 sigma above where the noise would have put it:

| THRESHOLD | K of 128, 48 | false alarms | at 5 | noise + 5 | noise + 6 | noise + 8 |
|---|---|---|---|---|---|---|
| 3.3 | 3.66, 4.26 | 1 in 1,700 | 97 % | 85 % | 97 % | 99.98 % |
| 3.7 (ours) | 4.10, 4.78 | 1 in 4,400 | 95 % | 78 % | 95 % | 99.96 % |
| 4.1 | 4.55, 5.30 | 1 in 9,100 | 81 % | 67 % | 91 % | 99.9 % |
| 4.5 | 4.99, 5.81 | 1 in 14,400 | 58 % | 54 % | 83 % | 99.6 % |

Where a curve is steep for its noise, line and sigma are known worse and fewer are found; where it bends from steep to flat, there are false
alarms. Whole curves of 300 records (30 of each, 3 losses of each at the trend + 5, 8, 10 sigma; false events in 30 without any), and what
the two lines of 128 and 48 alone, from record 20 on, would do:

| curve, sigma | ours: at 5, 8, 10 | false | two lines: at 5, 8, 10 | false |
|---|---|---|---|---|
| flat, 0.02 | 94, 100, 100 % | 2 | 96, 100, 100 % | 2 |
| 6 exp(-t / 75), 0.05 | 64, 100, 100 % | 1 | 63, 100, 100 % | 2 |
| 6 exp(-t / 75), 0.02 | 42, 88, 98 % | 3 | 40, 77, 90 % | 2 |
| half a cosine from 10 to 2, 0.05 | 48, 99, 100 % | 0 | 44, 99, 100 % | 2 |
| half a cosine from 10 to 2, 0.02 | 26, 68, 90 % | 1 | 20, 47, 70 % | 11 |

Of 200 such cosines of 0.02, 8 % had a false event (two lines: 49 %); of 25 real runs of 600 steps 6 had an event (22, most of them at the
end of the warm-up). A curve without noise that never rises has no event, whatever its shape, since a loss far above is above the one
before. Tried and left: one window (100 losses see nothing on steep decays, 50 find a fifth less on flat noise), parabolas (they lose
more to noise than they win on a decay), and the spread of the last 256 forecast errors (better on flat noise, blind for hundreds of
records after a steep beginning).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

FloatArray = npt.NDArray[np.float64]

WINDOWS = (128, 48, 24)
"""Losses that a record is compared with: many know line and noise well, few see less of a steep decay's curve, which counts as noise."""
LEAST = WINDOWS[1]
"""The first records are not judged: the end of a warm-up looks like a spike to the few losses before it."""
THRESHOLD, SMALL_SAMPLES = 3.7, 14.0
"""K = THRESHOLD * (1 + SMALL_SAMPLES / n): the fewer losses, the less is known of line and noise."""
SHORTEST = 7.5
"""K of the shortest window, which is there for steep decays alone."""
BEND = 3.5
"""Sigma above the middle line too, or the longest has only not seen yet that the decay has become flatter."""
NEWEST = 6
"""The newest 1 / NEWEST of the window lifts the line where it lies above it, as on a convex decay."""
QUIET = 10
"""Records in a row below the threshold that end an event."""
LASTING = 50
"""Records of one event above the threshold after which this is the new level."""
RESOLUTION = 1e-7
"""Of fp32: the noise is at least this share of the loss."""
HUGE = 1e300
"""Losses beyond it count as it, and the noise is at least one by it, so that nothing overflows."""

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_BLOCKS = (16, 4096)  # records judged at once, the least and the most


def threshold(n: int) -> float:
    """K for n losses."""
    return SHORTEST if n == WINDOWS[-1] else THRESHOLD * (1 + SMALL_SAMPLES / n)


RULE = f"""\
a loss is far above when it is above the one before it and more than K sigma above the line through the n losses before it, for
n = {WINDOWS[0]} (fewer where there are fewer), n = {WINDOWS[1]} or n = {WINDOWS[2]}; by n = {WINDOWS[0]} only if it is more than {BEND} \
sigma above the line of n = {WINDOWS[1]}
too. The first {LEAST} are not judged. The line has the slope from the median of their older half to that of their newer half, and as many
of them above as below it; where the median of their newest 1/{NEWEST} is above it, it is lifted to that.
sigma is {_MAD_TO_SIGMA} times the median absolute deviation (MAD) from the line before it is lifted, at least half of the smallest step
between two of the {WINDOWS[0]}, and {RESOLUTION:g} of their size. K = {THRESHOLD} (1 + {SMALL_SAMPLES:g} / n), \
{threshold(WINDOWS[0]):.2f} and {threshold(WINDOWS[1]):.2f}, but {SHORTEST} for n = {WINDOWS[2]}.
Losses far above do not count among those before later ones, unless {LASTING} of one event are: then they are the new level. An event ends
with {QUIET} losses in a row that are not far above; it is told once, at its first, and `excess` is what that is above the line (of the
largest n that has it far above), in nats. Losses are counted by record, so the spacing of steps does not matter; those that are not finite
are left out, and those beyond {HUGE:g} count as that."""


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
        coming = np.clip(coming, -HUGE, HUGE)
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
    series = np.concatenate([before, coming])
    rows = np.flatnonzero(coming > series[before.size - 1 : -1])
    sizes = [min(n, before.size) for n in WINDOWS]
    lines = [_against_line(sliding_window_view(series[before.size - n :], n)[rows], coming[rows]) for n in sizes]
    excess, sigma = np.stack([line[0] for line in lines]), np.stack([line[1] for line in lines])
    for at in np.flatnonzero(_far_above(excess, sigma, sizes).any(axis=0)).tolist():
        row = int(rows[at])
        window = series[row : row + before.size]
        noise = np.maximum(sigma[:, at], max(_smallest_step(window) / 2, RESOLUTION * float(np.abs(window).max()), 1 / HUGE))
        by = _far_above(excess[:, at], noise, sizes)
        if by.any():
            line = int(by.argmax())
            return row, float(excess[line, at]), float(noise[line])
    return coming.size, 0.0, 0.0


def _far_above(excess: FloatArray, sigma: FloatArray, sizes: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[windows, ...] each -> the same shape: by which windows, of these sizes, a loss is far above."""
    far = np.stack([above > threshold(n) * noise for n, above, noise in zip(sizes, excess, sigma, strict=True)])
    far[0] &= excess[1] > BEND * sigma[1]
    return far


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
