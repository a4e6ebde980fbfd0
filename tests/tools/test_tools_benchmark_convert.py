"""`tools/benchmark.py convert` at a tiny size: rows and ratios come out, bad options are refused, nothing is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 300


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "convert", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_rows_end_with_a_table(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    sizes = ["--megabytes", 8, "--rounds", 3]
    result = run("--rows", "to-hf,from-hf", *sizes, "--folder", place, "--json", tmp_path / "record.json")
    assert result.returncode == 0, result.stderr
    lines = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("| ") and "`" in line]
    assert [line[0].split("`")[1] for line in lines] == ["to-hf", "from-hf"]
    assert all("GB/s" in line[1] and "GB/s" in line[2] and "[" in line[3] and line[5].strip() == ">= 0.5" for line in lines)
    assert result.stdout.count("MB of memory of its own at most, for") == 2
    held = json.loads((tmp_path / "record.json").read_text())["rows"]
    ours, copied = held["to-hf"]["to_hf"], held["to-hf"]["cp"]
    copies = {note["bytes"] for note in ours["notes"] + copied["notes"]}
    assert len(copies) == 1 and 5e6 < copies.pop() < 12e6, "cp copies what the conversion reads"
    assert list(place.iterdir()) == []


def test_bad_options_are_told(tmp_path: Path) -> None:
    result = run("--rows", "to-gguf", "--folder", tmp_path)
    assert (result.returncode, result.stdout) == (2, "") and "--rows: no row to-gguf; there are to-hf (a checkpoint to" in result.stderr
