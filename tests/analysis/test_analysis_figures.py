"""Pictures and tables of an analysis: what they show, and that nothing covers anything or is cut."""

import csv
import io
from pathlib import Path

import made
import matplotlib.image
import numpy as np
import pytest

from megagate.analysis.gate import maps, page, panels, style
from megagate.analysis.gate.figures import draw
from megagate.analysis.gate.table import COLUMNS, comma_separated, markdown, table_text
from megagate.errors import DataError

LONG = [f"a very long name of a model, {'x' * 50} {index}" for index in range(6)]


def _subfigures(figure):
    return [figure, *figure.subfigs]


def _boxes(figure):
    """Every text and legend of the figure itself, not of axes."""
    return [art.get_window_extent() for part in _subfigures(figure) for art in (*part.texts, *part.legends)]


PICTURES = {
    "page": page.page_figure,
    "layers": panels.layers_figure,
    "gate scores": maps.gate_figure,
    "maps": lambda analysis: maps.maps_figure(analysis.models[0]),
}


@pytest.mark.parametrize(("models", "layers", "names"), [(1, 1, None), (3, 6, None), (6, 48, LONG)])
@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_of_a_picture_is_cut_or_covered(picture: str, models: int, layers: int, names) -> None:
    with style.look():
        figure = PICTURES[picture](made.analysis(models=models, layers=layers, names=names, seq_len=1 if layers == 1 else 512))
        figure.draw_without_rendering()
        inside = figure.bbox.padded(1)
        everything = _boxes(figure) + [axes.get_tightbbox() for axes in figure.axes]
        for box in everything:
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        for box in _boxes(figure):
            assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
        for one in figure.axes:
            assert not [other.get_title("left") for other in figure.axes if other is not one and one.get_tightbbox().overlaps(other.bbox)]
        texts = [text.get_window_extent() for part in _subfigures(figure) for text in part.texts if text.get_text()]
        assert not any(first.overlaps(second) for index, first in enumerate(texts) for second in texts[:index])


def test_panels_hold_the_figures_and_one_colour_a_model() -> None:
    analysis = made.analysis(models=3, layers=6)
    with style.look():
        figure = panels.layers_figure(analysis)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [panel.title for panel in panels.PANELS]
    gate, attention, output = figure.axes[0], figure.axes[4], figure.axes[8]
    by_name = {line.get_label(): line for line in attention.lines}
    for index, model in enumerate(analysis.models):
        np.testing.assert_array_equal(by_name[model.name].get_ydata(), [layer.attention.first_token_with_0 for layer in model.layers])
        np.testing.assert_array_equal(by_name[model.name].get_xdata(), [1, 2, 3, 4, 5, 6])
        assert by_name[model.name].get_color() == style.colour(index)
    dashed = [line for line in attention.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1
    np.testing.assert_array_equal(dashed[0].get_ydata(), [layer.attention.uniform_with_0 for layer in analysis.models[0].layers])
    assert np.isnan(gate.lines[0].get_ydata()).all() and gate.lines[1].get_ydata()[0] == analysis.models[1].layers[0].gate.mean
    dotted = [line.get_ydata()[0] for line in output.lines if line.get_linestyle() == ":"]
    assert dotted == [model.layers[0].output.mean_abs[0] for model in analysis.models]
    assert all(axes.get_xlabel() == "layer" and axes.get_ylabel() for axes in figure.axes)


def test_maps_hold_what_keys_a_query_sees() -> None:
    model = made.analysis(map_tokens=5, tokens=["<s>", " $x$", "\n", "\u4e2d", " b"]).models[0]
    with style.look():
        image = maps.maps_figure(model).axes[0].images[0].get_array()
    assert image.mask.tolist() == np.triu(np.ones((5, 5), dtype=bool), 1).tolist()
    np.testing.assert_array_equal(image.filled(0), model.maps[0])


def test_ticks_name_tokens_whole_or_not_at_all() -> None:
    model = made.analysis(map_tokens=4, tokens=["\n", " of", "incomprehensible", "\u4e2d\u6587"]).models[0]
    with style.look():
        axes = maps.maps_figure(model).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["\\n", "\u2423of", "inco…ible", "(2 chars)"]


def test_files_are_pictures_with_safe_names(tmp_path: Path) -> None:
    paths = draw(made.analysis(models=2, names=["../a b", "../a_b"], tokens=["$", "\n", "\u4e2d"]), tmp_path / "new")
    ours = ["page.png", "layers.png", "gate_scores.png"]
    each = [f"{stem}_selected_layer_attention_maps.png" for stem in ("_a_b", "_a_b-2")]
    assert [path.name for path in paths] == [*ours, *each]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(ours + each)
    assert all(matplotlib.image.imread(path).shape[1] == 1400 for path in paths)
    with pytest.raises(DataError, match="cannot write"):
        draw(made.analysis(models=1, layers=1), paths[0])


def test_tables_hold_ours_and_the_papers_numbers() -> None:
    analysis = made.analysis(models=2, names=["a|b", "c"], gated=[False, True])
    rows = list(csv.DictReader(io.StringIO(comma_separated(analysis))))
    assert [float(rows[1][column.key]) for column in COLUMNS] == [column.of(analysis.models[1]) for column in COLUMNS]
    assert rows[0]["gate_score_mean"] == "" and float(rows[3]["m_act"]) == 94 and float(rows[3]["f_attn_with_query_0"]) == 0.048
    text = table_text(analysis)
    assert "1,053" in text and "15A2B" in text and "not our numbers with the paper's" in text
    assert "a\\|b" in markdown(analysis) and "15A2B" in markdown(analysis)


@pytest.mark.parametrize(
    ("picture", "words"),
    [("page", ["Gate score", "F-Attn", "M-Act", "PPL", "Uniform attention"]), ("layers", ["Gate score", "F-Attn", "M-Act", "SDPA output"])],
)
def test_a_picture_says_what_it_shows(picture: str, words: list[str]) -> None:
    with style.look():
        figure = PICTURES[picture](made.analysis(models=2, layers=2))
    texts = [text.get_text() for part in _subfigures(figure) for text in part.texts]
    assert all(any(text.startswith(f"{word}: ") for text in texts) for word in words)
    with style.look():
        histograms = PICTURES["gate scores"](made.analysis(models=2, layers=2))
    assert any(text.get_text().startswith("Gate score: ") for part in _subfigures(histograms) for text in part.texts)
