"""`tools/benchmark.py checkpoint` at tiny sizes: rows and ratios come out, the made-up state is a model's, and nothing is left."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from megagate.analysis.benchmark.checkpoint import ROWS
from megagate.analysis.benchmark.checkpoint_state import Layout, cut, made_up_shapes
from megagate.analysis.benchmark.copying import copy
from megagate.checkpoint import reshard
from megagate.checkpoint.box import Box, find_flaw
from megagate.config.count import parameter_shapes
from megagate.config.paper import preset

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "checkpoint", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_rows_end_with_a_table_and_leave_nothing(tmp_path: Path) -> None:
    place, record = tmp_path / "place", tmp_path / "record.json"
    place.mkdir()
    result = run("--rows", "save,load", "--megabytes", 2, "--ranks", 2, "--rounds", 3, "--folder", place, "--json", record)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "blake3" in lines[0] and list(place.iterdir()) == []
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    assert [row[0].split("`")[1] for row in table] == ["save", "load", "load"]
    assert table[0][0].startswith("2 ranks (tp2 ep2)") and table[0][5] == ">= 0.5" and table[0][6] in ("met", "missed", "open")
    assert [row[5:] for row in table[1:]] == [["-", "-"]] * 2
    rows = json.loads(record.read_text())["rows"]
    state = 12 * sum(map(prod, made_up_shapes(2).values()))
    for key, name in (("save", "save"), ("load", "load"), ("load", "verify"), ("load", "read")):
        notes = rows[key][name]["notes"]
        assert [note["bytes"] for note in notes] == [state] * 3 and all(note["seconds"] > 0 and note["cpu"] > 0 for note in notes)
    assert all(state < note["bytes"] < 1.1 * state for note in rows["save"]["cp"]["notes"]), "the same bytes, headers and the index"


def test_bad_options_are_told(tmp_path: Path) -> None:
    result = run("--rows", "nothing", "--folder", tmp_path)
    assert result.returncode == 2 and all(f"{key} ({row.title})" in result.stderr for key, row in ROWS.items())
    result = run("--megabytes", "1e12", "--folder", tmp_path)
    assert result.returncode == 2 and "GB free; these rows need" in result.stderr


def test_cp_is_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("one", "two"):
        (tmp_path / "a" / name).write_bytes(bytes(1000))
    notes = copy(str(tmp_path / "a"), str(tmp_path / "b"))()
    assert notes["bytes"] == 2000 and notes["seconds"] > 0 and not (tmp_path / "b").exists()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("world", "tp", "ep"), [(1, 1, 1), (4, 2, 4), (4, 4, 2), (8, 2, 4), (64, 4, 8)])
def test_cuts_hold_every_element_once_and_share_evenly(world: int, tp: int, ep: int, stage: int) -> None:
    shapes = made_up_shapes(1000) if world < 64 else parameter_shapes(preset("paper/table1/row05").config.model)
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    held = []
    for mine in cut(shapes, Layout(world, tp, ep, stage)):
        held.append(sum(one.stop - one.start for one in mine))
        for one in mine:
            for box in reshard.boxes(one.shard.shape, one.start, one.stop):
                offset = tuple(a + b for a, b in zip(one.shard.offset, box.offset, strict=True))
                boxes[one.name].append(Box(offset, box.shape))
    assert all(find_flaw(shapes[name], found) is None for name, found in boxes.items())
    assert max(held) < 1.2 * sum(held) / world


def test_the_state_has_the_size_asked_for() -> None:
    for megabytes, share in ((10, 0.3), (1000, 0.05), (5000, 0.02)):
        assert abs(12 * sum(map(prod, made_up_shapes(megabytes).values())) / 1e6 / megabytes - 1) < share
