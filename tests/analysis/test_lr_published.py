"""The published studies: their records are of the specs beside them, and tables and README say what a report of the records says."""

import json
import runpy
from pathlib import Path

import pytest

from megagate.analysis.lr.spec_file import read_spec

ROOT = Path(__file__).parents[2]
LAB = ROOT / "examples" / "lr_stability"
PUBLISHED = sorted((LAB / "results").iterdir())


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_record_is_of_its_spec_and_its_table_is_the_reports(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    spec = read_spec(LAB / f"{folder.name}.yaml")
    decides = spec.decides()
    shared = decides.keys() & record["decides"].keys()
    assert {"steps", "learning_rates", "seeds", "collapsed_above", "variants.baseline.model.hidden_size"} <= shared
    assert {key: record["decides"][key] for key in shared} == {key: decides[key] for key in shared}
    assert [(run["variant"], run["lr"], run["seed"]) for run in record["runs"]] == [tuple(key) for key in spec.runs()]

    main = runpy.run_path(str(ROOT / "tools" / "lr_stability.py"))["main"]
    assert main(["report", str(folder / "study.json"), "--output", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (folder / "table.md").read_text(encoding="utf-8") == table
    lines = table.splitlines()
    said = _block((ROOT / "README.md").read_text(encoding="utf-8"), folder.name)
    assert [line for line in said if line not in lines] == []
    verdicts = [line for line in lines if ": stability " in line]
    assert verdicts != [] and [line for line in verdicts if line not in said] == [], "none is left out"


def _block(readme: str, name: str) -> list[str]:
    """The lines that README has from a study's table: those between its two marks."""
    inside = readme.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    return [line for line in inside.splitlines() if line.strip()]
