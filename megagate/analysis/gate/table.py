"""The columns of the paper's Table 4 for our models, with the paper's rows under them: text, Markdown, CSV."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagate.analysis.gate.result import Analysis, ModelResult
from megagate.analysis.gate.words import DEFINITIONS, PAPER, PAPER_CAUTION, count, labels, number, size
from megagate.config.paper import presets
from megagate.data.files import AtomicFile, clean_errors, make_folder

Number = float | int | None


@dataclass(frozen=True)
class Column:
    """A figure of a model.

    Args:
        key: In CSV.
        group: What it belongs to, the upper line of the header.
        title: The lower line.
        of: The figure; None where there is none.
        show: As text.
        paper: Its name among the figures of the paper's presets; "" where the paper does not print it.
    """

    key: str
    group: str
    title: str
    of: Callable[[ModelResult], Number]
    show: Callable[[Number], str]
    paper: str = ""

    def of_paper(self, figures: Mapping[str, float | None]) -> Number:
        """The paper's figure of a row; None where it does not print one."""
        return figures.get(self.paper)


COLUMNS: tuple[Column, ...] = (
    Column("gate_score_mean", "gate score", "mean", lambda model: model.gate_mean, number, "gate_score_mean"),
    Column("gate_score_std", "gate score", "std", lambda model: model.gate_std, number),
    Column("gate_score_below_0.1", "gate score", "< 0.1", lambda model: model.gate_below_01, number),
    Column("gate_score_below_0.5", "gate score", "< 0.5", lambda model: model.gate_below_05, number),
    Column("m_act", "M-Act", "mean", lambda model: model.m_act, size, "max_activation"),
    Column("m_act_max", "M-Act", "max", lambda model: model.m_act_max, size),
    Column("f_attn_with_query_0", "F-Attn", "with query 0", lambda model: model.f_attn, number, "first_token_attention"),
    Column("f_attn_without_query_0", "F-Attn", "without", lambda model: model.f_attn_without_0, number),
    Column("f_attn_uniform_with_query_0", "F-Attn", "uniform", lambda model: model.uniform, number),
    Column("ppl", "PPL", "", lambda model: model.ppl, lambda value: number(value) if value is None or value < 1e4 else size(value), "ppl"),
)
"""Of every table, in order."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 4: its words and its figures by name."""

    title: str
    figures: Mapping[str, float | None]


def paper_rows() -> list[PaperRow]:
    """The paper's Table 4, from the presets."""
    return [PaperRow(f"({name[-1]}) {row.title}", row.figures) for name, row in presets().items() if name.startswith("paper/table4/")]


def table_text(analysis: Analysis) -> str:
    """For a terminal: columns under each other, the paper's rows under ours, then what the models are."""
    names = labels([model.name for model in analysis.models], 40)
    header = [["", *(column.group for column in COLUMNS)], ["model", *(column.title for column in COLUMNS)]]
    # A group's name stands over its first column.
    header[0] = [text if index == 0 or text != header[0][index - 1] else "" for index, text in enumerate(header[0])]
    ours = [[name, *figures] for name, figures in zip(names, _ours(analysis), strict=True)]
    paper = [[row.title, *figures] for row, figures in zip(paper_rows(), _papers(), strict=True)]
    lines = list(_aligned([*header, *ours, *paper]))
    rule = "-" * max(len(line) for line in lines)
    models = [f"{name}: {_about(model)}" for name, model in zip(names, analysis.models, strict=True)]
    top, body, bottom = lines[:2], lines[2 : 2 + len(ours)], lines[2 + len(ours) :]
    return "\n".join([subtitle(analysis), "", *top, rule, *body, rule, PAPER, *bottom, rule, PAPER_CAUTION, "", *models])


def subtitle(analysis: Analysis) -> str:
    """What was read, in words."""
    many = "sequence" if analysis.sequences == 1 else "sequences"
    tokens = "token" if analysis.seq_len == 1 else "tokens"
    read = f"{analysis.sequences:,} {many} of {analysis.seq_len:,} {tokens} of {analysis.data}"
    return f"{read}, computed in {analysis.dtype} on {analysis.device}"


def write_tables(analysis: Analysis, output: Path) -> list[Path]:
    """Writes `table.md` and `table.csv`, each whole or not at all; gives their paths.

    Raises:
        DataError: The folder cannot be written.
    """
    return [
        write(output / "table.md", markdown(analysis).encode()),
        write(output / "table.csv", comma_separated(analysis).encode()),
    ]


def write(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all, in a folder that is made where it is missing.

    Raises:
        DataError: It cannot be written.
    """
    with clean_errors("write", path):
        make_folder(path.parent)
        with AtomicFile(path) as file:
            file.write(content)
    return path


def markdown(analysis: Analysis) -> str:
    """A table with the paper's rows under ours, what the models are, and what the columns mean."""
    titles = ["model", "parameters", *(f"{column.group}, {column.title}" if column.title else column.group for column in COLUMNS)]
    blank = [""] * (len(titles) - 1)
    rows = [
        *([model.name, count(model.parameters), *figures] for model, figures in zip(analysis.models, _ours(analysis), strict=True)),
        [f"*{PAPER}*", *blank],
        *([row.title, "", *figures] for row, figures in zip(paper_rows(), _papers(), strict=True)),
    ]
    lines = [
        "# What the gate does",
        "",
        f"{_plain(subtitle(analysis))}.",
        "",
        _row(titles),
        _row(["---", *(["---:"] * (len(titles) - 1))]),
        *(_row(row) for row in rows),
        "",
        f"{PAPER_CAUTION} \"-\": no gate scores, or not printed in the paper; \"n/a\": not defined.",
        "",
        *(f"- **{_plain(one.name)}**: {_plain(_about(one))}" for one in analysis.models),
        "",
        *(f"- {name}: {meaning}" for name, meaning in DEFINITIONS),
    ]
    return "\n".join(lines) + "\n"


def comma_separated(analysis: Analysis) -> str:
    """All figures with all their digits, a row a model, the paper's rows last; empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["source", "model", "gate", "kind", "path", "parameters", "targets", "loss", *(column.key for column in COLUMNS)])
    for model in analysis.models:
        words = ["this analysis", model.name, model.gate, model.kind, model.path, model.parameters, model.targets, model.loss]
        writer.writerow([*words, *(column.of(model) for column in COLUMNS)])
    for row in paper_rows():
        writer.writerow([PAPER, row.title, *[""] * 6, *(column.of_paper(row.figures) for column in COLUMNS)])
    return stream.getvalue()


def _about(model: ModelResult) -> str:
    return f"{model.parameters:,} parameters; gate: {model.gate}; {model.kind}; {model.path}"


def _ours(analysis: Analysis) -> list[list[str]]:
    return [[column.show(column.of(model)) for column in COLUMNS] for model in analysis.models]


def _papers() -> list[list[str]]:
    return [[column.show(column.of_paper(row.figures)) for column in COLUMNS] for row in paper_rows()]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *figures]).rstrip()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """On one line, and no border of a table."""
    return " ".join(text.split()).replace("|", "\\|")
