"""Every sample of a run, worked out one after the other by the formulas as they are written down, beside what any layout reads."""

import random
from fractions import Fraction
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagate.config.blend_text import PERIOD, Weights, quotas_of
from megagate.data.blend import Blend
from megagate.data.hashing import IntArray, stable_key
from megagate.data.loader import TrainLoader
from megagate.data.permutation import KeyedPermutation
from megagate.data.split import Split, Windows

S, SEED = 4, 11


class Line:
    """A split of so many windows, whose tokens say which split and which place."""

    name = "train"

    def __init__(self, number: int, windows: int):
        self.number, self.tokens, self.vocab_size = number, (windows + 1) * S, 10**6
        self.fingerprint = f"line {number} of {windows}"
        self.stream = 10_000 * number + np.arange(self.tokens)

    def windows(self, seq_len: int, *, movable: bool) -> Windows:
        assert seq_len == S and movable
        line = self

        class OfLine(Windows):
            count = line.tokens // S - 1

            def read(self, index: IntArray, *, shift: int = 0) -> IntArray:
                return np.stack([line.stream[i * S + shift : i * S + shift + S + 1] for i in index.tolist()])

        return OfLine()


def one_by_one(lines: list[Line], weights: list[Weights], samples: int) -> IntArray:
    """[samples, s + 1] tokens: Megatron's greedy rule restarted at each change, each line on its own through its epochs."""
    counts, out = [0] * len(lines), []
    starts = {part.first: [Fraction(quota, PERIOD) for quota in quotas_of(part.values)] for part in weights}
    for sample in range(samples):
        if sample in starts:
            shares, slots = starts[sample], count()
            taken = [0] * len(lines)
        slot = next(slots)
        missing = [share * max(slot, 1) - had for share, had in zip(shares, taken, strict=True)]
        chosen = max((i for i, share in enumerate(shares) if share), key=lambda i: (missing[i], -i))
        line = lines[chosen]
        epoch, place = divmod(counts[chosen], line.tokens // S - 1)
        window = KeyedPermutation(line.tokens // S - 1, stable_key("order", SEED, epoch, line.fingerprint))[place]
        start = window * S + stable_key("border", SEED, epoch) % S
        out.append(line.stream[start : start + S + 1])
        taken[chosen] += 1
        counts[chosen] += 1
    return np.stack(out)


def steps_of(data: Split | Blend, *, gbs: int, mbs: int, dp: int, steps: list[int]) -> list[IntArray]:
    """[gbs, s + 1] tokens and last labels of some steps, in the order of their samples, put together from all ranks."""
    settings = {"seq_len": S, "global_batch_size": gbs, "micro_batch_size": mbs, "dp_size": dp, "seed": SEED}
    ranks = [TrainLoader(data, **settings, dp_rank=rank) for rank in range(dp)]
    found = []
    for step in steps:
        batches = [loader.step(step) for loader in ranks]
        both = [np.concatenate([batch.tokens, batch.labels[..., -1:]], axis=-1) for batch in batches]
        found.append(np.stack(both, axis=1).reshape(gbs, S + 1))  # [accumulation, dp, mbs, s + 1]
    return found


def blend_of(draw: random.Random, windows: list[int], changes: list[int]) -> tuple[list[Line], list[Weights], Blend]:
    lines = [Line(number, many) for number, many in enumerate(windows)]

    def some() -> tuple[Fraction, ...]:
        values = [Fraction(draw.choice([0, 1, 2, 5, 30])) for _ in lines]
        return tuple(values) if any(values) else (Fraction(1),) * len(lines)

    weights = [Weights(first, some()) for first in (0, *changes)]
    return lines, weights, Blend(lines, weights, names=[str(line.number) for line in lines])  # type: ignore[arg-type]


LAYOUTS = st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))


@settings(max_examples=60, deadline=None)
@given(
    layouts=st.lists(LAYOUTS, min_size=2, max_size=3),
    windows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    changes=st.sets(st.integers(1, 150), max_size=3).map(sorted),
    seed=st.integers(0, 1_000),
)
def test_any_layout_reads_the_samples_as_they_are_written_down(
    layouts: list[tuple[int, int, int]], windows: list[int], changes: list[int], seed: int
) -> None:
    """Across epochs, fewer windows than a step, weights that change within a step, micro-batch and ranks that change from step to step."""
    lines, weights, blend = blend_of(random.Random(seed), windows, changes)
    samples = 144
    expected = one_by_one(lines, weights, samples)
    for dp, mbs, accumulation in layouts:
        gbs = dp * mbs * accumulation
        steps = random.Random(seed).sample(range(samples // gbs), min(8, samples // gbs))  # any step, without those before it
        for step, found in zip(steps, steps_of(blend, gbs=gbs, mbs=mbs, dp=dp, steps=steps), strict=True):
            assert np.array_equal(found, expected[step * gbs : (step + 1) * gbs])


@pytest.mark.parametrize("windows", [1, 5, 23, 24, 25])
def test_steps_that_hold_more_than_an_epoch(windows: int) -> None:
    """24 samples a step; with 1 and 5 windows more epochs in one step than orders are kept."""
    line = Line(3, windows)
    expected = one_by_one([line], [Weights(0, (Fraction(1),))], 24 * 6)
    for dp, mbs in ((1, 24), (2, 3), (8, 1), (4, 6)):
        found = steps_of(line, gbs=24, mbs=mbs, dp=dp, steps=[5, 0, 3])  # type: ignore[arg-type]
        for step, rows in zip((5, 0, 3), found, strict=True):
            assert np.array_equal(rows, expected[step * 24 : step * 24 + 24])


def test_a_run_that_moves_to_another_layout_at_each_step_is_one_run() -> None:
    lines, weights, blend = blend_of(random.Random(1), [7, 30, 3], [17, 40, 95])
    expected = one_by_one(lines, weights, 12 * 12).reshape(12, 12, S + 1)
    for step, (dp, mbs) in enumerate([(1, 12), (2, 3), (4, 3), (12, 1), (3, 2), (1, 1), (6, 2), (2, 6), (4, 1), (1, 4), (3, 4), (6, 1)]):
        assert np.array_equal(steps_of(blend, gbs=12, mbs=mbs, dp=dp, steps=[step])[0], expected[step])
