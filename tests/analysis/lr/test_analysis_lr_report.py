"""What a report writes: JSON, tables and pictures."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from lr_studies import RATES, facts, study

from megagate.analysis.gate import style
from megagate.analysis.lr.report import report_of, report_study, write_report
from megagate.errors import DataError, RunError

FILES = ["report.json", "table.md", "gaps.csv", "variants.csv", "loss.png", "gaps.png", "interaction.png", "activation.png", "page.html"]


def _runs() -> list[dict[str, Any]]:
    runs = study(facts(), lambda variant, rung: -0.1 * rung if variant == "headwise" else 0.0, noise=0.03)
    for index, run in enumerate(runs):
        run["peak_hidden"] = 1e6 * run["lr"] ** 2 * (1 + index % 3)
    runs[-1].update(status="diverged", val_loss=None, step=300)
    return runs


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report")
    paths = write_report(facts(), _runs(), output)
    assert [path.name for path in paths] == FILES
    return output


def test_the_json_is_the_report(written: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    there = json.loads((written / "report.json").read_text(), parse_constant=refuse)
    assert there == json.loads(json.dumps(report_of(facts(), _runs())))
    assert {one["variant"] for one in there["verdicts"]} == {"headwise", "sandwich", "half"}
    assert there["facts"]["learning_rates"] == list(RATES)


def test_the_csv_holds_every_value(written: Path) -> None:
    report = json.loads((written / "report.json").read_text())
    rows = list(csv.DictReader((written / "gaps.csv").open()))
    for one in report["statistics"]["comparisons"]:
        for rung in one["rungs"]:
            keys = {"variant": one["variant"], "reference": one["reference"], "what": "gap", "lr": str(rung["lr"])}
            (row,) = [row for row in rows if keys.items() <= row.items()]
            values = [float(row[f"seed_{seed}"]) if row[f"seed_{seed}"] else None for seed in range(5)]
            assert values == rung["gap"]["values"]
            assert float(row["t_low"]) == rung["gap"]["interval"]["low"]
    levels = list(csv.DictReader((written / "variants.csv").open()))
    assert [(row["variant"], float(row["lr"])) for row in levels] == [(variant, lr) for variant in facts().variants for lr in RATES]
    assert levels[-1]["diverged"] == "1"
    assert float(levels[0]["val_loss"]) == report["statistics"]["rows"][0]["rungs"][0]["levels"]["val_loss"]


def test_the_csv_holds_what_decides_of_pairs_that_diverged(written: Path) -> None:
    """Of them the capped figures are others than those of the pairs that are left."""
    comparisons = json.loads((written / "report.json").read_text())["statistics"]["comparisons"]
    rows = list(csv.DictReader((written / "gaps.csv").open()))

    def told(one: dict[str, Any], what: str, lr: object = "") -> list[float | None]:
        keys = {"variant": one["variant"], "reference": one["reference"], "what": what, "lr": str(lr)}
        (row,) = [row for row in rows if keys.items() <= row.items()]
        return [float(row[f"seed_{seed}"]) if row[f"seed_{seed}"] else None for seed in range(5)]

    for one in comparisons:
        found = one["interaction"]
        assert told(one, "interaction") == found["gap"]["values"] and told(one, "interaction_capped") == found["capped"]["values"]
        assert told(one, "gap_at_top") == found["at_top"]["values"] and told(one, "gap_at_best") == found["at_best"]["values"]
        assert told(one, "gap_at_top_capped") == found["capped_at_top"]["values"] and told(one, "ladder_mean") == one["ladder"]["values"]
        for rung in one["rungs"]:
            assert told(one, "log2_activation", rung["lr"]) == rung["activation"]["values"]
    half = next(one for one in comparisons if one["variant"] == "half")
    assert told(half, "interaction")[4] is None and told(half, "interaction_capped")[4] > 1
    assert told(half, "gap_at_top")[4] is None and told(half, "gap_at_top_capped")[4] > 1


def test_the_table_tells_verdicts_and_rules(written: Path) -> None:
    text = (written / "table.md").read_text()
    report = json.loads((written / "report.json").read_text())
    for line in [one["line"] for one in report["verdicts"]] + report["cautions"] + list(report["rules"].values()):
        assert line in text
    assert "(n=5, 5 c)" in text
    assert "(n=4, 4 c, 1 d)" in text
    losses = [line for line in text.splitlines() if line.startswith("| baseline")][0]
    assert losses.count("(n=5") == 5
    gaps = [line for line in text.splitlines() if line.startswith("| half")][1]
    assert [cell.rpartition("n=")[2].strip() for cell in gaps.split("|")[2:7]] == ["5", "5", "5", "5", "4"]
    tables = [line for line in text.splitlines() if line.startswith("| half")]
    assert [line.count("|") for line in tables] == [7, 10, 7, 12]


def test_the_json_holds_every_run(written: Path) -> None:
    runs = json.loads((written / "report.json").read_text())["runs"]
    assert [(run["variant"], run["lr"], run["seed"]) for run in runs] == [
        (variant, lr, seed) for variant in facts().variants for lr in RATES for seed in range(5)
    ]
    given = {(run["variant"], run["lr"], run["seed"]): run for run in _runs()}
    assert all(given[run["variant"], run["lr"], run["seed"]] == run for run in runs)
    endless = _runs()
    endless[0]["train_loss"] = float("inf")
    assert report_of(facts(), endless)["runs"][0]["train_loss"] is None


def test_the_csv_holds_sensitivities(written: Path) -> None:
    rows = [row for row in csv.DictReader((written / "gaps.csv").open()) if row["what"].startswith("sensitivity")]
    assert len(rows) == 2 * (4 + 3)
    found = json.loads((written / "report.json").read_text())["statistics"]["rows"][1]
    want = {("", "own"): "own_best", ("", "pooled"): "pooled_best", ("baseline", "own"): "own_minus_baseline"}
    want["baseline", "pooled"] = "pooled_minus_baseline"
    for (reference, best), key in want.items():
        named = {"variant": "headwise", "reference": reference, "what": f"sensitivity_{best}_best"}
        (row,) = [row for row in rows if named.items() <= row.items()]
        assert [float(row[f"seed_{seed}"]) for seed in range(5)] == found[key]["values"]


def test_a_bar_far_above_leaves_the_picture_to_the_losses(tmp_path: Path) -> None:
    shown = []
    for name, bar in (("near", 2.9), ("far", 9.0)):
        of = facts(collapsed_above=bar)
        write_report(of, study(of, lambda variant, rung: 0.0), tmp_path / name)
        pixels = np.round(matplotlib.image.imread(tmp_path / name / "loss.png")[150:, :, :3] * 255)
        ink = np.round(np.array(matplotlib.colors.to_rgb(style.colour(1))) * 255)
        rows = np.flatnonzero((np.abs(pixels - ink).max(axis=2) <= 1).any(axis=1))
        shown.append((rows[-1] - rows[0]) / len(pixels))
    assert shown[1] > 0.5 and shown[1] >= shown[0] > 0.3


@pytest.mark.parametrize("name", ["loss.png", "gaps.png", "interaction.png", "activation.png"])
def test_pictures_show_every_variant(written: Path, name: str) -> None:
    pixels = np.round(matplotlib.image.imread(written / name)[150:, :, :3] * 255)  # below the heading and the key
    assert pixels.shape[1] == 1400
    for index in range(1, 4):  # the first is black, as the text is
        ink = np.round(np.array(matplotlib.colors.to_rgb(style.colour(index))) * 255)
        found = int((np.abs(pixels - ink).max(axis=2) <= 1).sum())
        assert found > 100, f"{facts().variants[index]} is not in {name}"


def test_pictures_show_the_figures_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {}
    monkeypatch.setattr(style, "save", lambda figure, path: figures.setdefault(path.name, figure) and path)
    write_report(facts(), _runs(), tmp_path)
    found = report_of(facts(), _runs())["statistics"]
    (loss,), (activation,) = (
        [axes for axes in figures[name].axes if axes.get_xscale() == "log"] for name in ("loss.png", "activation.png")
    )
    crosses = [line for line in loss.lines if line.get_marker() == "x"]
    assert len(crosses) == 1 and crosses[0].get_xdata()[0] == pytest.approx(RATES[-1], rel=0.1)  # that of half
    (line,) = [line for line in activation.lines if len(line.get_xdata()) == 5 and line.get_color() == style.colour(1)][-1:]
    peaks = [rung["peaks"] for rung in found["rows"][1]["rungs"]]
    assert list(line.get_ydata()) == pytest.approx([float(np.exp(np.mean(np.log(of_rung)))) for of_rung in peaks])
    shown = [axes.containers for axes in figures["interaction.png"].axes if axes.containers]
    for panel, reference in zip(shown, ("baseline", "half"), strict=True):
        comparisons = [one for one in found["comparisons"] if one["reference"] == reference]
        kinds = ["capped" if one["interaction"]["lost"] else "gap" for one in comparisons]
        assert kinds == (["gap", "gap", "capped"] if reference == "baseline" else ["capped", "capped"])
        means = [one["interaction"][kind]["interval"]["mean"] for one, kind in zip(comparisons, kinds, strict=True)]
        assert [bars.lines[0].get_ydata()[0] for bars in panel] == pytest.approx(means)


def test_a_study_without_runs_and_one_with_strange_names_are_written(tmp_path: Path) -> None:
    strange = facts(name="$x_1$ </script>", variants=("base|line", "<b>$gate$", "half"))
    assert len(write_report(strange, [], tmp_path / "none")) == len(FILES)
    assert len(write_report(strange, study(strange, lambda variant, rung: 0.0), tmp_path / "some")) == len(FILES)
    assert "| base/line | 2." in (tmp_path / "some" / "table.md").read_text()


def _study() -> dict[str, Any]:
    of = facts()
    decides = {"name": of.name, "baseline": "baseline", "min_lr_share": 0.1, "steps": of.steps, "stop.window": 50}
    decides |= {"collapsed_above": of.collapsed_above, "top_rungs": of.top_rungs, "learning_rates": list(RATES), "seeds": list(of.seeds)}
    for variant in ("headwise", "baseline", "sandwich", "half"):
        decides |= {f"variants.{variant}.model.hidden_size": 64, f"variants.{variant}.model.vocab_size": 256}
    return {"name": of.name, "decides": decides, "runs": _runs()}


def test_a_study_tells_its_own_facts(written: Path, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps(_study()))
    report_study(tmp_path / "study.json", tmp_path / "report")
    assert (tmp_path / "report" / "report.json").read_bytes() == (written / "report.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "study.json: cannot be read .*; run the study first"),
        ("{", "is no JSON .*; run the study again"),
        ("[]", "holds no study"),
        ('{"runs": []}', "holds no decides"),
        ('{"runs": [], "decides": []}', "holds no study"),
        ('{"runs": [3], "decides": {}}', "holds no study"),
        ('{"runs": {"a": 1}, "decides": {}}', "holds no study"),
        ('{"runs": 3, "decides": {}}', "holds no study"),
        ('{"runs": [], "decides": {"baseline": "baseline", "name": "x"}}', "holds no learning_rates"),
    ],
)
def test_what_is_no_study_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(RunError, match=words):
        report_study(tmp_path / "study.json", tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", 3),
        ("learning_rates", 3),
        ("learning_rates", ["a"]),
        ("learning_rates", [-1.0, 4e-3]),
        ("learning_rates", [[4e-3]]),
        ("seeds", None),
        ("seeds", [0.5]),
        ("steps", "x"),
        ("collapsed_above", "x"),
        ("top_rungs", "x"),
        ("variants.baseline.model.vocab_size", 0),
    ],
)
def test_a_study_of_other_values_is_told(name: str, value: Any, tmp_path: Path) -> None:
    content = _study()
    content["decides"][name] = value
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=f"study.json: decides: {name.rpartition('.')[2]} .* is none of a study"):
        report_study(tmp_path / "study.json", tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("began", [3, {}, {"learning_rates": [4e-3]}, {"learning_rates": ["a"], "seeds": [0]}])
def test_a_study_that_began_with_something_else_is_told(began: Any, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps(_study() | {"began_with": began}))
    with pytest.raises(RunError, match="began_with .* is none of a study"):
        report_study(tmp_path / "study.json", tmp_path / "report")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_report(facts(), _runs(), tmp_path / "file" / "inner")
