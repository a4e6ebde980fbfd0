"""Several data sets by weights: which one gives sample g, and which of its own samples that is, in O(1) for any g.

Megatron stores a table with an entry for every sample of the run. Here one period of the table is made and repeated: nothing grows with
the length of the run, and nothing is built on one rank for the others.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from megagate.config.blend_text import LAST_SAMPLE, PERIOD, Weights, quotas_of, require_rising
from megagate.data.hashing import IntArray, canonical_sha256
from megagate.data.split import Split
from megagate.errors import DataError

BLEND_VERSION = 1  # part of a blend's fingerprint: raise it when any schedule changes


def greedy_order(quotas: IntArray) -> npt.NDArray[np.intp]:
    """[P] the member of each slot of a period.

    Slot k goes to the member with the largest w * max(k, 1) - (its slots before k), where w = quota / P; the first wins ties. Members
    without a quota take no part.

    Why it repeats: the chosen member's deficit w * k - count is the largest, and deficits sum to 0, so it is not negative, and no member
    is ever a whole sample ahead of its share. After P slots none can then have more than its quota, hence each has it exactly.

    Why any window is even: let a_j be the largest mean that the j largest deficits ever have. If slot k goes to one of the j, their sum
    does not grow; if not, the chosen one's deficit was no smaller than theirs, and the sum grows by less than 1: a_j <= a_(j+1) + 1/j, and
    a_n = 0 for n members. So no member is more than 1 + 1/2 + ... + 1/(n - 1) samples behind. With less than 1 ahead and less than 0.62
    by rounding the weights, a window of 10,000 samples is less than 10 off for up to 2,000 members, the most that there may be. The tests
    find less than 4, and less than 6 in windows over a change of weights, whose two parts each have their own error.

    Source: Megatron-LM, megatron/core/datasets/helpers.cpp, build_blending_indices.
    """
    there = np.flatnonzero(quotas)
    steps = quotas[there]
    period = int(steps.sum())
    deficits = steps.copy()  # times P; of slot 0, as if it were slot 1
    order = np.zeros(period, dtype=np.intp)
    if there.size > 1:
        for slot in range(period):
            if slot > 1:
                deficits += steps
            chosen = deficits.argmax()
            deficits[chosen] -= period
            order[slot] = chosen
    return there[order]


class _Segment:
    """A stretch of the run under the same weights; its periods begin with it."""

    def __init__(self, first: int, quotas: IntArray, before: IntArray) -> None:
        self.first = first
        self.quotas = quotas
        self.before = before  # [members] samples that earlier segments took
        self.order = greedy_order(quotas)  # [P]
        self.prefix: IntArray = np.empty(self.order.size, dtype=np.int64)  # [P] slots of the same member before this one
        for member in np.flatnonzero(quotas):
            slots = np.flatnonzero(self.order == member)
            self.prefix[slots] = np.arange(slots.size)

    def lookup(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """[rows] samples of the run -> [rows] members and [rows] their own sample numbers."""
        periods, slots = np.divmod(samples - self.first, PERIOD)
        members = self.order[slots].astype(np.int64)
        return members, self.before[members] + periods * self.quotas[members] + self.prefix[slots]

    def counts(self, sample: int) -> IntArray:
        """[members] samples of each before this sample of the run."""
        periods, slot = divmod(sample - self.first, PERIOD)
        return self.before + periods * self.quotas + np.bincount(self.order[:slot], minlength=self.quotas.size)


class BlendSchedule:
    """Which member gives which sample of a run. Members go on counting where weights change, so that no sample of theirs comes twice.

    Args:
        weights: In the order of the samples from which they count, the first from 0; all with the same number of members.

    Raises:
        ConfigError: The samples do not rise from 0, or weights make no period (see `quotas_of`).
    """

    def __init__(self, weights: Sequence[Weights]) -> None:
        assert len({len(part.values) for part in weights}) == 1, "weights of different numbers of members"
        firsts = [part.first for part in weights]
        require_rising(firsts)
        self.members = len(weights[0].values)
        self._firsts = np.array(firsts, dtype=np.int64)
        self._segments: list[_Segment] = []
        before = np.zeros(self.members, dtype=np.int64)
        for part in weights:
            if self._segments:
                before = self._segments[-1].counts(part.first)
            self._segments.append(_Segment(part.first, np.array(quotas_of(part.values), dtype=np.int64), before))

    def lookup(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """Who gives these samples.

        Shapes: [rows] samples of the run, any order -> [rows] members, and [rows] which of the member's own samples each is; int64.
        """
        if self.members == 1:
            return np.zeros(samples.shape, dtype=np.int64), samples
        owners = np.searchsorted(self._firsts, samples, side="right") - 1
        members, own = np.empty_like(samples), np.empty_like(samples)
        for owner in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == owner)
            members[rows], own[rows] = self._segments[owner].lookup(samples[rows])
        return members, own

    def counts(self, sample: int) -> IntArray:
        """[members] how many samples each has given before this one of the run."""
        return self._segments[int(np.searchsorted(self._firsts, sample, side="right")) - 1].counts(sample)

    def history(self, samples: int) -> list[tuple[int, IntArray]]:
        """(first sample, [members] quotas) of all weights that the first `samples` samples of the run were drawn by; of at least one."""
        return [(part.first, part.quotas) for part in self._segments if part.first < max(samples, 1)]


class Blend:
    """Training splits of several data sets, by a schedule.

    Args:
        members: The splits, in the order of the weights.
        weights: See `BlendSchedule`.
        names: Of the members, for messages; a single one needs none.

    Raises:
        ConfigError: The weights cannot be used.
        DataError: Two members are the same data.
    """

    def __init__(self, members: Sequence[Split], weights: Sequence[Weights], *, names: Sequence[str]) -> None:
        self.members, self.names = tuple(members), tuple(names)
        self.schedule = BlendSchedule(weights)
        assert len(self.members) == self.schedule.members, f"{len(self.members)} members, {self.schedule.members} weights"
        prints = [member.fingerprint for member in self.members]
        for index, fingerprint in enumerate(prints):
            if fingerprint in prints[:index]:
                raise DataError(
                    f"data.path: {names[prints.index(fingerprint)]} and {names[index]} hold the same tokens (fingerprint"
                    f" {fingerprint[:12]}), which would be read twice in the same order; name one of them, with the sum of their weights"
                )

    @classmethod
    def of(cls, split: Split) -> "Blend":
        """A blend of one."""
        return cls([split], [Weights(0, (Fraction(1),))], names=[""])

    @property
    def tokens(self) -> int:
        """Of all members."""
        return sum(member.tokens for member in self.members)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides which member gives which sample; that of a single data set is its own."""
        return self.fingerprint_at(None)

    def weights_at(self, samples: int) -> list[dict[str, Any]]:
        """By which weights the first `samples` samples are drawn, as JSON: from which sample, and each set's name, fingerprint, slots."""
        return [
            {
                "from": first,
                "sets": [
                    {"name": self.names[index], "fingerprint": self.members[index].fingerprint, "slots": int(quotas[index])}
                    for index in np.flatnonzero(quotas)
                ],
            }
            for first, quotas in self.schedule.history(samples)
        ]

    def fingerprint_at(self, samples: int | None) -> str:
        """The fingerprint of the first `samples` samples of a run, which weights that count only from later samples do not change.

        A run may therefore go on under new weights, and with new data sets, from where it stands. None: of all samples.
        """
        parts = [
            [part["from"], [[one["fingerprint"], one["slots"]] for one in part["sets"]]]
            for part in self.weights_at(LAST_SAMPLE + 1 if samples is None else samples)
        ]
        if len(parts) == 1 and len(parts[0][1]) == 1:
            return str(parts[0][1][0][0])
        return canonical_sha256({"blend": BLEND_VERSION, "period": PERIOD, "parts": parts})
