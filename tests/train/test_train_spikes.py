"""Loss spikes: the rule against an independent one, what it finds and leaves alone, and the same in a run that is killed and goes on."""

import json
import logging
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
from megagate.data.loader import TrainLoader
from megagate.data.synthetic import SyntheticSplit
from megagate.train.curve import read_curve
from megagate.train.spike_watch import SpikeWatch
from megagate.train.spikes import RULE, SpikeDetector


def events(losses: np.ndarray) -> list[int]:
    return [spike.index for spike in SpikeDetector().take(losses)]


def by_the_rule(losses: list[float]) -> list[tuple[int, float]]:
    """The rule's text in plain Python, one loss after the other."""
    before, event, quiet, found = [], [], 10, []
    for index, loss in enumerate(losses):
        excess, lines = None, {}
        for n in (24, 48, 128) if len(before) >= 48 and loss > before[-1] else ():
            window = before[-n:]
            which, n = n, len(window)
            half = n // 2
            slope = (median(window[-half:]) - median(window[:half])) / (n - half)
            rest = [value - slope * at for at, value in enumerate(window)]
            level = median(rest)
            lift = max(0.0, median(rest[-max(1, n // 6) :]) - level)
            distinct = sorted(set(before[-128:]))
            step = min((b - a for a, b in zip(distinct, distinct[1:], strict=False)), default=0.0)
            sigma = max(1.4826 * median(abs(value - level) for value in rest), step / 2, 1e-7 * max(map(abs, before[-128:])))
            above = loss - (level + lift + slope * n)
            lines[which] = above / sigma
            k = 7.5 if which == 24 else 3.7 * (1 + 14 / n)
            if above > k * sigma and (which < 128 or lines[48] > 3.5):
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


def test_the_shortest_line_is_the_rules_too() -> None:
    at = np.arange(150)
    losses = 8 * np.exp(-at / 60) + 0.01 * np.random.default_rng(6).standard_normal(150)
    losses[range(60, 150, 12)] += np.linspace(0.05, 0.2, 8)
    assert events(losses) == [index for index, _ in by_the_rule(losses.tolist())]


def test_the_rule_tells_its_constants() -> None:
    told = ("n = 128 (", "n = 48 or n = 24;", "more than 3.5 sigma above the line of n = 48", "first 48", "1/6", "1.4826", "1e-07")
    told += ("K = 3.7 (1 + 14 / n), 4.10 and 4.78, but 7.5 for n = 24", "50 of one event", "10 losses", "1e+300")
    for constant in told:
        assert constant in " ".join(RULE.split()), constant


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


def test_a_bend_from_steep_to_flat_is_rarely_called_one() -> None:
    """The line of 128 alone calls one in half of these curves; and what it sees less of, the line of 24 finds."""
    at = np.arange(300)
    cosine = 2 + 4 * (1 + np.cos(np.pi * at / 300))
    draw = np.random.default_rng(3)
    called, found = 0, []
    for _ in range(60):
        losses = cosine + 0.02 * draw.standard_normal(300)
        called += len(events(losses))
        places = np.arange(70, 300, 45) + draw.integers(0, 30)
        places = places[places < 295]
        losses[places] = cosine[places] + 10 * 0.02
        found.extend(np.isin(places, events(losses)))
    assert called <= 12, "about one in twelve of the curves"
    assert np.mean(found) > 0.83


# The first 120 losses of a small model trained with 60 steps of warm-up, whose steep beginning ends at about step 25
REAL = """
8.3682 8.3569 8.3281 8.3104 8.2240 8.2050 8.0426 8.0484 7.9741 7.9644 7.8629 7.8011 7.7532 7.6040 7.5856 7.4918 7.4641 7.3573 7.2625 7.2133
7.1005 6.9665 7.0043 6.9102 6.9287 6.7343 6.7373 6.6118 6.7248 6.6990 6.9127 6.5591 6.7926 6.6568 6.7524 6.7357 6.6135 6.6983 6.7599 6.6766
6.7589 6.6327 6.6544 6.6447 6.6239 6.5253 6.5535 6.5451 6.8294 6.4840 6.6287 6.7241 6.6742 6.6922 6.6232 6.6031 6.5136 6.3540 6.4673 6.4450
6.5215 6.7052 6.2935 6.5048 6.2847 6.6487 6.5373 6.4180 6.3798 6.5299 6.3164 6.4028 6.1225 6.3028 6.2462 6.5314 6.5024 6.3277 6.2174 6.2215
6.4217 6.3835 6.3180 6.2121 6.4055 6.3133 6.2455 6.3960 6.2621 6.4738 6.4525 6.4170 6.3657 6.3385 6.4667 6.3782 6.2068 6.2073 6.0507 6.2720
6.1022 6.3323 6.2088 6.3462 6.2841 6.1472 6.1314 6.1736 6.0836 6.1165 6.4754 6.0887 6.4611 6.0822 6.0485 5.9076 5.9485 6.2874 6.2070 5.8969
"""


def test_the_end_of_a_warm_up_is_none() -> None:
    losses = np.array(REAL.split(), dtype=float)
    assert losses.size == 120 and events(losses) == []
    losses[100] += 1.5
    assert events(losses) == [100]


def test_the_first_are_not_judged() -> None:
    for index, found in ((47, []), (48, [48])):
        losses = 0.1 * np.random.default_rng(4).standard_normal(60)
        losses[index] += 5
        assert events(losses) == found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [0.0, 1e-320, 1e200, 1.7e308])
def test_losses_of_any_size_overflow_nothing(size: float) -> None:
    losses = size * np.where(AT % 2, 1.0, -1.0)
    losses[1_500] = 1.75e308
    losses[1_700:] *= -1
    for spike in SpikeDetector().take(losses):
        assert spike.excess > 0 and np.isfinite(spike.excess) and spike.excess / spike.sigma > 0
    assert events(losses) == ([1_500] if size < 1e300 else [])


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


def resumed(caplog: pytest.LogCaptureFixture, path: Path, step: int) -> tuple[SpikeWatch, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "megagate"):
        split = SyntheticSplit("train", vocab_size=16)
        loader = TrainLoader(split, seq_len=8, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1, seed=0)
        watch = SpikeWatch(path, step=step, loader=loader)
    return watch, caplog.text


def test_a_resume_without_its_history_says_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "metrics.jsonl has {} losses of the {} steps before this resume; none is looked for until there are 48"
    for content, step, known in ((None, 70, 0), ("", 70, 0), ("steps", 40, 30), ("steps", 30, None), ("steps", 0, None)):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text("".join(f'{{"step": {at}, "loss": 2.5}}\n' for at in range(1, 31)) if content else "")
        _, said = resumed(caplog, path, step)
        assert said == "" if known is None else text.format(known, step) in said, said
    assert "cannot be read (Is a directory)" in resumed(caplog, tmp_path, 70)[1]


def test_a_line_that_cannot_be_read_does_not_lose_the_others(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Of the records up to the last step as of those after it, which `MetricsFile` drops at its first."""
    path = tmp_path / "metrics.jsonl"
    losses = 2 + 0.05 * np.random.default_rng(5).standard_normal(71)
    losses[70] += 1
    lines = [json.dumps({"step": at, "loss": loss}) for at, loss in enumerate(losses[:70].tolist(), 1)]
    (whole,) = SpikeDetector().take(losses)
    for broken in ('{"step": 41, "lo', '{"step": 41, "loss": "x"}', "[1]", "\x00\x00", '{"step": -1, "loss": 1}'):
        for at in (0, 66):
            later = [json.dumps({"step": 71, "loss": 9.0}), broken, json.dumps({"step": 72, "loss": 9.0})]
            path.write_text("\n".join([*lines[:at], broken, *lines[at:], *later, ""]))
            watch, said = resumed(caplog, path, 70)
            assert f"2 records that cannot be read, left out (first: {path}: line {at + 1} " in said and "losses of the" not in said
            assert watch.look(71, float(losses[70])) == {"loss_spike": whole.excess}
    path.write_text("\n".join([*lines, '{"step": 71, "lo']))
    assert "1 record that was half written" in resumed(caplog, path, 70)[1]


def test_a_run_tells_them_and_a_killed_one_the_same(jobs: Jobs, tmp_path: Path) -> None:
    """Half of step 51 is noise, all before it one token again and again; the kill comes after it, the resume goes before it."""
    easy, noise = tmp_path / "easy", make_data(tmp_path / "noise")
    make_data(easy, vocab_size=512, constant=7)
    data = f"1 {easy} from 400 0.5 {easy} 0.5 {noise} from 408 1 {easy}"
    how = ("--data.path", data, "--train.steps", 54, "--checkpoint.every", 20, "--eval.every", 0, "--parallel.ep", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = jobs.run("--train.output_dir", whole, *how, world=2)
    lines = [line for line in job.text.splitlines() if "loss spike" in line]
    assert len(lines) == 1 and "step 51: loss spike: " in lines[0], job.text
    assert f"samples 400 to 407 (4 of {easy}, 4 of {noise})" in lines[0]
    records = metrics(whole)
    assert [record["step"] for record in records if "loss_spike" in record] == [51]
    curve = read_curve(whole / "metrics.jsonl")
    (spike,) = SpikeDetector().take(curve.losses)
    assert (curve.steps[spike.index], spike.excess) == (51, records[50]["loss_spike"])
    job = jobs.fork("--train.output_dir", killed, *how, world=2)
    job.until(lambda: steps_recorded(killed) >= 52)
    job.send(signal.SIGKILL)
    job.wait()
    assert Checkpoint.open(killed).step == 40 and steps_recorded(killed) < 54
    job = jobs.run("--train.output_dir", killed, *how, world=2)
    assert lines[0] in job.text.splitlines()
    assert numbers(metrics(killed)) == numbers(records)
    assert json.loads((killed / "metrics.jsonl").read_text().splitlines()[50])["loss_spike"] == records[50]["loss_spike"]
