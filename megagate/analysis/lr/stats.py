"""The statistics of a learning-rate study, in their order of power. Nothing depends on the order of runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megagate.analysis.lr.entries import Facts, Grid, mean_of
from megagate.analysis.lr.interval import Interval, interval

LEVELS = ("val_loss", "train_loss", "peak_hidden", "attention_logit_max", "gate_mean", "first_token_attention", "uniform_attention")
"""Figures that are averaged over the finished runs of a rung."""

RULES: dict[str, str] = {
    "gap": "held-out loss of the variant minus that of the reference, nats, of the same learning rate and seed (bit-identical shared "
    "initial weights and data order). A pair with a diverged run has no gap: it is counted (of the variant, of the reference, "
    "of both), and speaks in the fractions. Ladder mean: of seeds that have every gap.",
    "interval": "mean over seeds with Student's 95 % t-interval, and the 95 % percentile bootstrap of the mean (10,000 seeded resamples), "
    "which is too narrow for few seeds: three have ten different resamples. Each interval stands for itself: none is widened "
    "for their number.",
    "interaction": "per seed, the mean gap at the top rungs minus the gap at the baseline's best rung below them: the stability claim "
    "proper; a gain that is everywhere the same gives 0. The best rung for a seed is the one with the lowest mean baseline loss of the "
    "OTHER seeds, since a rung chosen by a seed's own luck has a gap that is too high there, which would look like stability (in one of "
    "seven studies of five seeds without any effect). Seeds share what chooses their rungs, which makes the interval a little too narrow: "
    "simulated, 3 to 3.5 % of such studies of 3 to 5 seeds are called supported where rungs are alike, 2.5 % where one is clearly best. "
    "Capped: losses at most ln V, and a diverged run counts as ln V, so that its pair is not lost. A baseline at ln V at "
    "all rungs below the top has no best one there, and no interaction.",
    "collapsed": "a finished run whose held-out loss is above collapsed_above, the spec's bar; a diverged run counts beside it. Largest "
    "stable learning rate: the highest rung all of whose seeds were run and none collapsed or diverged, whatever the rungs "
    "below it did; 'at least' where it is the top rung, or a rung above is well so far and lacks seeds. It is quantised by the ladder.",
    "sensitivity": "mean over the ladder of min(loss, ln V) minus a reference, per seed (arXiv 2309.14322); a diverged run counts as "
    "ln V. Own best: the variant's lowest loss of that seed; a variant that is bad everywhere looks insensitive by it. Pooled best: the "
    "lowest of all variants of that seed; differences between variants are then those of their ladder means.",
    "activation": "log2 of the ratio of the largest absolute hidden state that any look at the run saw, "
    "variant over reference, paired by seed.",
    "spikes": "loss spikes (events of losses far above what the losses before let expect, by the rule of megagate/train/spikes.py) per "
    "1,000 steps, of all runs that tell them, diverged ones up to where they stopped.",
    "gate score": "mean score of the gate at the last look at a run, mean over finished runs.",
    "sink": "share of attention on the first token at the last look, mean over finished runs, beside what it would be if each query "
    "attended alike to all its keys: no sink at or below it.",
}


@dataclass(frozen=True)
class Paired:
    """One value for each seed of the study, None where there is none, and their interval."""

    values: tuple[float | None, ...]
    interval: Interval

    @staticmethod
    def of(values: Sequence[float | None]) -> "Paired":
        """With the interval of those that are there."""
        return Paired(tuple(values), interval(values))


@dataclass(frozen=True)
class Lost:
    """Pairs without a gap, by why."""

    variant_diverged: int
    reference_diverged: int
    both_diverged: int
    missing: int

    @property
    def diverged(self) -> int:
        """To divergence."""
        return self.variant_diverged + self.reference_diverged + self.both_diverged


@dataclass(frozen=True)
class RungGap:
    """A variant and a reference at one learning rate."""

    lr: float
    gap: Paired
    lost: Lost
    activation: Paired


@dataclass(frozen=True)
class Interaction:
    """The stability claim.

    Args:
        best: The learning rate that stood for the baseline's best, of each seed; None where it is not known.
        at_top: The first part, mean gap at the top rungs, of pairs that both finished.
        at_best: The second, the gap at the baseline's best rung.
        gap: Their difference, of pairs that both finished.
        capped: The same difference with ln V for diverged runs.
        capped_at_top: Its first part.
        lost: Seeds that have `capped` and not `gap`.
    """

    best: tuple[float | None, ...]
    at_top: Paired
    at_best: Paired
    gap: Paired
    capped: Paired
    capped_at_top: Paired
    lost: int


@dataclass(frozen=True)
class Comparison:
    """A variant against a reference."""

    variant: str
    reference: str
    rungs: tuple[RungGap, ...]
    ladder: Paired
    interaction: Interaction


@dataclass(frozen=True)
class Rung:
    """A variant at one learning rate.

    Args:
        lr: Which.
        runs: How many there are.
        collapsed: Finished above the bar.
        diverged: How many.
        fraction: Of both among the runs; None without runs.
        levels: Mean of each of `LEVELS` over finished runs that tell it.
        losses: Held-out, of each seed; None where diverged or missing.
        peaks: Peak activation of each seed.
        spikes_per_1000: None where no run tells it.
        sink: In words; empty where not told.
    """

    lr: float
    runs: int
    collapsed: int
    diverged: int
    fraction: float | None
    levels: dict[str, float | None]
    losses: tuple[float | None, ...]
    peaks: tuple[float | None, ...]
    spikes_per_1000: float | None
    sink: str


@dataclass(frozen=True)
class Stable:
    """The largest learning rate without a collapsed or diverged seed.

    Args:
        lr: None where no rung is so, or none is known to be.
        at_least: It is the top rung, or a rung above it has lost no seed, and has not run all.
        known: False where seeds are missing without which not even a least one can be told.
        ratio: To the baseline's, in words.
    """

    lr: float | None
    at_least: bool
    known: bool
    ratio: str

    def __str__(self) -> str:
        if self.lr is None:
            return "none" if self.known else "not known yet"
        return f"{'at least ' if self.at_least else ''}{self.lr:g}"


@dataclass(frozen=True)
class Row:
    """A variant over the ladder. Sensitivities are of each seed whose ladder is whole, and minus the baseline's of the same seed."""

    variant: str
    rungs: tuple[Rung, ...]
    stable: Stable
    own_best: Paired
    pooled_best: Paired
    own_minus_baseline: Paired
    pooled_minus_baseline: Paired


@dataclass(frozen=True)
class Statistics:
    """All of it.

    Args:
        runs: There, of `planned`.
        planned: What the spec asks for.
        diverged: Of the runs there.
        baseline_best: The learning rate of the baseline's lowest mean capped loss over the ladder; None where all of it is ln V or missing.
        rows: One a variant.
        comparisons: Of each variant with each reference.
    """

    runs: int
    planned: int
    diverged: int
    baseline_best: float | None
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]


def statistics_of(grid: Grid) -> Statistics:
    """Of the runs that are there."""
    facts = grid.facts
    stable = {variant: _stable(grid, variant) for variant in facts.variants}
    rows = tuple(_row(grid, variant, _ratio(facts, stable[variant], stable[facts.baseline])) for variant in facts.variants)
    pairs = [(variant, reference) for reference in facts.references for variant in facts.variants]
    comparisons = tuple(
        _comparison(grid, variant, reference) for variant, reference in pairs if variant not in (reference, facts.baseline)
    )
    planned = len(facts.variants) * len(facts.learning_rates) * len(facts.seeds)
    diverged = sum(rung.diverged for row in rows for rung in row.rungs)
    best = _best(grid, facts.rungs, facts.seeds)
    return Statistics(
        len(grid), planned, diverged, None if best is None else facts.learning_rates[best], rows, comparisons
    )


def _best(grid: Grid, rungs: Sequence[int], seeds: Sequence[int]) -> int | None:
    """The rung of the baseline's lowest mean capped loss over those seeds that have all of the rungs; None where all of it is the cap."""
    whole = [losses for seed in seeds if (losses := _ladder(grid, rungs, seed))]
    if all(loss == grid.facts.cap for losses in whole for loss in losses):  # also of none
        return None
    means = [fmean(column) for column in zip(*whole, strict=True)]
    return rungs[means.index(min(means))]


def _ladder(grid: Grid, rungs: Sequence[int], seed: int) -> list[float]:
    """The baseline's capped losses of a seed at these rungs; nothing where one is missing."""
    losses = [loss for rung in rungs if (loss := grid.capped(grid.facts.baseline, rung, seed)) is not None]
    return losses if len(losses) == len(rungs) else []


def best_rungs(grid: Grid) -> list[int | None]:
    """For each seed, the baseline's best rung below the top ones as the other seeds tell it; as it tells itself where no other has them."""
    facts = grid.facts
    found = []
    for seed in facts.seeds:
        others = [other for other in facts.seeds if other != seed and _ladder(grid, facts.lower, other)]
        found.append(_best(grid, facts.lower, others or [seed]))
    return found


def _comparison(grid: Grid, variant: str, reference: str) -> Comparison:
    facts = grid.facts
    rungs = tuple(_rung_gap(grid, variant, reference, rung) for rung in facts.rungs)
    gaps = [row.gap.values for row in rungs]
    ladder = Paired.of([mean_of([row[index] for row in gaps]) for index in range(len(facts.seeds))])
    return Comparison(variant, reference, rungs, ladder, interaction_of(grid, variant, reference))


def _rung_gap(grid: Grid, variant: str, reference: str, rung: int) -> RungGap:
    facts = grid.facts
    fates = [(grid.fate(variant, rung, seed), grid.fate(reference, rung, seed)) for seed in facts.seeds]
    lost = Lost(
        variant_diverged=fates.count(("diverged", "finished")),
        reference_diverged=fates.count(("finished", "diverged")),
        both_diverged=fates.count(("diverged", "diverged")),
        missing=sum("missing" in pair for pair in fates),
    )
    gaps = [_difference(grid.loss(variant, rung, seed), grid.loss(reference, rung, seed)) for seed in facts.seeds]
    peaks = zip(grid.figures(variant, rung, "peak_hidden"), grid.figures(reference, rung, "peak_hidden"), strict=True)
    return RungGap(facts.learning_rates[rung], Paired.of(gaps), lost, Paired.of([_log2(one, other) for one, other in peaks]))


def interaction_of(grid: Grid, variant: str, reference: str) -> Interaction:
    """Of one variant against one reference, see `RULES`."""
    facts, best = grid.facts, best_rungs(grid)

    def over(loss: Callable[[str, int, int], float | None]) -> tuple[list[float | None], list[float | None]]:
        def gap(rung: int, seed: int) -> float | None:
            return _difference(loss(variant, rung, seed), loss(reference, rung, seed))

        top = [mean_of([gap(rung, seed) for rung in facts.top]) for seed in facts.seeds]
        return top, [None if low is None else gap(low, seed) for seed, low in zip(facts.seeds, best, strict=True)]

    (top, low), (capped_top, capped_low) = over(grid.loss), over(grid.capped)
    whole = [_difference(*pair) for pair in zip(top, low, strict=True)]
    capped = [_difference(*pair) for pair in zip(capped_top, capped_low, strict=True)]
    lost = sum(one is None and other is not None for one, other in zip(whole, capped, strict=True))
    rates = tuple(None if rung is None else facts.learning_rates[rung] for rung in best)
    return Interaction(rates, Paired.of(top), Paired.of(low), Paired.of(whole), Paired.of(capped), Paired.of(capped_top), lost)


def _row(grid: Grid, variant: str, stable: Stable) -> Row:
    facts = grid.facts
    own, pooled = _sensitivity(grid, variant)
    base_own, base_pooled = _sensitivity(grid, facts.baseline)
    return Row(
        variant=variant,
        rungs=tuple(_rung(grid, variant, rung) for rung in facts.rungs),
        stable=stable,
        own_best=Paired.of(own),
        pooled_best=Paired.of(pooled),
        own_minus_baseline=Paired.of([_difference(*pair) for pair in zip(own, base_own, strict=True)]),
        pooled_minus_baseline=Paired.of([_difference(*pair) for pair in zip(pooled, base_pooled, strict=True)]),
    )


def _rung(grid: Grid, variant: str, rung: int) -> Rung:
    facts = grid.facts
    fates = [grid.fate(variant, rung, seed) for seed in facts.seeds]
    losses = tuple(grid.loss(variant, rung, seed) for seed in facts.seeds)
    there, diverged = len(fates) - fates.count("missing"), fates.count("diverged")
    collapsed = sum(loss is not None and facts.collapsed_above is not None and loss > facts.collapsed_above for loss in losses)
    levels = {name: interval(grid.figures(variant, rung, name)).mean for name in LEVELS}
    return Rung(
        lr=facts.learning_rates[rung],
        runs=there,
        collapsed=collapsed,
        diverged=diverged,
        fraction=(collapsed + diverged) / there if there else None,
        levels=levels,
        losses=losses,
        peaks=tuple(grid.figures(variant, rung, "peak_hidden")),
        spikes_per_1000=_spikes(grid, variant, rung),
        sink=_sink(levels["first_token_attention"], levels["uniform_attention"]),
    )


def _spikes(grid: Grid, variant: str, rung: int) -> float | None:
    runs = [run for seed in grid.facts.seeds if (run := grid.run(variant, rung, seed)) is not None and run.spikes is not None]
    steps = sum(grid.facts.steps if run.step is None else run.step for run in runs)
    return 1000 * sum(run.spikes or 0 for run in runs) / steps if steps else None


def _sink(share: float | None, uniform: float | None) -> str:
    if share is None or uniform is None:
        return ""
    return "no sink" if share <= uniform else f"{share / uniform:.2f} x uniform"


def _stable(grid: Grid, variant: str) -> Stable:
    facts = grid.facts
    well = [row for rung in facts.rungs if (row := _rung(grid, variant, rung)).collapsed + row.diverged == 0]
    highest = max((row.lr for row in well if row.runs == len(facts.seeds)), default=None)
    unknown = [row.lr for row in well if row.runs < len(facts.seeds)]
    at_least = highest is not None and (highest == facts.learning_rates[-1] or any(lr > highest for lr in unknown))
    return Stable(highest, at_least, highest is not None or not unknown, "")


def _ratio(facts: Facts, stable: Stable, baseline: Stable) -> Stable:
    """With the ratio to the baseline's in words."""
    if not (stable.known and baseline.known):
        words = "not known yet: seeds are missing"
    elif stable.lr is None or baseline.lr is None:
        words = "not defined: no rung of one of them is stable"
    elif stable.at_least and baseline.at_least:
        top = stable.lr == baseline.lr == facts.learning_rates[-1]
        words = "not known: both are stable at the top rung" if top else "not known yet: seeds are missing"
    else:
        bound = "at least " if stable.at_least else "at most " if baseline.at_least else ""
        words = f"{bound}{stable.lr / baseline.lr:.3g} x"
    return replace(stable, ratio=words)


def _sensitivity(grid: Grid, variant: str) -> tuple[list[float | None], list[float | None]]:
    """Of each seed: against the own best, against the pooled best."""
    facts = grid.facts
    own: list[float | None] = []
    pooled: list[float | None] = []
    for seed in facts.seeds:
        mean = mean_of([grid.capped(variant, rung, seed) for rung in facts.rungs])
        mine = [loss for rung in facts.rungs if (loss := grid.capped(variant, rung, seed)) is not None]
        every = [loss for one in facts.variants for rung in facts.rungs if (loss := grid.capped(one, rung, seed)) is not None]
        own.append(None if mean is None else mean - min(mine))
        pooled.append(None if mean is None else mean - min(every))
    return own, pooled


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _log2(one: float | None, other: float | None) -> float | None:
    return math.log2(one / other) if one is not None and other is not None and one > 0 and other > 0 else None
