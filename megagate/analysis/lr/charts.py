"""Pictures of a study. Imports matplotlib, so it is imported by what draws, when it draws."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megagate.analysis.gate import style
from megagate.analysis.lr.entries import Facts
from megagate.analysis.lr.interval import Interval
from megagate.analysis.lr.stats import Comparison, Statistics

_DODGE = 0.035
"""Of a rung's distance to the next, between variants, so that dots do not hide each other."""

_INTERVALS = "dots are seeds, bars the mean and 95 % t-interval, the thin line beside it the bootstrap's"


def write_charts(facts: Facts, statistics: Statistics, output: Path) -> list[Path]:
    """loss.png, gaps.png, interaction.png and activation.png.

    Raises:
        DataError: They cannot be written.
    """
    bar = "" if facts.collapsed_above is None else f"; a finished run above {facts.collapsed_above:g} counts as collapsed"
    if bar:
        bar += " (dashed)" if _bar_is_near(facts, statistics) else " (outside this picture)"
    with style.look():
        pictures = {
            "loss.png": ("Held-out loss", f"nats; dots are seeds, lines the mean of those that finished; x: diverged{bar}", _loss),
            "gaps.png": ("Paired gaps", f"nats, below 0 better; {_INTERVALS}", _gaps),
            "interaction.png": (
                "Interaction: gap at the top rungs minus gap at the baseline's best rung",
                f"nats, below 0 more stable; {_INTERVALS}",
                _interactions,
            ),
            "activation.png": ("Peak activation", "largest absolute hidden state that any look saw; lines are geometric means", _peaks),
        }
        paths = []
        for name, (title, caption, draw) in pictures.items():
            strips = [style.heading(f"{facts.name}: {title}", [caption]), _key(facts), (5.2, _strip(facts, statistics, draw))]
            paths.append(style.save(style.sheet(strips), output / name))
    return paths


Draw = Callable[[SubFigure, Facts, Statistics], None]


def _strip(facts: Facts, statistics: Statistics, draw: Draw) -> style.Draw:
    return lambda part: draw(part, facts, statistics)


def _key(facts: Facts) -> style.Strip:
    handles = [
        Line2D([], [], color=style.colour(index), marker=style.marker(index), label=style.drawable(variant))
        for index, variant in enumerate(facts.variants)
    ]
    return style.key(handles)


def _axes(part: SubFigure, columns: int) -> list[Axes]:
    axes = part.subplots(1, columns, squeeze=False, gridspec_kw={"wspace": 0.16})[0]
    part.subplots_adjust(left=0.06, right=0.985, top=0.93, bottom=0.11)
    return list(axes)


def _ladder(axes: Axes, facts: Facts) -> None:
    low, high = facts.learning_rates[0], facts.learning_rates[-1]
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(list(facts.learning_rates)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("learning rate")


def _place(facts: Facts, index: float, rung: int, *, panels: int = 1) -> float:
    """A learning rate, moved a little for each variant; more where several panels share the width."""
    rates = facts.learning_rates
    step = min((high / low for low, high in zip(rates, rates[1:], strict=False)), default=2.0)
    return rates[rung] * step ** (panels * _DODGE * (index - (len(facts.variants) - 1) / 2))


def _loss(part: SubFigure, facts: Facts, statistics: Statistics) -> None:
    axes = _axes(part, 1)[0]
    for index, row in enumerate(statistics.rows):
        look = {"color": style.colour(index)}
        means = [(_place(facts, index, rung), one.levels["val_loss"]) for rung, one in enumerate(row.rungs)]
        _line(axes, means, **look)
        for rung, one in enumerate(row.rungs):
            dots = [loss for loss in one.losses if loss is not None]
            axes.plot([_place(facts, index, rung)] * len(dots), dots, style.marker(index), alpha=0.55, **look)
            if one.diverged:
                axes.plot(
                    _place(facts, index, rung), 0.985, "x", transform=axes.get_xaxis_transform(), markersize=7, markeredgewidth=1.8, **look
                )
    if facts.collapsed_above is not None and _bar_is_near(facts, statistics):
        axes.axhline(facts.collapsed_above, color=style.GREY, linestyle="--", linewidth=1)
    _ladder(axes, facts)


def _bar_is_near(facts: Facts, statistics: Statistics) -> bool:
    """Whether showing the bar leaves half of the height to the losses, at least."""
    losses = [loss for row in statistics.rows for rung in row.rungs for loss in rung.losses if loss is not None]
    low, high, bar = min(losses, default=0.0), max(losses, default=0.0), facts.collapsed_above
    return bar is not None and max(bar - high, low - bar) <= high - low


def _gaps(part: SubFigure, facts: Facts, statistics: Statistics) -> None:
    panels = _axes(part, len(facts.references))
    for axes, reference in zip(panels, facts.references, strict=True):
        axes.set_title(style.drawable(f"gap to {reference}"))
        axes.axhline(0, color=style.GREY, linewidth=1)
        for one in _of(statistics, reference):
            index = facts.variants.index(one.variant)
            means = [(_place(facts, index, rung, panels=len(panels)), row.gap.interval.mean) for rung, row in enumerate(one.rungs)]
            _line(axes, means, color=style.colour(index), alpha=0.5)
            for rung, row in enumerate(one.rungs):
                _bar(axes, _place(facts, index, rung, panels=len(panels)), row.gap.values, row.gap.interval, index)
                _bootstrap(axes, _place(facts, index + 0.4, rung, panels=len(panels)), row.gap.interval)
        _ladder(axes, facts)


def _interactions(part: SubFigure, facts: Facts, statistics: Statistics) -> None:
    panels = _axes(part, len(facts.references))
    for axes, reference in zip(panels, facts.references, strict=True):
        comparisons = _of(statistics, reference)
        capped = any(one.interaction.lost for one in comparisons)
        axes.set_title(style.drawable(f"against {reference}{', capped at ln V where pairs diverged' if capped else ''}"))
        axes.axhline(0, color=style.GREY, linewidth=1)
        for place, one in enumerate(comparisons):
            shown = one.interaction.capped if one.interaction.lost else one.interaction.gap
            _bar(axes, place, shown.values, shown.interval, facts.variants.index(one.variant))
            _bootstrap(axes, place + 0.12, shown.interval)
        axes.set_xticks(range(len(comparisons)), [style.drawable(one.variant) for one in comparisons])
        axes.set_xlim(-0.6, max(len(comparisons), 1) - 0.4)
        axes.grid(visible=False, axis="x")


def _peaks(part: SubFigure, facts: Facts, statistics: Statistics) -> None:
    axes = _axes(part, 1)[0]
    style.log_axis(axes, np.array([peak for row in statistics.rows for one in row.rungs for peak in one.peaks if peak is not None]))
    for index, row in enumerate(statistics.rows):
        for rung, one in enumerate(row.rungs):
            dots = [peak for peak in one.peaks if peak is not None and peak > 0]
            axes.plot(
                [_place(facts, index, rung)] * len(dots), dots, style.marker(index), color=style.colour(index), alpha=0.55
            )
        _line(axes, [(_place(facts, index, rung), _geometric(one.peaks)) for rung, one in enumerate(row.rungs)], color=style.colour(index))
    _ladder(axes, facts)


def _of(statistics: Statistics, reference: str) -> list[Comparison]:
    return [one for one in statistics.comparisons if one.reference == reference]


def _line(axes: Axes, points: Sequence[tuple[float, float | None]], **look: object) -> None:
    """Through what is there; broken where a rung has none."""
    axes.plot([x for x, _ in points], [float("nan") if y is None else y for _, y in points], **look)


def _bar(axes: Axes, x: float, values: Sequence[float | None], found: Interval, index: int) -> None:
    dots = [value for value in values if value is not None]
    axes.plot([x] * len(dots), dots, style.marker(index), color=style.colour(index), alpha=0.45)
    if found.mean is not None and found.low is not None and found.high is not None:
        axes.errorbar(
            x, found.mean, yerr=[[found.mean - found.low], [found.high - found.mean]], color=style.colour(index), marker="_",
            markersize=11, capsize=3, linewidth=1.8,
        )  # fmt: skip


def _bootstrap(axes: Axes, x: float, found: Interval) -> None:
    if found.boot_low is not None and found.boot_high is not None:
        axes.plot([x] * 2, [found.boot_low, found.boot_high], color=style.GREY, linewidth=1)


def _geometric(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None and value > 0]
    product = 1.0
    for value in there:
        product *= value ** (1 / len(there))
    return product if there else None
