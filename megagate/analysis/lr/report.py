"""`study.json` to what people read: report.json, tables, pictures and a page."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megagate.analysis.gate.table import write
from megagate.analysis.lr.entries import Facts, Grid, Run
from megagate.analysis.lr.page import page_of
from megagate.analysis.lr.stats import RULES, Rung, Statistics, statistics_of
from megagate.analysis.lr.verdict import RULE, attributions, cautions, verdicts_of
from megagate.errors import RunError

FORMAT = 1


def report_of(facts: Facts, entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All statistics and words, as JSON keeps them; the same whatever the order of the runs.

    Raises:
        RunError: A run is of another spec, there twice, or not readable.
    """
    entries = list(entries)
    return _report(facts, statistics_of(Grid(facts, [Run.from_json(entry) for entry in entries])), entries)


def write_report(facts: Facts, entries: Iterable[Mapping[str, Any]], output: Path) -> list[Path]:
    """Writes report.json, table.md, gaps.csv, variants.csv, the pictures and page.html, each whole or not at all; gives their paths.

    Raises:
        RunError: See `report_of`.
        DataError: The folder cannot be written.
    """
    entries = list(entries)
    statistics = statistics_of(Grid(facts, [Run.from_json(entry) for entry in entries]))
    report = _report(facts, statistics, entries)
    from megagate.analysis.lr import charts  # noqa: PLC0415  (matplotlib takes half a second, and statistics do without)

    return [
        write(output / "report.json", f"{json.dumps(report, indent=1, allow_nan=False)}\n".encode()),
        write(output / "table.md", markdown(facts, statistics, report).encode()),
        write(output / "gaps.csv", gaps_csv(facts, statistics).encode()),
        write(output / "variants.csv", variants_csv(statistics).encode()),
        *charts.write_charts(facts, statistics, output),
        write(output / "page.html", page_of(report).encode()),
    ]


def report_study(path: Path, output: Path) -> list[Path]:
    """`write_report` of a `study.json`.

    Raises:
        RunError: The file cannot be read, or holds no study.
        DataError: The folder cannot be written.
    """
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); run the study first") from None
    except ValueError as error:
        raise RunError(f"{path}: is no JSON ({error}); run the study again") from None
    decides, entries = (study.get("decides", {}), study.get("runs")) if isinstance(study, dict) else (None, None)
    if not (isinstance(decides, dict) and isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise RunError(
            f"{path}: holds no study, which is an object whose decides is an object, and whose runs is a list of objects; run it again"
        )
    return write_report(Facts.from_study(study), entries, output)


def _report(facts: Facts, statistics: Statistics, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    verdicts = verdicts_of(facts, statistics)
    runs = sorted(entries, key=lambda entry: (facts.variants.index(entry["variant"]), entry["lr"], entry["seed"]))
    return {
        "format": FORMAT,
        "facts": asdict(facts),
        "cautions": list(cautions(facts, statistics)),
        "verdicts": [asdict(one) for one in verdicts],
        "attributions": list(attributions(facts, verdicts)),
        "rules": {"verdict": RULE, **RULES},
        "statistics": asdict(statistics),
        "runs": [{key: None if _endless(value) else value for key, value in entry.items()} for entry in runs],
    }


def _endless(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def markdown(facts: Facts, statistics: Statistics, report: Mapping[str, Any]) -> str:
    """The verdicts, a table of losses and gaps over the ladder, one of variants, and the rules."""
    rates = [f"{lr:g}" for lr in facts.learning_rates]
    lines = [f"# {facts.name}: {statistics.runs} of {statistics.planned} runs", ""]
    lines += [f"- **{one['line']}**" if one["word"] != "not separable" else f"- {one['line']}" for one in report["verdicts"]]
    lines += [f"- {line}" for line in report["attributions"]]
    lines += ["", "Caution:", "", *(f"- {line}" for line in report["cautions"]), ""]
    losses = [
        [row.variant, *(f"{_plain(rung.levels['val_loss'])}{_fates(rung)}" for rung in row.rungs)]
        for row in statistics.rows
    ]
    lines += ["Held-out loss, mean over n finished seeds, nats (c: collapsed, d: diverged runs):", ""]
    lines += [*_table(["variant", *rates], losses), ""]
    for reference in facts.references:
        mine = [one for one in statistics.comparisons if one.reference == reference]
        gaps = [
            [one.variant, *(str(rung.gap.interval) for rung in one.rungs), str(one.ladder.interval), str(one.interaction.gap.interval),
             str(one.interaction.capped.interval)]
            for one in mine
        ]  # fmt: skip
        head = ["variant", *rates, "ladder mean", "interaction", "capped"]
        said = f"Gap to {reference}, nats, mean over n seeds and 95 % t-interval (bootstrap's: gaps.csv):"
        lines += [said, "", *_table(head, gaps), ""]
        peaks = [[one.variant, *(str(rung.activation.interval) for rung in one.rungs)] for one in mine]
        said = f"log2 of peak activation over {reference}'s, mean over n seeds and 95 % t-interval:"
        lines += [said, "", *_table(["variant", *rates], peaks), ""]
    lines += ["Variants:", "", *_table(*_variants(facts, statistics)), ""]
    lines += [f"- {name}: {text}" for name, text in report["rules"].items()]
    return "\n".join(lines) + "\n"


def gaps_csv(facts: Facts, statistics: Statistics) -> str:
    """A row for each comparison and learning rate, its ladder mean and interactions; then sensitivities, also minus the baseline's.

    All digits, empty where there is none.
    """
    head = ["variant", "reference", "what", "lr", *(f"seed_{seed}" for seed in facts.seeds)]
    head += ["n", "mean", "t_low", "t_high", "boot_low", "boot_high"]
    rows: list[list[object]] = []
    for one in statistics.comparisons:
        parts = [("gap", rung.lr, rung.gap) for rung in one.rungs] + [("log2_activation", rung.lr, rung.activation) for rung in one.rungs]
        parts += [("ladder_mean", "", one.ladder), ("gap_at_top", "", one.interaction.at_top), ("gap_at_best", "", one.interaction.at_best)]
        parts += [("interaction", "", one.interaction.gap), ("interaction_capped", "", one.interaction.capped)]
        parts += [("gap_at_top_capped", "", one.interaction.capped_at_top)]
        for what, lr, paired in parts:
            rows.append([one.variant, one.reference, what, lr, *paired.values, *asdict(paired.interval).values()])
    for row in statistics.rows:
        levels = [("", "own", row.own_best), ("", "pooled", row.pooled_best)]
        over = [(facts.baseline, "own", row.own_minus_baseline), (facts.baseline, "pooled", row.pooled_minus_baseline)]
        for reference, best, paired in [*levels, *(over if row.variant != facts.baseline else [])]:
            told = [row.variant, reference, f"sensitivity_{best}_best", ""]
            rows.append([*told, *paired.values, *asdict(paired.interval).values()])
    return _csv(head, rows)


def variants_csv(statistics: Statistics) -> str:
    """A row for each variant and learning rate."""
    names = list(statistics.rows[0].rungs[0].levels)
    head = ["variant", "lr", "runs", "collapsed", "diverged", "fraction", "spikes_per_1000", "sink", *names]
    rows = [
        [row.variant, rung.lr, rung.runs, rung.collapsed, rung.diverged, rung.fraction, rung.spikes_per_1000, rung.sink]
        + list(rung.levels.values())
        for row in statistics.rows
        for rung in row.rungs
    ]
    return _csv(head, rows)


def _variants(facts: Facts, statistics: Statistics) -> tuple[list[str], list[list[str]]]:
    head = ["variant", "largest stable rate", "over baseline's", "sensitivity, own best", "pooled best",
            "own best, minus baseline's", "pooled best, minus baseline's", "collapsed or diverged",
            "spikes per 1,000 steps", "gate score", "first token / uniform"]  # fmt: skip
    rows = []
    for row in statistics.rows:
        over = [str(paired.interval) for paired in (row.own_minus_baseline, row.pooled_minus_baseline)]
        over = ["-", "-"] if row.variant == facts.baseline else over
        rows.append([
            row.variant, str(row.stable), row.stable.ratio, str(row.own_best.interval), str(row.pooled_best.interval), *over,
            " ".join(f"{rung.collapsed + rung.diverged}/{rung.runs}" for rung in row.rungs),
            " ".join(_plain(rung.spikes_per_1000, 1) for rung in row.rungs),
            " ".join(_plain(rung.levels["gate_mean"], 2) for rung in row.rungs),
            " ".join(
                f"{_plain(rung.levels['first_token_attention'])}/{_plain(rung.levels['uniform_attention'])}" for rung in row.rungs
            ),
        ])  # fmt: skip
    return head, rows


def _fates(rung: Rung) -> str:
    words = [f"{count} {letter}" for count, letter in ((rung.collapsed, "c"), (rung.diverged, "d")) if count]
    return f" ({', '.join([f'n={rung.runs - rung.diverged}', *words])})"


def _plain(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return stream.getvalue()
