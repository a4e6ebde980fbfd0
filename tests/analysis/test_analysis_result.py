"""The columns of the table from the figures of layers: every one by a formula written out here, of numbers that all differ."""

import csv
import io
from dataclasses import replace
from math import exp, isnan, nan, sqrt

import pytest

from megagate.analysis.gate.result import Analysis, ModelResult
from megagate.analysis.gate.table import COLUMNS, comma_separated
from megagate.probe.figures import AttentionFigures, GateFigures, HiddenFigures, LayerFigures, OutputFigures


def layer(gate: tuple[float, float, float, float] | None, attention: tuple[float, ...], hidden: tuple[float, float]) -> LayerFigures:
    scores = gate and GateFigures(*gate, head_means=(0.9,), dead_heads=0, saturated_heads=0, histogram=())
    largest, mean_largest = hidden
    output = OutputFigures((0.7, 0.6), (0.01, 0.02), (0.001, 0.002))
    return LayerFigures(scores, AttentionFigures(*attention, rows=5), HiddenFigures(largest, 3, mean_largest), output, None)


LAYERS = (
    layer((0.2, 0.03, 0.41, 0.83), (0.11, 0.17, 0.05, 0.09, 8.0), (70.0, 50.0)),
    layer((0.5, 0.13, 0.29, 0.61), (0.23, 0.31, 0.06, 0.10, 9.0), (900.0, 600.0)),
    layer(None, (0.47, 0.53, 0.07, 0.13, 7.0), (30.0, 20.0)),
)


def result(*layers: LayerFigures) -> ModelResult:
    return ModelResult("it", "runs/it", "native", "headwise", 12345, 1.25, 77, layers, {}, ())


def test_every_column_is_its_formula() -> None:
    model = result(*LAYERS)
    # The mean of two layers' scores, and the deviation of them all about it: within the layers, and between them.
    expected = {
        "gate_score_mean": (0.2 + 0.5) / 2,
        "gate_score_std": sqrt((0.03**2 + 0.13**2) / 2 + ((0.5 - 0.2) / 2) ** 2),
        "gate_score_below_0.1": (0.41 + 0.29) / 2,
        "gate_score_below_0.5": (0.83 + 0.61) / 2,
        "m_act": (50.0 + 600.0 + 20.0) / 3,
        "m_act_max": 900.0,
        "f_attn_with_query_0": (0.17 + 0.31 + 0.53) / 3,
        "f_attn_without_query_0": (0.11 + 0.23 + 0.47) / 3,
        "f_attn_uniform_with_query_0": (0.09 + 0.10 + 0.13) / 3,
        "ppl": exp(1.25),
    }
    row = next(csv.DictReader(io.StringIO(comma_separated(Analysis((model,), "text", 4, 5, "fp32", "cpu")))))
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-12)
    assert [column.key for column in COLUMNS] == list(expected)
    assert (row["parameters"], row["targets"], row["loss"]) == ("12345", "77", "1.25")


def test_what_is_no_number_stays_none() -> None:
    """One layer's scores are nan: so are the columns of the gate, and its shares, though nothing that is nan is below anything."""
    broken = replace(LAYERS[0], gate=GateFigures(nan, nan, 0.0, 0.0, (nan,), 0, 0, ()))
    model = result(broken, *LAYERS[1:])
    assert all(isnan(value) for value in (model.gate_mean, model.gate_std, model.gate_below_01, model.gate_below_05))
    alike = result(*[layer((0.3, 0.0, 0.1, 1.0), (0.1,) * 5, (1.0, 1.0))] * 3)
    assert alike.gate_std == pytest.approx(0, abs=1e-7)
