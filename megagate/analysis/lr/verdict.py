"""What a study says of the stability claim: one line a variant, with its interval and its rule."""

from dataclasses import dataclass
from typing import Literal

from megagate.analysis.lr.entries import Facts
from megagate.analysis.lr.interval import LEAST, Interval
from megagate.analysis.lr.stats import Comparison, Statistics

Word = Literal["supported", "not separable", "contradicted"]

RULE = (
    "supported: the 95 % t-interval of the interaction lies wholly below 0 (the variant loses less to high rates than the reference); "
    f"contradicted: wholly above 0; not separable: it holds 0, or there are fewer than {LEAST} seeds. Where a pair was lost to divergence, "
    "the capped interaction decides, since the seeds that are left were chosen by what is to be shown; the capped gap at the top must then "
    "lie wholly on the same side, too: a pair that diverged on both sides counts as alike there, whatever its gap at lower rates"
)


@dataclass(frozen=True)
class Verdict:
    """Of one comparison.

    Args:
        variant: Whose.
        reference: Against what.
        word: The verdict.
        basis: Which interaction decided.
        interval: Its own.
        line: All of it as a sentence.
    """

    variant: str
    reference: str
    word: Word
    basis: Literal["pairs", "capped"]
    interval: Interval
    line: str


def word_of(interval: Interval) -> Word:
    """See `RULE`."""
    if interval.n < LEAST or interval.low is None or interval.high is None:
        return "not separable"
    if interval.high < 0:
        return "supported"
    return "contradicted" if interval.low > 0 else "not separable"


def verdict_of(facts: Facts, comparison: Comparison) -> Verdict:
    """Of one comparison, by `RULE`."""
    found = comparison.interaction
    capped = found.lost > 0
    deciding = found.capped.interval if capped else found.gap.interval
    word = word_of(deciding)
    if capped and word != word_of(found.capped_at_top.interval):
        word = "not separable"
    top = " and ".join(f"{facts.learning_rates[rung]:g}" for rung in facts.top)
    best = ", ".join(f"{lr:g}" for lr in sorted({lr for lr in found.best if lr is not None})) or "unknown"
    line = (
        f"{comparison.variant} against {comparison.reference}: stability {word.upper()}. Gap at {top} minus gap at {best} "
        f"(the baseline's best below): {_words(deciding)}{', capped at ln V' if capped else ''}"
    )
    if not capped and found.at_top.interval.mean is not None and found.at_best.interval.mean is not None:
        line += f" (the gaps themselves: {found.at_top.interval.mean:+.3f} and {found.at_best.interval.mean:+.3f})"
    if capped:
        line += f" (at the top alone {found.capped_at_top.interval})"
        line += f"; {found.lost} of {found.lost + found.gap.interval.n} seeds lost a pair to divergence"
        both = sum(comparison.rungs[rung].lost.both_diverged for rung in facts.top)
        line += f", and {both} of the pairs at the top diverged on both sides, which tells neither from the other" if both else ""
    if word == "supported" and not capped and (found.at_top.interval.high is None or found.at_top.interval.high >= 0):
        low, high = found.at_top.interval.low, found.at_top.interval.high
        line += f"; at the top itself it is not shown to be better{f' [{low:+.3f}, {high:+.3f}]' if low is not None else ''}"
        line += ": it loses less to high rates, from a higher loss" if (found.at_best.interval.mean or 0.0) > 0 else ""
    if 0 < deciding.n < LEAST:
        line += f"; fewer than {LEAST} seeds say nothing"
    return Verdict(comparison.variant, comparison.reference, word, "capped" if capped else "pairs", deciding, f"{line}.")


def verdicts_of(facts: Facts, statistics: Statistics) -> tuple[Verdict, ...]:
    """Of each comparison, in their order."""
    return tuple(verdict_of(facts, comparison) for comparison in statistics.comparisons)


def attributions(facts: Facts, verdicts: tuple[Verdict, ...]) -> tuple[str, ...]:
    """What both references together say of each variant; nothing where there is no control."""
    found = {(one.variant, one.reference): one for one in verdicts}
    lines = []
    for variant in facts.variants[1:]:
        if facts.control is None or variant == facts.control:
            continue
        over, beyond, control = found[variant, facts.baseline], found[variant, facts.control], found[facts.control, facts.baseline]
        if over.word != "supported":
            said = f"no stability shown over {facts.baseline}"
        elif beyond.word == "supported":
            said = f"more stable than {facts.baseline} and than {facts.control}: more than halving the attention branch does"
        elif beyond.interval.n < LEAST:
            said = f"more stable than {facts.baseline}; too few seeds yet to tell it from {facts.control}"
        else:
            told = "is more stable than it" if beyond.word == "contradicted" else "cannot be told from it"
            said = (
                f"more stable than {facts.baseline}, and {facts.control} {told} ({facts.control} over {facts.baseline}: {control.word}): "
                "not shown to be more than halving the attention branch does"
            )
        lines.append(f"{variant}: {said}.")
    return tuple(lines)


def cautions(facts: Facts, statistics: Statistics) -> tuple[str, ...]:
    """What a reader has to know before believing the rest."""
    found = []
    if statistics.runs < statistics.planned:
        found.append(f"{statistics.planned - statistics.runs} of {statistics.planned} runs are missing: this is a part of the study.")
    if statistics.diverged:
        found.append(f"{statistics.diverged} run{'s' if statistics.diverged > 1 else ''} diverged; pairs with them have no gap.")
    if len(facts.seeds) < 2:
        found.append(f"1 seed: there are gaps and no intervals; a verdict other than not separable needs {LEAST}.")
    elif len(facts.seeds) < 5:
        found.append(f"{len(facts.seeds)} seeds: t-intervals are wide and the bootstrap's too narrow.")
    later = [f"rate {lr:g}" for lr in facts.later_rates] + [f"seed {seed}" for seed in facts.later_seeds]
    if later:
        found.append(f"{', '.join(later)}: added when runs had begun, so this ladder was not all fixed before anything was seen.")
    best = statistics.baseline_best
    top = [facts.learning_rates[rung] for rung in facts.top]
    if best is not None and best in top:
        found.append(f"the baseline is best at {best:g}, a top rung: not past its optimum, so the interaction is not about stability.")
    lower = [statistics.rows[0].rungs[rung] for rung in facts.lower]
    if lower and all(rung.runs and all(loss is None or loss >= facts.cap for loss in rung.losses) for rung in lower):
        found.append("the baseline diverged, or is at ln V, in all runs below the top: no rung is its best, so there is no interaction.")
    if best is not None and best == facts.learning_rates[0]:
        found.append(f"the baseline is best at {best:g}, the lowest rung: its optimum may lie below the ladder.")
    if facts.collapsed_above is None:
        found.append("the spec sets no bar: only diverged runs count as collapsed.")
    if facts.control is None:
        found.append("no control `half`: an effect of the attention branch's initial scale would be credited to the gate.")
    sinks = [rung.sink for row in statistics.rows for rung in row.rungs if rung.sink]
    if sinks and all(sink == "no sink" for sink in sinks):
        found.append("no variant attends to the first token more than uniformly: this study cannot show what a gate does to sinks.")
    intervals = len(statistics.comparisons)
    if intervals > 1:
        found.append(f"{intervals} comparisons, each by an interval of 95 % of its own: one in twenty misses by chance.")
    return tuple(found)


def _words(found: Interval) -> str:
    if found.mean is None:
        return "no seed has it"
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f} nats, one seed"
    return (
        f"{found.mean:+.3f} nats, 95 % t-interval [{found.low:+.3f}, {found.high:+.3f}], "
        f"bootstrap [{found.boot_low:+.3f}, {found.boot_high:+.3f}], {found.n} seeds"
    )
