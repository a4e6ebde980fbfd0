"""The statistics of learning-rate studies: against hand-computed and brute-force references, and against planted effects."""

import itertools
import json
import math
import random
import statistics as plain
from typing import Any

import numpy as np
import pytest
from lr_studies import BASE, RATES, entry, facts, study

from megagate.analysis.lr.entries import Facts, Grid, Run
from megagate.analysis.lr.interval import interval, t_975
from megagate.analysis.lr.report import report_of
from megagate.analysis.lr.stats import Comparison, Statistics, best_rungs, interaction_of, statistics_of
from megagate.analysis.lr.verdict import attributions, cautions, verdicts_of, word_of
from megagate.errors import ConfigError, RunError

HIGH = (0.0, 0.0, 0.0, -0.1, -0.3)
ALIKE = (-0.2,) * 5
NONE = (0.0,) * 5


def _grid(of: Facts, runs: list[dict[str, Any]]) -> Grid:
    return Grid(of, [Run.from_json(run) for run in runs])


def _statistics(of: Facts, runs: list[dict[str, Any]]) -> Statistics:
    return statistics_of(_grid(of, runs))


def _pick(found: Statistics, variant: str, reference: str = "baseline") -> Comparison:
    return next(one for one in found.comparisons if (one.variant, one.reference) == (variant, reference))


def _planted(**effects: tuple[float, ...]):
    return lambda variant, rung: effects.get(variant, NONE)[rung]


def _words(of: Facts, runs: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    return {(one.variant, one.reference): one.word for one in verdicts_of(of, _statistics(of, runs))}


def _find(runs: list[dict[str, Any]], variant: str, rung: int, seed: int) -> dict[str, Any]:
    return next(run for run in runs if (run["variant"], run["lr"], run["seed"]) == (variant, RATES[rung], seed))


# From printed tables.
QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 29: 2.0452, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_975(freedom) == pytest.approx(quantile, abs=5.1e-5)


def test_an_interval_by_hand() -> None:
    found = interval([-0.147, None, -0.127, -0.229])
    assert (found.n, found.mean) == (3, pytest.approx(-0.167667, abs=1e-6))
    half = 4.302653 * math.sqrt((0.020667**2 + 0.040667**2 + 0.061333**2) / 2) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(-0.167667 - half, abs=1e-5), pytest.approx(-0.167667 + half, abs=1e-5))


def test_the_order_of_values_changes_no_bit_of_an_interval() -> None:
    values = [0.31, -0.12, 0.05, 0.9, 0.22, -0.47, 0.013]
    assert interval(values[::-1]) == interval([values[3], None, *values[:3], *values[4:]]) == interval(values)


def test_too_few_values_have_no_interval() -> None:
    assert interval([None, None]).mean is None
    one = interval([None, 0.25])
    assert (one.n, one.mean, one.low, one.high, one.boot_low, one.boot_high) == (1, 0.25, None, None, None, None)


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    values = [0.31, -0.12, 0.05, 0.9, 0.22]
    means = [plain.fmean(picked) for picked in itertools.product(values, repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = interval(values)
    assert found.boot_low == pytest.approx(low, abs=0.02)
    assert found.boot_high == pytest.approx(high, abs=0.02)


def test_a_gate_that_helps_only_at_high_rungs() -> None:
    of = facts()
    found = _statistics(of, study(of, _planted(headwise=HIGH), common=0.05))
    one = _pick(found, "headwise")
    for rung, effect in enumerate(HIGH):
        assert one.rungs[rung].gap.values == pytest.approx([effect] * 5, abs=1e-12)
    assert one.ladder.interval.mean == pytest.approx(-0.08)
    assert one.interaction.gap.values == pytest.approx([-0.2] * 5)
    assert (one.interaction.at_top.interval.mean, one.interaction.at_best.interval.mean) == pytest.approx((-0.2, 0.0), abs=1e-12)
    assert one.interaction.best == (8e-3,) * 5
    assert found.baseline_best == 8e-3


@pytest.mark.parametrize("draw", (0, 2, 3))  # at 1, elementwise falls into the 2.5 % that the next test counts
def test_verdicts_on_planted_effects(draw: int) -> None:
    of = facts(variants=("baseline", "headwise", "elementwise", "sandwich", "half"))
    plan = _planted(headwise=HIGH, elementwise=ALIKE, sandwich=(0.0, 0.0, 0.0, 0.2, 0.2))
    found = _words(of, study(of, plan, noise=0.02, draw=draw))
    assert found["headwise", "baseline"] == found["headwise", "half"] == "supported"
    assert found["elementwise", "baseline"] == "not separable"  # better by 0.2 everywhere, which is no stability
    assert found["sandwich", "baseline"] == "contradicted"
    assert found["half", "baseline"] == "not separable"


def test_a_gain_that_is_everywhere_alike_is_called_stability_as_rarely_as_its_interval_promises() -> None:
    of = facts(variants=("baseline", "headwise"))
    words = []
    for draw in range(400):
        runs = study(of, _planted(headwise=ALIKE), noise=0.1, draw=draw)
        words.append(word_of(interaction_of(_grid(of, runs), "headwise", "baseline").gap.interval))
    wrong = words.count("supported"), words.count("contradicted")
    assert all(2 <= count <= 20 for count in wrong), wrong  # 10 expected of each, 3 their standard error


def test_an_effect_of_the_control_is_not_credited_to_the_gate() -> None:
    of = facts(variants=("baseline", "headwise", "elementwise", "half"))
    plan = _planted(headwise=HIGH, elementwise=(0.0, 0.0, 0.0, -0.4, -0.6), half=HIGH)
    found = _statistics(of, study(of, plan, noise=0.02))
    verdicts = verdicts_of(of, found)
    words = {(one.variant, one.reference): one.word for one in verdicts}
    assert (words["headwise", "baseline"], words["headwise", "half"]) == ("supported", "not separable")
    headwise, elementwise = attributions(of, verdicts)
    assert headwise.startswith("headwise: more stable than baseline, and half cannot be told from it")
    assert headwise.endswith("(half over baseline: supported): not shown to be more than halving the attention branch does.")
    assert elementwise.startswith("elementwise: more stable than baseline and than half")


def test_seeds_that_are_missing_are_not_held_against_a_gate() -> None:
    of = facts(variants=("baseline", "headwise", "elementwise", "half"))
    plan = _planted(headwise=(0.0, 0.0, 0.0, -0.4, -0.6), elementwise=HIGH, half=(0.0, 0.0, 0.0, -0.4, -0.6))
    runs = study(of, plan, noise=0.02)
    headwise, elementwise = attributions(of, verdicts_of(of, _statistics(of, runs)))
    assert headwise.startswith("headwise: more stable than baseline, and half cannot be told from it")
    assert elementwise.startswith("elementwise: more stable than baseline, and half is more stable than it")
    runs = [run for run in runs if run["variant"] != "half" or run["seed"] < 2]
    said = attributions(of, verdicts_of(of, _statistics(of, runs)))
    assert said[0] == "headwise: more stable than baseline; too few seeds yet to tell it from half."


def test_a_variant_that_is_only_worse_at_low_rates_is_told() -> None:
    of = facts(variants=("baseline", "sandwich"))

    def line(**effects: tuple[float, ...]) -> str:
        (verdict,) = verdicts_of(of, _statistics(of, study(of, _planted(**effects), noise=0.02)))
        assert verdict.word == "supported"
        return verdict.line

    assert "at the top itself it is not shown to be better [" in line(sandwich=(0.3, 0.3, 0.3, 0.0, 0.0))
    assert line(sandwich=(0.3, 0.3, 0.3, 0.0, 0.0)).endswith("it loses less to high rates, from a higher loss.")
    assert "at the top itself" not in line(sandwich=HIGH)


def test_noise_hides_an_effect() -> None:
    of = facts()
    assert _words(of, study(of, _planted(headwise=HIGH), noise=1.0))["headwise", "baseline"] == "not separable"


def test_too_few_seeds_support_nothing() -> None:
    for seeds, word in (((0, 1), "not separable"), ((0, 1, 2), "supported")):
        of = facts(seeds=seeds)
        runs = study(of, _planted(headwise=HIGH), noise=1e-4)
        assert _words(of, runs)["headwise", "baseline"] == word
        lines = [one.line for one in verdicts_of(of, _statistics(of, runs))]
        assert all(line.endswith("; fewer than 3 seeds say nothing.") == (len(seeds) < 3) for line in lines)


def _reference_interaction(runs: list[dict[str, Any]], variant: str, reference: str, seed: int) -> float:
    """From the definition alone: two top rungs, the best rung of the other seeds among the three below."""
    loss = {(run["variant"], run["lr"], run["seed"]): run["val_loss"] for run in runs}
    others = [other for other in range(5) if other != seed]
    best = min(RATES[:3], key=lambda lr: sum(loss["baseline", lr, other] for other in others))
    gap = {lr: loss[variant, lr, seed] - loss[reference, lr, seed] for lr in RATES}
    return (gap[RATES[3]] + gap[RATES[4]]) / 2 - gap[best]


@pytest.mark.parametrize("draw", range(4))
def test_the_interaction_is_its_definition(draw: int) -> None:
    of = facts()
    runs = study(of, _planted(headwise=HIGH), noise=0.15, draw=draw)
    found = _statistics(of, runs)
    for one in found.comparisons:
        want = [_reference_interaction(runs, one.variant, one.reference, seed) for seed in range(5)]
        assert one.interaction.gap.values == pytest.approx(want, abs=1e-12)
        assert one.interaction.capped.values == pytest.approx(want, abs=1e-12)
    assert len(set(_pick(found, "headwise").interaction.best)) > 1 or draw != 0  # rungs that seeds choose differently were seen


def test_the_best_rung_is_not_chosen_by_a_seeds_own_luck() -> None:
    of, own, chosen = facts(variants=("baseline", "headwise")), [], []
    flat = dict.fromkeys(range(5), 0.0)
    for draw in range(400):
        runs = study(of, lambda variant, rung: -BASE[rung] + flat[rung], noise=0.1, common=0.0, draw=draw)
        grid = _grid(of, runs)
        for seed, rung in zip(of.seeds, best_rungs(grid), strict=True):
            chosen.append(grid.loss("baseline", rung, seed))
            own.append(min(grid.loss("baseline", low, seed) for low in of.lower))
    assert plain.fmean(own) < -0.07  # by its own luck: the baseline looks good there, so any variant looks bad there, and stable above
    assert abs(plain.fmean(chosen)) < 0.01  # 4.5 standard errors of 2,000


def test_diverged_pairs_are_counted_and_have_no_gap() -> None:
    of = facts()
    runs = study(of, _planted(headwise=HIGH), common=0.0)
    for variant, seed in (("baseline", 0), ("headwise", 1), ("baseline", 2), ("headwise", 2)):
        _find(runs, variant, 4, seed).update(status="diverged", val_loss=None, step=100)
    runs.remove(_find(runs, "headwise", 4, 3))
    found = _statistics(of, runs)
    one = _pick(found, "headwise")
    top = one.rungs[4]
    assert (top.lost.variant_diverged, top.lost.reference_diverged, top.lost.both_diverged, top.lost.missing) == (1, 1, 1, 1)
    assert top.gap.values == (None, None, None, None, pytest.approx(-0.3))
    assert one.ladder.values[:4] == (None,) * 4
    assert one.interaction.gap.values == (None, None, None, None, pytest.approx(-0.2))
    cap = math.log(256)
    base, gated = BASE[4], BASE[4] - 0.3
    want = [(-0.1 + gated - cap) / 2, (-0.1 + cap - base) / 2, (-0.1 + 0.0) / 2, None, -0.2]
    assert one.interaction.capped.values == (*(pytest.approx(value) for value in want[:3]), None, pytest.approx(-0.2))
    assert one.interaction.lost == 3
    assert (found.runs, found.planned, found.diverged) == (99, 100, 4)
    said = " ".join(cautions(of, found))
    assert "1 of 100 runs are missing" in said
    assert "4 runs diverged" in said


def test_whose_run_diverged_is_told() -> None:
    of = facts()
    runs = study(of, _planted())
    for variant, seed in (("headwise", 0), ("headwise", 1), ("headwise", 2), ("baseline", 3)):
        _find(runs, variant, 4, seed).update(status="diverged")  # one that was stopped may still have been evaluated
    top = _pick(_statistics(of, runs), "headwise").rungs[4]
    assert (top.lost.variant_diverged, top.lost.reference_diverged, top.lost.both_diverged, top.lost.missing) == (3, 1, 0, 0)
    assert top.gap.values == (None, None, None, None, 0.0)


def test_where_pairs_diverged_the_capped_interaction_decides() -> None:
    of = facts()
    runs = study(of, _planted(), noise=0.01)
    for seed in of.seeds:
        for rung in of.top:
            _find(runs, "baseline", rung, seed).update(status="diverged", val_loss=None)
    verdict = next(one for one in verdicts_of(of, _statistics(of, runs)) if (one.variant, one.reference) == ("headwise", "baseline"))
    assert (verdict.word, verdict.basis) == ("supported", "capped")
    assert "5 of 5 seeds lost a pair to divergence" in verdict.line
    # Survivors alone would say the opposite of what is known: of one pair of five, nothing follows.
    _find(runs, "baseline", 3, 0).update(status="finished", val_loss=9.0)  # above ln V: counts as ln V
    assert _pick(_statistics(of, runs), "headwise").interaction.capped.values[0] < -2


def test_a_baseline_that_diverged_everywhere_below_the_top_has_no_best_rung() -> None:
    of = facts(variants=("baseline", "headwise"))
    runs = study(of, _planted(), noise=0.01)
    for run in runs:
        if run["variant"] == "baseline":
            run.update(status="diverged", val_loss=None)
    found = _statistics(of, runs)
    (verdict,) = verdicts_of(of, found)
    assert found.baseline_best is None
    assert (verdict.word, verdict.interval.n) == ("not separable", 0)
    assert "minus gap at unknown (the baseline's best below): no seed has it" in verdict.line
    told = "the baseline diverged, or is at ln V, in all runs below the top: no rung is its best, so there is no interaction."
    assert told in cautions(of, found)
    _find(runs, "baseline", 0, 3).update(status="finished", val_loss=9.0)
    assert told in cautions(of, _statistics(of, runs)), "it finished, and knows nothing"
    _find(runs, "baseline", 1, 2).update(status="finished", val_loss=2.0)
    found = _statistics(of, runs)
    assert found.baseline_best == RATES[1]
    assert told not in cautions(of, found)
    assert _pick(found, "headwise").interaction.best == tuple(None if seed == 2 else RATES[1] for seed in of.seeds), "not by its own luck"


def test_pairs_that_diverged_on_both_sides_show_nothing_by_their_gap_at_lower_rates() -> None:
    of = facts(variants=("baseline", "headwise", "sandwich"))
    runs = study(of, _planted(headwise=(-0.1,) * 5, sandwich=(0.1,) * 5), noise=0.01)
    for run in runs:
        if run["lr"] in RATES[3:]:
            run.update(status="diverged", val_loss=None)
    for verdict in verdicts_of(of, _statistics(of, runs)):
        assert 0.0 not in (verdict.interval.low, verdict.interval.high) and verdict.interval.low * verdict.interval.high > 0
        assert (verdict.word, verdict.basis) == ("not separable", "capped")
        assert "(at the top alone +0.000 [+0.000, +0.000], n=5)" in verdict.line
        assert verdict.line.endswith("and 10 of the pairs at the top diverged on both sides, which tells neither from the other.")
    for run in runs:  # one that goes on where the other does not is told by it, whatever it was below
        if run["lr"] in RATES[3:] and run["variant"] == "sandwich":
            run.update(status="finished", val_loss=3.0 + 0.01 * run["seed"])
    assert _words(of, runs) == {("headwise", "baseline"): "not separable", ("sandwich", "baseline"): "supported"}


def test_fractions_and_the_largest_stable_rate() -> None:
    of = facts()
    runs = study(of, _planted(headwise=HIGH, sandwich=(0.5, 0.5, -0.3, -0.3, -0.3), half=(0.4,) * 5), common=0.0)
    _find(runs, "baseline", 3, 1).update(status="diverged", val_loss=None)
    found = {row.variant: row for row in _statistics(of, runs).rows}
    assert [(rung.collapsed, rung.diverged, rung.fraction) for rung in found["baseline"].rungs] == [
        (0, 0, 0.0), (0, 0, 0.0), (0, 0, 0.0), (0, 1, 0.2), (5, 0, 1.0)
    ]  # fmt: skip
    assert (found["baseline"].stable.lr, found["baseline"].stable.at_least, found["baseline"].stable.ratio) == (1.6e-2, False, "1 x")
    assert (found["headwise"].stable.lr, found["headwise"].stable.ratio) == (6.4e-2, "at least 4 x")
    assert (found["sandwich"].stable.lr, found["sandwich"].stable.at_least) == (6.4e-2, True)  # whatever lower rungs did
    assert (found["half"].stable.lr, found["half"].stable.ratio) == (None, "not defined: no rung of one of them is stable")
    at_the_bar = facts(collapsed_above=BASE[4])
    (base, *_) = _statistics(at_the_bar, study(at_the_bar, _planted(), common=0.0)).rows
    assert base.rungs[4].collapsed == 0, "above it, and not at it"
    runs.remove(_find(runs, "headwise", 4, 0))
    found = {row.variant: row for row in _statistics(of, runs).rows}
    # A seed was not run, and the four others stand.
    assert (str(found["headwise"].stable), found["headwise"].stable.ratio) == ("at least 0.032", "at least 2 x")
    _find(runs, "headwise", 4, 1).update(val_loss=5.0)
    found = {row.variant: row for row in _statistics(of, runs).rows}
    assert (str(found["headwise"].stable), found["headwise"].stable.ratio) == ("0.032", "2 x")  # whatever the fifth seed does


def test_what_missing_seeds_may_still_show_is_not_called_unstable() -> None:
    of = facts()
    runs = [run for run in study(of, _planted(half=(0.4,) * 5), common=0.0) if run["seed"] != 4]
    found = {row.variant: row.stable for row in _statistics(of, runs).rows}
    assert (str(found["baseline"]), found["baseline"].ratio) == ("not known yet", "not known yet: seeds are missing")
    assert (str(found["half"]), found["half"].ratio) == ("none", "not known yet: seeds are missing")
    runs += [run for run in study(of, _planted(), common=0.0) if run["seed"] == 4 and run["lr"] == 4e-3]
    found = {row.variant: row.stable for row in _statistics(of, runs).rows}
    assert (str(found["baseline"]), str(found["headwise"])) == ("at least 0.004",) * 2
    assert found["headwise"].ratio == "not known yet: seeds are missing"


def test_ratios_to_a_baseline_that_is_stable_everywhere() -> None:
    of = facts(collapsed_above=2.9)
    runs = study(of, _planted(headwise=(0.0, 0.0, 0.0, 0.0, 0.3)), common=0.0)
    found = {row.variant: row.stable.ratio for row in _statistics(of, runs).rows}
    assert found["headwise"] == "at most 0.5 x"
    assert found["sandwich"] == "not known: both are stable at the top rung"


def test_without_a_bar_only_divergence_counts() -> None:
    of = facts(collapsed_above=None)
    runs = study(of, _planted(), common=0.0)
    _find(runs, "headwise", 0, 0).update(status="diverged", val_loss=None)
    found = _statistics(of, runs)
    assert [rung.fraction for row in found.rows[:2] for rung in row.rungs] == [0.0] * 5 + [0.2] + [0.0] * 4
    assert any("sets no bar" in line for line in cautions(of, found))


def test_sensitivity_is_its_definition() -> None:
    of = facts()
    runs = study(of, _planted(headwise=HIGH, sandwich=(0.1, 0.1, -0.2, -0.2, -0.2)), noise=0.1)
    _find(runs, "headwise", 4, 1).update(status="diverged", val_loss=None)
    _find(runs, "headwise", 4, 2).update(val_loss=7.0)
    runs.remove(_find(runs, "sandwich", 0, 3))
    found = {row.variant: row for row in _statistics(of, runs).rows}
    cap = math.log(256)
    losses: dict[str, dict[int, list[float]]] = {variant: {seed: [] for seed in of.seeds} for variant in of.variants}
    for run in runs:
        losses[run["variant"]][run["seed"]].append(cap if run["val_loss"] is None else min(cap, run["val_loss"]))
    for variant, by_seed in losses.items():
        pooled_best = {seed: min(min(every[seed]) for every in losses.values()) for seed in of.seeds}
        whole = {seed: values for seed, values in by_seed.items() if len(values) == 5}
        own = [plain.fmean(whole[seed]) - min(whole[seed]) if seed in whole else None for seed in of.seeds]
        pooled = [plain.fmean(whole[seed]) - pooled_best[seed] if seed in whole else None for seed in of.seeds]
        for got, want in ((found[variant].own_best.values, own), (found[variant].pooled_best.values, pooled)):
            assert [value is None for value in got] == [value is None for value in want]
            assert [value for value in got if value is not None] == pytest.approx([value for value in want if value is not None])
    ladder = found["sandwich"].pooled_minus_baseline.values
    assert ladder[3] is None
    assert found["headwise"].own_best.values[1] > 0.5  # the diverged run


def test_a_variant_bad_everywhere_is_insensitive_only_by_its_own_best() -> None:
    of = facts()
    found = {row.variant: row for row in _statistics(of, study(of, lambda v, k: 0.6 - BASE[k] + 2.4 if v == "headwise" else 0.0)).rows}
    assert found["headwise"].own_minus_baseline.interval.mean == pytest.approx(-0.154)
    assert found["headwise"].pooled_minus_baseline.interval.mean == pytest.approx(0.446)


def test_activation_spikes_gates_and_sinks() -> None:
    of = facts()
    runs = study(of, _planted())
    for run in runs:
        if run["variant"] == "headwise":
            run.update(peak_hidden=run["peak_hidden"] / 8, spikes=2, first_token_attention=0.084)
    _find(runs, "headwise", 1, 0).update(status="diverged", val_loss=None, step=200, spikes=6, peak_hidden=1e30, gate_mean=0.9)
    _find(runs, "headwise", 2, 0).update(spikes=None, peak_hidden=None)
    for seed in of.seeds:
        _find(runs, "sandwich", 0, seed).update(first_token_attention=0.042)
    found = _statistics(of, runs)
    one, row = _pick(found, "headwise"), next(row for row in found.rows if row.variant == "headwise")
    assert one.rungs[0].activation.values == pytest.approx([-3.0] * 5)
    assert one.rungs[1].activation.values == (None, *[pytest.approx(-3.0)] * 4)  # no pair with a diverged run
    assert one.rungs[2].activation.values == (None, *[pytest.approx(-3.0)] * 4)
    assert row.rungs[0].spikes_per_1000 == pytest.approx(2.5)
    assert row.rungs[1].spikes_per_1000 == pytest.approx(1000 * 14 / 3400)
    assert row.rungs[2].spikes_per_1000 == pytest.approx(2.5)
    assert row.rungs[1].levels["gate_mean"] == pytest.approx(0.4)
    assert found.rows[0].rungs[0].levels["gate_mean"] is None
    assert (row.rungs[0].sink, found.rows[0].rungs[0].sink) == ("2.00 x uniform", "no sink")
    assert found.rows[2].rungs[0].sink == "no sink", "no more than uniform"
    assert not any("sinks" in line for line in cautions(of, found))
    assert any("sinks" in line for line in cautions(of, _statistics(of, study(of, _planted()))))


def test_the_order_of_runs_changes_nothing() -> None:
    of = facts()
    runs = study(of, _planted(headwise=HIGH), noise=0.1)
    _find(runs, "headwise", 4, 1).update(status="diverged", val_loss=None)
    want = json.dumps(report_of(of, runs))
    for draw in range(2):
        random.Random(draw).shuffle(runs)
        assert json.dumps(report_of(of, runs)) == want


def test_a_study_that_has_begun_is_a_study() -> None:
    of = facts()
    assert report_of(of, [])["statistics"]["runs"] == 0
    runs = [run for run in study(of, _planted(headwise=HIGH)) if run["seed"] == 0]
    found = _statistics(of, runs)
    assert not any(line.startswith("1 seed") for line in cautions(of, found)), "others are to come"
    alone = facts(seeds=(0,))
    words = "1 seed: there are gaps and no intervals; a verdict other than not separable needs 3."
    assert words in cautions(alone, _statistics(alone, runs))
    assert _pick(found, "headwise").interaction.gap.interval.mean == pytest.approx(-0.2)
    assert {one.word for one in verdicts_of(of, found)} == {"not separable"}
    assert next(row for row in found.rows if row.variant == "headwise").stable.lr is None


def test_a_ladder_of_one_rung_has_no_interaction() -> None:
    of = facts(learning_rates=(4e-3,), top_rungs=1)
    found = _statistics(of, study(of, _planted(headwise=ALIKE)))
    one = _pick(found, "headwise")
    assert one.rungs[0].gap.values == pytest.approx([-0.2] * 5)
    assert (one.interaction.gap.values, one.interaction.best) == ((None,) * 5, (None,) * 5)
    assert {verdict.word for verdict in verdicts_of(of, found)} == {"not separable"}


def test_a_study_whose_baseline_is_half_has_no_control() -> None:
    of = facts(variants=("half", "headwise"))
    found = _statistics(of, study(of, _planted(headwise=HIGH), noise=0.02))
    assert [(one.variant, one.reference) for one in found.comparisons] == [("headwise", "half")]
    assert attributions(of, verdicts_of(of, found)) == ()


def test_what_was_added_later_is_told() -> None:
    grown = facts(later_rates=RATES[:2], later_seeds=(4,))
    words = f"rate {RATES[0]:g}, rate {RATES[1]:g}, seed 4: added when runs had begun, so this ladder was not all fixed"
    assert any(line.startswith(words) for line in cautions(grown, _statistics(grown, [])))
    assert not any("added when" in line for line in cautions(facts(), _statistics(facts(), [])))


def test_a_baseline_at_its_best_on_top_is_told() -> None:
    of = facts()
    found = _statistics(of, study(of, lambda variant, rung: -2 * BASE[rung]))
    assert any("0.064, a top rung" in line for line in cautions(of, found))


def test_a_number_that_is_not_finite_is_divergence() -> None:
    run = Run.from_json(entry("baseline", 4e-3, 0, math.inf, peak_hidden=math.nan))
    assert (run.status, run.val_loss, run.peak_hidden) == ("diverged", None, None)
    run = Run.from_json(entry("baseline", 4e-3, 0, 1e308, spikes=10**400))  # of which no sum is
    assert (run.status, run.val_loss, run.spikes) == ("diverged", None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "other"}, "run other/0.004/0 is not of the spec made_up"),
        ({"lr": 5e-3}, "is not of the spec"),
        ({"seed": 9}, "is not of the spec"),
        ({"lr": None}, "run baseline/None/0: variant, lr and seed must be"),
        ({"lr": "x"}, "variant, lr and seed must be"),
        ({"seed": False}, "variant, lr and seed must be"),
        ({"variant": None}, "variant, lr and seed must be"),
        ({"status": "running"}, r"status \(running\) must be finished or diverged"),
        ({"val_loss": None}, "finished, and val_loss is null"),
        ({"val_loss": "2.4"}, "val_loss .* must be a number or null"),
        ({"spikes": True}, "spikes .* must be a number or null"),
    ],
)
def test_entries_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError, match=words):
        _grid(facts(), [{**entry("baseline", 4e-3, 0, 2.4), **changes}])


def test_a_run_told_twice_is_refused() -> None:
    with pytest.raises(RunError, match="baseline/0.004/0 is there twice"):
        _grid(facts(), [entry("baseline", 4e-3, 0, 2.4), entry("baseline", 4e-3 * (1 + 1e-15), 0, 2.5)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": ()}, "variants"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"learning_rates": (2e-3, 1e-3)}, "must ascend"),
        ({"top_rungs": 5}, "top_rungs"),
        ({"top_rungs": 0}, "top_rungs"),
    ],
)
def test_facts_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        facts(**changes)
