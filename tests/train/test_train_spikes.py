"""Loss spikes: the rule against an independent one, what it finds and leaves alone, and the same in a run that is killed and goes on."""

import json
import signal
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_data import make_data
from train_jobs import Jobs, metrics, numbers, steps_recorded

from megagate.checkpoint.store import Checkpoint
from megagate.train.curve import read_curve
from megagate.train.spikes import RULE, SpikeDetector


def events(losses: np.ndarray) -> list[int]:
    return [spike.index for spike in SpikeDetector().take(losses)]


def by_the_rule(losses: list[float]) -> list[tuple[int, float]]:
    """The rule's text in plain Python, one loss after the other."""
    before, event, quiet, found = [], [], 10, []
    for index, loss in enumerate(losses):
        excess = None
        for n in (128, 48) if len(before) >= 20 and loss > before[-1] else ():
            window = before[-n:]
            n = len(window)
            half = n // 2
            slope = (median(window[-half:]) - median(window[:half])) / (n - half)
            rest = [value - slope * at for at, value in enumerate(window)]
            level = median(rest)
            lift = max(0.0, median(rest[-max(1, n // 6) :]) - level)
            distinct = sorted(set(before[-128:]))
            step = min((b - a for a, b in zip(distinct, distinct[1:], strict=False)), default=0.0)
            sigma = max(1.4826 * median(abs(value - level) for value in rest), step / 2, 1e-7 * max(map(abs, before[-128:])))
            above = loss - (level + lift + slope * n)
            if excess is None and above > 3.7 * (1 + 14 / n) * sigma:
                excess = above
        if excess is None:
            before, quiet = [*before, loss], quiet + 1
            continue
        if quiet >= 10:
            event = []
            found.append((index, excess))
        event.append(loss)
        quiet = 0
        if len(event) == 50:
            before, event = event, []
    return found


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_rule_that_is_printed(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count = 900
    at = np.arange(count)
    losses = 2 + 3 * np.exp(-at / 80) + 0.05 * draw.standard_normal(count) + 0.5 * (at > 700) - 0.3 * (at > 300)
    for begin in draw.integers(20, count - 20, 25):
        losses[begin : begin + draw.integers(1, 16)] += draw.uniform(0.1, 0.9)
    if seed == 3:
        losses = np.round(losses, 1)
    found = SpikeDetector().take(losses)
    expected = by_the_rule(losses.tolist())
    assert len(expected) > 5
    assert [spike.index for spike in found] == [index for index, _ in expected]
    assert [spike.excess for spike in found] == pytest.approx([excess for _, excess in expected], rel=1e-9)


def test_the_rule_tells_its_constants() -> None:
    for constant in ("128", "48", "least 20", "1/6", "1.4826", "1e-07", "3.7 (1 + 14 / n): 4.10 and 4.78", "50 of one event", "10 losses"):
        assert constant in RULE, constant


def test_planted_spikes_are_found_and_noise_is_rarely_called_one() -> None:
    noise = np.random.default_rng(0).standard_normal(80_000)
    assert 6 <= len(events(noise)) <= 35, "one in 4,900 gives 16"
    noise = noise[:30_000]
    places = np.arange(200, noise.size, 150)
    shares = {}
    for name, planted in {"at 5": 5 - noise[places], "5": 5, "6": 6, "8": 8}.items():
        losses = noise.copy()
        losses[places] += planted
        shares[name] = np.isin(places, events(losses)).mean()
    assert shares == pytest.approx({"at 5": 0.96, "5": 0.80, "6": 0.957, "8": 0.9997}, abs=0.06)


def test_spikes_on_a_decay_are_found() -> None:
    """From 8 nats above its floor down, with noise of 0.02."""
    at = np.arange(2_000)
    for seed in range(5):
        losses = 2 + 8 * np.exp(-at / 300) + 0.02 * np.random.default_rng(seed).standard_normal(at.size)
        planted = list(range(150, 2_000, 150))
        losses[planted] += 0.02 * np.linspace(8, 40, len(planted))
        assert set(planted) <= set(events(losses)), seed


AT = np.arange(2_000.0)
LR = np.where(AT < 700, 1, np.where(AT < 1_400, 0.3, 0.1))
DECAYS = {
    **{f"exp {tau}": 2 + 8 * np.exp(-AT / tau) for tau in (1, 3, 10, 30, 100, 300, 1_000)},
    **{f"power {power}": 1.7 + 9 * (1 + AT) ** -power for power in (0.05, 0.1, 0.3, 0.5, 1, 2)},
    **{f"power {power} from afar": 1.7 + 9 * (1 + AT / 50) ** -power for power in (0.1, 0.5, 2)},
    "cosine": 3 + 2 * np.cos(np.pi * AT / AT.size),
    "line": 10 - AT / 400,
    "constant": np.full(AT.size, 2.345678),
    "warm-up": 11 - 8 * (1 - np.exp(-np.cumsum(np.minimum(AT / 200, 1)) / 300)),
    "drops of the learning rate": 2 + 6 * np.exp(-AT / 200) + 0.3 * LR,
    "a plateau, then a drop": np.where(AT < 500, 10.0, 2 + 8 * np.exp(-(AT - 500) / 40)),
    "two phases": 2 + 4 / (1 + np.exp((AT - 500) / 30)) + 3 / (1 + np.exp((AT - 1_200) / 100)),
}


@pytest.mark.parametrize("name", DECAYS)
def test_smooth_decays_have_none(name: str) -> None:
    curve = DECAYS[name]
    for stored in (curve, curve.astype(np.float32), np.round(curve, 4), np.round(curve, 2)):
        assert events(stored) == []
    noisy = sum(len(events(curve + 10.0**-k * np.random.default_rng(k).standard_normal(AT.size))) for k in range(1, 7))
    assert noisy <= 9, "of 12,000 records with noise of any size, 2.4 are to be expected"


def test_rounded_noise_is_none() -> None:
    """Where most losses are the same number, the spread is what they were rounded to."""
    draw = np.random.default_rng(1)
    losses = np.round(2 + 3e-4 * draw.standard_normal(5_000), 3)
    assert 0.05 < np.mean(losses != 2) < 0.15
    assert events(losses) == []
    assert events(np.where(AT == 1_500, 2 + 1e-6, 2.0).astype(np.float64)) == [1_500]
    assert events(np.where(AT == 1_500, 2 + 2e-7, 2.0).astype(np.float64)) == []


def test_an_event_is_told_once_and_a_new_level_is_no_event_for_ever() -> None:
    losses = 0.1 * np.random.default_rng(2).standard_normal(1_000)
    losses[200:230] += 3  # not yet a level
    losses[235:240] += 3  # the same event
    losses[300] += 2  # the window has not learnt of the event
    losses[600:] += 3  # a level
    losses[800] += 2
    assert events(losses) == [200, 300, 600, 800]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    cuts=st.lists(st.integers(0, 250), max_size=6),
)
def test_units_and_parts_do_not_matter(seed: int, scale: float, shift: float, cuts: list[int]) -> None:
    draw = np.random.default_rng(seed)
    losses = 3 * np.exp(-np.arange(250) / 100) + 0.1 * draw.standard_normal(250)
    losses[draw.integers(30, 250, 6)] += draw.uniform(0.2, 3, 6)
    whole = SpikeDetector().take(losses)
    assert events(scale * losses + shift) == [spike.index for spike in whole]
    excess = [spike.excess for spike in SpikeDetector().take(scale * losses + shift)]
    assert excess == pytest.approx([scale * spike.excess for spike in whole], rel=1e-6)
    detector, found = SpikeDetector(), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 250], strict=True):
        found += detector.take(losses[begin:end])
    assert found == whole, "to the bit"


def test_a_run_tells_them_and_a_killed_one_the_same(jobs: Jobs, tmp_path: Path) -> None:
    """Half of step 31 is noise, all before it one token again and again; the kill comes after it, the resume goes before it."""
    easy, noise = tmp_path / "easy", make_data(tmp_path / "noise")
    make_data(easy, vocab_size=512, constant=7)
    data = f"1 {easy} from 240 0.5 {easy} 0.5 {noise} from 248 1 {easy}"
    how = ("--data.path", data, "--train.steps", 36, "--checkpoint.every", 10, "--eval.every", 0, "--parallel.ep", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = jobs.run("--train.output_dir", whole, *how, world=2)
    lines = [line for line in job.text.splitlines() if "loss spike" in line]
    assert len(lines) == 1 and "step 31: loss spike: " in lines[0], job.text
    assert f"samples 240 to 247 (4 of {easy}, 4 of {noise})" in lines[0]
    records = metrics(whole)
    assert [record["step"] for record in records if "loss_spike" in record] == [31]
    curve = read_curve(whole / "metrics.jsonl")
    (spike,) = SpikeDetector().take(curve.losses)
    assert (curve.steps[spike.index], spike.excess) == (31, records[30]["loss_spike"])
    job = jobs.fork("--train.output_dir", killed, *how, world=2)
    job.until(lambda: steps_recorded(killed) >= 32)
    job.send(signal.SIGKILL)
    job.wait()
    assert Checkpoint.open(killed).step in (20, 30) and steps_recorded(killed) < 36
    job = jobs.run("--train.output_dir", killed, *how, world=2)
    assert lines[0] in job.text.splitlines()
    assert numbers(metrics(killed)) == numbers(records)
    assert json.loads((killed / "metrics.jsonl").read_text().splitlines()[30])["loss_spike"] == records[30]["loss_spike"]
