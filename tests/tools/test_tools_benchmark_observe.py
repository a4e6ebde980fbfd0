"""`tools/benchmark.py observe`: its table on times whose truth is known, and a small run. Its statistics are those of `gate`."""

import json
import random
from pathlib import Path

import pytest
from test_tools_benchmark import ROOT, run

from megagate.analysis.benchmark.gate import BASE, TWIN, Record
from megagate.analysis.benchmark.observe import OBSERVED, table

NANO = ROOT / "examples" / "configs" / "nano.yaml"


def record_of(look: float, *, pairs: int) -> Record:
    """Steps of about a second, with a look so many times as long."""
    draw = random.Random(3)
    record = Record.empty({"shape": "S", "threads": 1, "machine": "one"}, [OBSERVED])
    for _ in range(pairs):
        for model, cost in ((BASE, 1.0), (OBSERVED, look), (TWIN, 1.0)):
            for values in record.numbers[model].values():
                values.append(cost * (1 + draw.gauss(0, 0.002)))
    record.sessions.append(pairs)
    return record


@pytest.mark.parametrize(("look", "verdict"), [(1.4, "met"), (1.99, "met"), (2.0, "not separable"), (2.1, "missed")])
def test_a_look_at_every_fiftieth_step_costs_a_fiftieth_of_it(look: float, verdict: str) -> None:
    *_, twin, observed = [[cell.strip() for cell in line.split("|")] for line in table(record_of(look, pairs=60), machine="one")]
    assert observed[-2] == verdict and twin[-2] == "met"
    assert float(observed[2].split()[0]) == pytest.approx(100 * (look - 1), abs=0.3)
    assert float(observed[4].split()[0]) == pytest.approx(2 * (look - 1), abs=0.01)


def test_too_few_pairs_for_an_interval_show_nothing() -> None:
    *_, twin, observed = [[cell.strip() for cell in line.split("|")] for line in table(record_of(1.4, pairs=3), machine="one")]
    assert twin[-2] == observed[-2] == "not separable"


def test_a_small_study_of_a_config(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = ["observe", "--config", str(NANO), "--threads", "1", "--pairs", "2", "--json", str(record)]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    out = result.stdout.splitlines()
    assert out[0].startswith(f"{NANO}; 2 pairs in 1 processes") and out[-1].strip() == f"python tools/benchmark.py {' '.join(command)}"
    assert out[4].startswith("| A/A") and out[5].startswith("| a step with a look (`observed`) | ")
    numbers = json.loads(record.read_text())["numbers"]
    losses = [loss for model in numbers.values() for loss in model["loss"]]
    assert len(set(losses)) == len(losses) == 6, "steps of one run, each with tokens of its own"


def test_a_config_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    result = run("observe", "--config", str(tmp_path / "none.yaml"))
    assert (result.returncode, result.stdout) == (2, "") and "none.yaml" in result.stderr and "Traceback" not in result.stderr
