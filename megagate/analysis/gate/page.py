"""One page of everything: the table with the paper's rows, the panels, histograms and maps, and what the words mean."""

from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from megagate.analysis.gate import maps, panels, style
from megagate.analysis.gate.result import Analysis
from megagate.analysis.gate.table import COLUMNS, paper_rows, subtitle
from megagate.analysis.gate.words import ABSENT, DEFINITIONS, PAPER, PAPER_CAUTION, count, labels, shortened

_LINE = 0.22  # inches
_NAME, _GATE, _FIRST = 0.55, 3.45, 5.75  # where columns begin; figures share the rest


def page_figure(analysis: Analysis) -> Figure:
    """The page."""
    layers = style.heading("Layer by layer", ["Each line is a model, its layers counted from 1."])
    strips = [style.heading("What the gate does", [subtitle(analysis)]), _table(analysis), layers, *panels.keys(analysis)]
    return style.sheet([*strips, panels.strip(analysis), maps.overview(analysis), style.captions([*DEFINITIONS, ABSENT])])


def _table(analysis: Analysis) -> style.Strip:
    names = labels([model.name for model in analysis.models])
    paper = paper_rows()
    height = _LINE * (len(names) + len(paper) + 4.6)
    places = [_FIRST + (style.WIDTH - 0.4 - _FIRST) * (index + 1) / len(COLUMNS) for index in range(len(COLUMNS))]

    def draw(part: SubFigure) -> None:
        def put(x: float, line: float, text: str, **look: object) -> None:
            part.text(x / style.WIDTH, 1 - _LINE * line / height, text, va="baseline", **look)

        def rule(line: float) -> None:
            y = 1 - _LINE * line / height
            part.add_artist(Line2D([0.3 / style.WIDTH, 1 - 0.3 / style.WIDTH], [y, y], color=style.GREY, linewidth=0.8))

        put(_NAME, 2, "model", weight="bold")
        put(_GATE, 2, "parameters, gate", weight="bold")
        for index, (x, column) in enumerate(zip(places, COLUMNS, strict=True)):
            if index == 0 or column.group != COLUMNS[index - 1].group:
                put(x, 1, column.group, weight="bold", ha="right")
            put(x, 2, {"with query 0": "with q. 0"}.get(column.title, column.title), weight="bold", ha="right")
        rule(2.3)
        for row, (name, model) in enumerate(zip(names, analysis.models, strict=True)):
            line = 3.1 + row
            y = 1 - _LINE * (line - 0.22) / height
            look = {"color": style.colour(row), "marker": style.marker(row)}
            part.add_artist(Line2D([0.3 / style.WIDTH, 0.4 / style.WIDTH, 0.5 / style.WIDTH], [y] * 3, markevery=[1], **look))
            put(_NAME, line, style.drawable(name))
            put(_GATE, line, shortened(style.drawable(f"{count(model.parameters)}, {model.gate}"), 34))
            for x, column in zip(places, COLUMNS, strict=True):
                put(x, line, column.show(column.of(model)), ha="right")
        after = len(names) + 2.4
        rule(after)
        put(0.3, after + 0.75, f"{PAPER}. {PAPER_CAUTION}", color=style.GREY, style="italic", size=style.SIZE - 1)
        for row, one in enumerate(paper):
            line = after + 1.75 + row
            put(_NAME, line, one.title, color=style.GREY)
            for x, column in zip(places, COLUMNS, strict=True):
                put(x, line, column.show(column.of_paper(one.figures)), ha="right", color=style.GREY)
        rule(after + 1 + len(paper) + 0.1)

    return height, draw
