"""How pictures look: colours, sizes, sheets made of strips, files. Imports matplotlib, so it is imported by what draws, when it draws."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megagate.analysis.gate.table import write

DPI = 100
WIDTH = 14.0  # inches: 1,400 pixels
SIZE = 9.0  # points
GREY = "#5a5a5a"
FAINT = "#d9d9d9"

# Okabe and Ito's colours, which people who see fewer colours tell apart; yellow left out, which is too light for lines.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vPX*"  # as many as have no common divisor with the colours: 56 pairs before one comes again

_ROOM = 1.04
"""The renderer's hinting may widen a text a little."""

Draw = Callable[[SubFigure], None]
Strip = tuple[float, Draw]
"""Height in inches, and what draws it."""


def colour(index: int) -> str:
    """The colour of a model, by its place among the models, in all pictures."""
    return _COLOURS[index % len(_COLOURS)]


def marker(index: int) -> str:
    """Its marker, for those who see no colours."""
    return _MARKERS[index % len(_MARKERS)]


@contextmanager
def look() -> Iterator[None]:
    """The same look whatever the user's settings of matplotlib are; no text is read as a formula (names and tokens may hold dollars)."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings = {
            "text.parse_math": False,
            "font.size": SIZE,
            "axes.titlesize": SIZE + 1,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": FAINT,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.5,
            "lines.markersize": 4.5,
            "legend.frameon": False,
        }
        matplotlib.rcParams.update(settings)
        yield


def sheet(strips: Sequence[Strip], *, width: float = WIDTH) -> Figure:
    """A figure of strips under each other, each with its own height, so that nothing of one reaches into another."""
    heights = [height for height, _ in strips]
    figure = Figure(figsize=(width, sum(heights)), dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(len(strips), 1, height_ratios=heights)
    for row, (_, draw) in enumerate(strips):
        draw(figure.add_subfigure(grid[row]))
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, whole or not at all.

    Raises:
        DataError: It cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return write(path, stream.getvalue())


def inches(part: Figure | SubFigure) -> tuple[float, float]:
    """Width and height."""
    root = part.get_figure(root=True)
    return part.bbox.width / root.dpi, part.bbox.height / root.dpi


def text_width(text: str, size: float = SIZE, *, bold: bool = False) -> float:
    """In inches."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    points, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return points / 72 * _ROOM


def wrapped(text: str, width: float, size: float = SIZE, *, bold: bool = False) -> list[str]:
    """Lines that are no wider than so many inches; a word that is wider is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, bold=bold) <= width:
            lines[-1] = longer
            continue
        while text_width(word, size, bold=bold) > width and len(word) > 1:
            fits = next(end for end in range(len(word) - 1, 0, -1) if end == 1 or text_width(word[:end], size, bold=bold) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines or [""]


def drawable(text: str) -> str:
    """The text with what the font has no glyph for written as its number, such as \\u4e2d."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(char if ord(char) in glyphs and char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def heading(title: str, lines: Sequence[str]) -> Strip:
    """A title with lines of text under it, which are wrapped."""
    shown = [piece for line in lines for piece in wrapped(drawable(line), WIDTH - 0.6)]

    def draw(part: SubFigure) -> None:
        width, height = inches(part)
        part.text(0.3 / width, 1 - 0.3 / height, drawable(title), size=SIZE + 5, weight="bold", va="baseline")
        for index, line in enumerate(shown):
            part.text(0.3 / width, 1 - (0.55 + 0.2 * index) / height, line, va="baseline", color=GREY)

    return 0.5 + 0.2 * len(shown), draw


def captions(notes: Sequence[tuple[str, str]]) -> Strip:
    """What words mean, one under the other."""
    lines = [line for name, meaning in notes for line in wrapped(f"{name}: {meaning}", WIDTH - 0.7)]
    height = 0.2 * len(lines) + 0.25

    def draw(part: SubFigure) -> None:
        for index, line in enumerate(lines):
            part.text(0.3 / WIDTH, 1 - (0.2 * index + 0.15) / height, line, va="baseline")

    return height, draw


def key(handles: Sequence[Line2D]) -> Strip:
    """A legend in a strip of its own, in as few lines as fit."""
    names = [str(handle.get_label()) for handle in handles]
    columns = next(n for n in range(len(names), 0, -1) if n == 1 or _legend_width(names, n) <= WIDTH - 0.6)
    rows = -(-len(names) // columns)

    def draw(part: SubFigure) -> None:
        height = inches(part)[1]
        part.legend(
            handles=list(handles), loc="upper left", ncols=columns, bbox_to_anchor=(0.3 / WIDTH, 1), borderaxespad=0.2, handlelength=2.6,
            columnspacing=2.0, fontsize=SIZE, labelspacing=0.45, borderpad=min(0.2, height),
        )  # fmt: skip

    return 0.12 + 0.2 * rows, draw


def _legend_width(names: Sequence[str], columns: int) -> float:
    parts = np.array_split(np.array([text_width(name) for name in names]), columns)
    em = SIZE / 72
    return float(sum(part.max() for part in parts)) + columns * 3.4 * em + (columns - 1) * 2.0 * em


def layer_ticks(axes: Axes, layers: int) -> None:
    """Whole numbers from 1, and no more of them than are readable."""
    step = next(step for step in (1, 2, 3, 4, 6, 8, 12, 16, 24, *range(32, layers + 33, 16)) if layers / step <= 8.5)
    ticks = [1, *range(step, layers + 1, step)] if step > 1 else list(range(1, layers + 1))
    if step > 1 and layers - ticks[-1] >= step / 2:
        ticks.append(layers)
    axes.set_xticks(ticks)
    axes.set_xlim(1 - max(0.35, 0.02 * layers), layers + max(0.35, 0.02 * layers))
    axes.set_xlabel("layer", labelpad=1)


def linear_axis(axes: Axes, values: np.ndarray) -> None:
    """From 0 (or below it where values are), with plain numbers."""
    there = values[np.isfinite(values)]
    if there.size and there.min() >= 0:
        axes.set_ylim(0, 1.08 * there.max() or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def log_axis(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic, with plain numbers at some six ticks; values that are not positive are not shown."""
    there = values[np.isfinite(values) & (values > 0)]
    low, high = (there.min() / 1.25, there.max() * 1.25) if there.size else (0.5, 2.0)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    best = np.array([])
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = np.array([step * 10.0**decade for decade in decades for step in steps])
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        best = ticks if best.size == 0 or ticks.size <= 6 else best
    if best.size < 2:  # a narrow range
        best = MaxNLocator(4).tick_values(low, high)
    best = best[:: -(-best.size // 6)]
    axes.yaxis.set_major_locator(FixedLocator(best))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def nothing(axes: Axes, why: str) -> None:
    """Words in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY, wrap=False)
    axes.set_yticks([])
    axes.grid(visible=False)


def file_stems(names: Sequence[str]) -> list[str]:
    """A file's name for each model: what is not a letter, a digit, or one of "._-" becomes "_"; at most 80 characters; those that became
    the same (also to a disk that does not tell capitals apart) get "-2", "-3", ... in the order of the models.
    """
    stems: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".") or "model"
        candidates = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(names) + 2))
        stems.append(next(one for one in candidates if one.lower() not in {stem.lower() for stem in stems}))
    return stems


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e7 else f"{value:.4g}"
