"""Figures layer by layer: twelve panels, a line a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from megagate.analysis.gate import style
from megagate.analysis.gate.result import Analysis, ModelResult
from megagate.analysis.gate.table import subtitle
from megagate.analysis.gate.words import DEFINITIONS, labels
from megagate.probe.figures import LayerFigures

COLUMNS = 4
ROW = 2.45  # inches

Of = Callable[[LayerFigures], float]


@dataclass(frozen=True)
class Panel:
    """One figure over the layers.

    Args:
        title: What it is.
        unit: Of its values.
        of: The figure of a layer; nan where there is none.
        before: The same before the gate, dotted.
        yardstick: What uniform attention would give, dashed.
        log: Logarithmic.
        empty: What to say where no model has it.
    """

    title: str
    unit: str
    of: Of
    before: Of | None = None
    yardstick: Of | None = None
    log: bool = False
    empty: str = "not defined:\nonly query 0 was seen"


def _gate(field: str) -> Of:
    return lambda layer: nan if layer.gate is None else getattr(layer.gate, field)


def _output(field: str, side: int) -> Of:
    return lambda layer: getattr(layer.output, field)[side]


_NO_GATE = "no model here has\na gate with scores"

PANELS: tuple[Panel, ...] = (
    Panel("Gate score: mean", "score", _gate("mean"), empty=_NO_GATE),
    Panel("Gate score: standard deviation", "score", _gate("std"), empty=_NO_GATE),
    Panel("Gate scores below 0.1", "share of scores", _gate("below_01"), empty=_NO_GATE),
    Panel("Gate scores below 0.5", "share of scores", _gate("below_05"), empty=_NO_GATE),
    Panel(
        "F-Attn with query 0 (paper's)",
        "share of attention",
        lambda layer: layer.attention.first_token_with_0,
        yardstick=lambda layer: layer.attention.uniform_with_0,
    ),
    Panel(
        "F-Attn without query 0",
        "share of attention",
        lambda layer: layer.attention.first_token,
        yardstick=lambda layer: layer.attention.uniform,
    ),
    Panel("M-Act: largest |hidden state|", "mean over sequences (log)", lambda layer: layer.hidden.mean_max_abs, log=True),
    Panel("M-Act, max of all sequences", "largest |hidden state| (log)", lambda layer: layer.hidden.max_abs, log=True),
    Panel("|SDPA output|: mean", "absolute value (log)", _output("mean_abs", 1), before=_output("mean_abs", 0), log=True),
    Panel("|SDPA output| below 0.01", "share of values", _output("below_001", 1), before=_output("below_001", 0)),
    Panel("|SDPA output| below 0.001", "share of values", _output("below_0001", 1), before=_output("below_0001", 0)),
    Panel("Largest attention logit", "q k / sqrt(d)", lambda layer: layer.attention.max_logit),
)
"""In rows of `COLUMNS`: the gate's scores; attention and hidden states; what attention yields."""


def layers_figure(analysis: Analysis) -> Figure:
    """All panels as a sheet of their own."""
    lines = [subtitle(analysis), "Lines: one a model, its layers counted from 1."]
    notes = [note for note in DEFINITIONS if note[0] != "PPL"]
    title = style.heading("What the gate does, layer by layer", lines)
    return style.sheet([title, *keys(analysis), strip(analysis), style.captions(notes)])


def keys(analysis: Analysis) -> list[style.Strip]:
    """The legend: which line is which model, and what dashes and dots say."""
    models = [
        Line2D([], [], color=style.colour(index), marker=style.marker(index), label=style.drawable(name))
        for index, name in enumerate(labels([model.name for model in analysis.models]))
    ]
    kinds = [
        Line2D([], [], color=style.GREY, linestyle="--", linewidth=1.2, label="F-Attn of uniform attention"),
        Line2D([], [], color=style.GREY, linestyle=":", label="|SDPA output| before the gate (in the model's colour)"),
        Line2D([], [], color=style.GREY, marker="o", label="|SDPA output| as the output projection gets it, after the gate"),
    ]
    return [style.key(models), style.key(kinds)]


def strip(analysis: Analysis) -> style.Strip:
    """The panels."""
    rows = -(-len(PANELS) // COLUMNS)

    def draw(part: SubFigure) -> None:
        width, height = style.inches(part)
        grid = part.add_gridspec(
            rows, COLUMNS, left=0.72 / width, right=1 - 0.2 / width, bottom=0.45 / height, top=1 - 0.32 / height, wspace=0.36, hspace=0.42
        )
        for index, panel in enumerate(PANELS):
            draw_panel(part.add_subplot(grid[index // COLUMNS, index % COLUMNS]), panel, analysis.models)

    return rows * ROW, draw


def draw_panel(axes: Axes, panel: Panel, models: Sequence[ModelResult]) -> None:
    """One panel: what a model lacks has no line."""
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit, labelpad=2)
    after = [_series(model, panel.of) for model in models]
    shown = list(after)
    if panel.yardstick is not None:
        shown += _draw_yardsticks(axes, [_series(model, panel.yardstick) for model in models])
    for index, values in enumerate(after):
        if panel.before is not None:
            before = _series(models[index], panel.before)
            axes.plot(range(1, before.size + 1), before, color=style.colour(index), linestyle=":", zorder=2.5)
            shown.append(before)
        every = max(1, values.size // 12)
        width = 1.5 + min(0.4 * (len(models) - 1 - index), 1.2)  # so that a line under an equal one shows
        look = {"color": style.colour(index), "marker": style.marker(index), "markevery": every, "label": models[index].name}
        axes.plot(range(1, values.size + 1), values, linewidth=width, markersize=3 + width, **look)
    style.layer_ticks(axes, max(len(model.layers) for model in models))
    (style.log_axis if panel.log else style.linear_axis)(axes, np.concatenate(shown))
    if not any(_visible(values, log=panel.log) for values in after):
        style.nothing(axes, panel.empty if all(np.isnan(values).all() for values in after) else "no finite value")


def _visible(values: np.ndarray, *, log: bool) -> bool:
    return bool((np.isfinite(values) & ((values > 0) | (not log))).any())


def _series(model: ModelResult, of: Of) -> np.ndarray:
    values = np.array([of(layer) for layer in model.layers], dtype=np.float64)
    return np.where(np.isfinite(values), values, nan)  # a gap, whatever axis


def _draw_yardsticks(axes: Axes, each: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One grey line where all models have the same yardstick (the longest of them), else one a model in its colour."""
    longest = max(each, key=len)
    same = all(np.array_equal(values, longest[: values.size], equal_nan=True) for values in each)
    for index, values in enumerate([longest] if same else each):
        shade = style.GREY if same else style.colour(index)
        axes.plot(range(1, values.size + 1), values, color=shade, linestyle="--", linewidth=1.2, marker="_" if values.size == 1 else None)
    return list(each)
