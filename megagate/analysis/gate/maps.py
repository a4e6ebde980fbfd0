"""Attention maps and histograms of gate scores."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from megagate.analysis.gate import style
from megagate.analysis.gate.result import Analysis, AttentionMap, ModelResult
from megagate.analysis.gate.table import subtitle
from megagate.analysis.gate.words import defined, labels, shortened
from megagate.probe.figures import GATE_BINS

_LABELS = 32  # tokens named on an axis
_WIDEST = 9  # characters of a name
_GREYS = ("#b0b0b0", "#808080", "#505050", "#000000")
_DASHES = ("-", "--", "-.", ":")


def maps_figure(model: ModelResult) -> Figure:
    """The maps of a model's chosen layers on one scale, with their tokens."""
    chosen = sorted(model.maps)
    rows = -(-len(chosen) // 2)
    about = (
        "Rows: queries. Columns: keys. Colour: share of a query's attention, softmax(q k / sqrt(d)) before any gate, mean over heads, on a "
        "square-root scale; white: not visible."
    )

    def draw(part: SubFigure) -> None:
        width, height = style.inches(part)
        grid = part.add_gridspec(rows, 2, left=1.1 / width, right=1 - 1.3 / width, bottom=1.1 / height, top=1 - 0.35 / height, wspace=0.22)
        for place, layer in enumerate(chosen):
            axes = part.add_subplot(grid[place // 2, place % 2])
            image = _map(axes, model.maps[layer], f"Layer {layer + 1} of {len(model.layers)}")
            _name_tokens(axes, model.map_tokens)
        bar = part.add_axes((1 - 0.95 / width, 1.1 / height, 0.2 / width, 1 - 1.45 / height))
        part.colorbar(image, cax=bar, label="share of attention, mean over heads")

    title = f"Attention maps of {labels([model.name])[0]}"
    what = f"The first {len(model.map_tokens)} tokens of the first sequence. Share on the first token, mean over these queries."
    gate = f"Gate: {model.gate}. {what}"
    return style.sheet([style.heading(title, [gate, about]), (6.9 * rows, draw)])


def gate_figure(analysis: Analysis) -> Figure:
    """A row for each model with scores: the histogram of all layers with some layers as lines, and each layer's as a row of colours."""
    names = labels([model.name for model in analysis.models])
    scored = [index for index, model in enumerate(analysis.models) if any(layer.gate is not None for layer in model.layers)]
    about = (
        "Left: all layers (filled) and some of them (lines). Right: each layer's histogram, dark where many scores lie. "
        "Scores beyond 0 to 1 lie in the outer bins."
    )
    strips = [style.heading("Histograms of gate scores", [subtitle(analysis), about])]
    strips += [(3.1, _scores(analysis.models[index], index, names[index])) for index in scored]
    if not scored:
        strips.append((2.0, lambda part: style.nothing(part.add_subplot(), "no model here has a gate with scores") or None))
    return style.sheet([*strips, style.captions(defined("Gate score"))])


def overview(analysis: Analysis) -> style.Strip:
    """For the page: the histograms of all models in one panel, and a map of each model."""
    models = analysis.models
    names = labels([model.name for model in models], 20 if len(models) < 5 else 14)
    common = set.intersection(*(set(model.maps) for model in models))

    def draw(part: SubFigure) -> None:
        width, height = style.inches(part)
        low, tall = 0.5 / height, 1 - 1.15 / height
        axes = part.add_axes((0.72 / width, low, 2.9 / width, tall))
        axes.set_title("Histogram of gate scores, all layers")
        for index, model in enumerate(models):
            shares = _shares(model)
            if shares is not None:
                axes.stairs(shares, np.linspace(0, 1, GATE_BINS + 1), color=style.colour(index), linewidth=1.4, label=model.name)
        axes.set_xlim(0, 1)
        axes.set_xlabel("gate score", labelpad=1)
        axes.set_ylabel("share of scores in a bin of 0.02", labelpad=2)
        if not any(_shares(model) is not None for model in models):
            style.nothing(axes, "no model here has\na gate with scores")
        room = (width - 4.9) / max(3, len(models))
        side = min(room - 0.25, height - 1.15)
        image = None
        for index, model in enumerate(models):
            if not model.maps:
                continue
            layer = max(sorted(common or model.maps), key=lambda one: max(_first(m.maps[one]) for m in models if one in m.maps))
            axes = part.add_axes(((4.2 + room * index) / width, low, side / width, side / height))
            title = f"{style.drawable(names[index])}\nlayer {layer + 1}"
            image = _map(axes, model.maps[layer], title, color=style.colour(index), short=True)
            axes.set(xticks=[], yticks=[], xlabel="key (token)")
            axes.set_ylabel("query (token)" if index == 0 else "")
        if image is not None:
            bar = part.add_axes((1 - 0.62 / width, low, 0.12 / width, tall))
            part.colorbar(image, cax=bar).set_label("share of attention", labelpad=1)

    return 3.3, draw


def _first(values: AttentionMap) -> float:
    return float(np.asarray(values)[:, 0].mean())


def _map(axes: Axes, values: AttentionMap, title: str, *, color: str = "black", short: bool = False) -> AxesImage:
    square = np.asarray(values, dtype=np.float64)
    seen = np.ma.masked_where(np.triu(np.ones_like(square, dtype=bool), 1), square)
    image = axes.imshow(seen, cmap="viridis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.grid(visible=False)
    share = f"{_first(values):.3f} on first" + ("" if short else " token")
    words = f"{title}\n{share}" if short else f"{title}: {share}"
    axes.set_title(words, color=color, fontsize=style.SIZE - 1 if short else style.SIZE + 1)
    return image


def _name_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    step = -(-len(tokens) // _LABELS)
    places = range(0, len(tokens), step)
    names = [_named(tokens[place].replace(" ", "\u2423")) for place in places]
    axes.set_xticks(list(places), names, rotation=90, fontsize=style.SIZE - 1.5)
    axes.set_yticks(list(places), names, fontsize=style.SIZE - 1.5)
    note = "" if step == 1 else f" (1 of {step} named)"
    axes.set_xlabel(f"key{note}")
    axes.set_ylabel("query")


def _named(token: str) -> str:
    """On one line; of one that is long with characters that the font lacks, only how many it has."""
    shown = style.drawable(token)
    escaped = len(shown) > len(token)
    return f"({len(token)} chars)" if escaped and len(shown) > _WIDEST else shortened(shown, _WIDEST)


def _shares(model: ModelResult) -> np.ndarray | None:
    """Each layer weighs alike."""
    found = [np.array(layer.gate.histogram, dtype=float) for layer in model.layers if layer.gate is not None]
    return np.mean([counts / max(1.0, counts.sum()) for counts in found], axis=0) if found else None


def _scores(model: ModelResult, index: int, name: str) -> style.Draw:
    scored = [number for number, layer in enumerate(model.layers) if layer.gate is not None]
    table = np.full((len(model.layers), GATE_BINS), np.nan)
    for number in scored:
        counts = np.array(model.layers[number].gate.histogram, dtype=float)
        table[number] = counts / max(1.0, counts.sum())
    some = sorted({scored[round(place * (len(scored) - 1) / 3)] for place in range(4)})

    def draw(part: SubFigure) -> None:
        width, height = style.inches(part)
        low, tall = 0.5 / height, 1 - 0.85 / height
        axes = part.add_axes((0.72 / width, low, 5.0 / width, tall))
        edges = np.linspace(0, 1, GATE_BINS + 1)
        axes.stairs(np.nanmean(table, axis=0), edges, fill=True, color=style.colour(index), alpha=0.55, label="all layers")
        for line, number in enumerate(some):
            axes.stairs(table[number], edges, color=_GREYS[line], linestyle=_DASHES[line], linewidth=1.3, label=f"layer {number + 1}")
        axes.set_title(f"{style.drawable(name)}: mean {model.gate_mean:.3f}", color=style.colour(index))
        axes.set(xlim=(0, 1), xlabel="gate score", ylabel="share of scores in a bin of 0.02")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        heat = part.add_axes((7.7 / width, low, 5.1 / width, tall))
        extent = (0, 1, len(table) + 0.5, 0.5)
        image = heat.imshow(table, aspect="auto", cmap="cividis_r", extent=extent, norm=PowerNorm(0.5, 0))
        heat.grid(visible=False)
        heat.set_title("each layer")
        heat.set(xlabel="gate score", ylabel="layer")
        heat.yaxis.get_major_locator().set_params(integer=True)
        part.colorbar(image, cax=part.add_axes((12.95 / width, low, 0.15 / width, tall)), label="share of scores")

    return draw
