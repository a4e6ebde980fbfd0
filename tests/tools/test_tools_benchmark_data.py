"""`tools/benchmark.py data` at tiny sizes: rows and ratios come out, ids are compared, bad options are refused, nothing is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megagate.analysis.benchmark.data import Options
from megagate.analysis.benchmark.data_files import SHARD_TOKENS, installed_folders, many_shards, same_ids, text_of
from megagate.analysis.benchmark.data_ours import preprocess
from megagate.analysis.benchmark.data_reader import _start_lines
from megagate.analysis.benchmark.data_text import _steady_rate
from megagate.analysis.benchmark.interleave import Series
from megagate.analysis.benchmark.paired import Ratio
from megagate.analysis.benchmark.rows import Bench, Result, reaches
from megagate.data.manifest import Manifest, ShardEntry, TokenizerIdentity, open_shards, read_manifest, write_manifest
from megagate.data.shards import ShardWriter
from megagate.errors import RunError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark.py"
LIMIT_S = 300


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "data", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.parametrize(
    ("times", "met"),
    [((4.1, 4.0, 4.2), True), ((4.1, 3.9, 4.2), None), ((3.9, 3.8, 4.0), None), ((3.9, 3.8, 3.99), False), ((4.0, None, None), True)],
)
def test_a_target_within_the_interval_is_open(times: tuple[float, float | None, float | None], met: bool | None) -> None:
    assert reaches(Ratio(*times), 4) is met


def made_up(cpu: list[float], peak: float = 4e6) -> Series:
    notes = [{"peak": peak, "private": peak / 2}] * len(cpu)
    return Series(seconds=cpu, cpu_seconds=cpu, notes=notes)


@pytest.mark.parametrize(
    ("worst", "peak", "verdicts"), [(0.049, 4.9e6, [True, True]), (0.051, 4.9e6, [False, True]), (0.04, 5.1e6, [True, False])]
)
def test_the_worst_start_decides(tmp_path: Path, worst: float, peak: float, verdicts: list[bool]) -> None:
    sizes = {"documents": 1, "shards": 1, "rounds": 3, "megabytes": 1.0}
    options = Options(tmp_path, **sizes, deadline=0.0, text=None, tokenizer=None, gigatoken="")
    bench = Bench("start", options, 3, lambda text: None, Result())
    _start_lines(bench, "start-up", made_up([0.01, worst, 0.01], peak), made_up([4.0, 4.0, 4.0], 1e9))
    _start_lines(bench, "start-up", made_up([0.01, worst, 0.01], peak), None)
    assert [line.met for line in bench.result.lines] == 2 * verdicts
    assert [line.times is None for line in bench.result.lines] == [False, False, True, True]


# ---- the command


def test_rows_that_read_end_with_a_table(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    place = tmp_path / "place"
    place.mkdir()
    sizes = ["--documents", 2_500, "--shards", 3, "--rounds", 3]
    command = ["--rows", "start,sample,permutation", *sizes, "--folder", place, "--json", record]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "megatron-core 0.16.1" in lines[0] and "numpy" in lines[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert table[0] == ["row", "ours", "peer", "peer / ours [95 %]", "wall, ours / peer", "target", "verdict"]
    rows = table[1:]
    assert [row[0].split("`")[1] for row in rows] == ["start"] * 4 + ["sample"] * 3 + ["permutation"]
    assert [row[3] for row in rows[2:4]] == ["-", "-"], "Megatron did not open as much"
    compared = rows[:2] + rows[4:]
    assert all(float(row[3].split()[0]) > 0 for row in compared) and all(row[6] in ("met", "missed", "open") for row in rows)
    assert all("[" in row[3] for row in compared if row[0].split(":")[1].startswith(" CPU")), "three rounds have an interval"
    assert "3 shards, 3e+10 tokens" in rows[2][0]
    assert lines[-1].strip() == f"python tools/benchmark.py data {' '.join(map(str, command))}"
    held = json.loads(record.read_text())["rows"]
    assert {key: set(series) for key, series in held.items()} == {
        "start": {"one", "many", "megatron"},
        "sample": {"1x1", "4x8", "16x4", "megatron"},
        "permutation": {"lookup", "shuffle"},
    }
    assert all(len(series["cpu_seconds"]) == 3 for row in held.values() for series in row.values())
    assert held["start"]["megatron"]["notes"][0]["import_bytes"] > 100e6 > held["start"]["one"]["notes"][0]["import_bytes"]
    assert list(place.iterdir()) == [], "files are removed"


def test_rows_of_text_compare_ids_with_megatrons(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    documents = [f"document {number}: {'a b c é ' * (number % 7 + 1)}\nend\r" for number in range(400)] + ["spells <|endoftext|>", ""]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    result = run("--rows", "preprocess,workers", "--text", text, "--rounds", "1", "--folder", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "preprocess: identical ids: tokenizers" in result.stdout
    assert result.stdout.count(f"in 400 documents of {text}, 1 that spell a special token left out") == 2
    rows = [line.split("|") for line in result.stdout.splitlines() if "(`preprocess`)" in line or "(`workers`)" in line]
    assert "with tokenizers, 1 worker: CPU" in rows[0][1] and "s/MB" in rows[0][2] and "2 workers" in rows[-1][1]
    assert all(float(row[4].split()[0]) > 0 for row in rows)
    assert ("with gigatoken" in result.stdout) != ("no row for gigatoken" in result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "start,fast"), "no row fast; there are start (from files to the first sample), sample"),
        (("--folder", "nowhere"), "--folder nowhere: no such folder"),
        (("--rows", "preprocess", "--text", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("--rows", "preprocess", "--tokenizer", "bytes"), "--tokenizer is bytes, which Megatron does not have"),
        (("--rows", "preprocess", "--megabytes", "1e9"), "GB free; these rows need 6000000.00 GB; choose another --folder"),
        (("--documents", "0"), "--documents"),
    ],
)
def test_bad_options_are_told(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, *([] if "--folder" in arguments else ["--folder", tmp_path]))
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_removes_its_files(tmp_path: Path, number: int) -> None:
    command = [sys.executable, str(TOOL), "data", "--rows", "start", "--documents", "1000", "--rounds", "100000", "--folder", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + LIMIT_S
        while not list(tmp_path.glob("*/many/dataset.json")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=LIMIT_S)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert list(tmp_path.iterdir()) == []


# ---- its files


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> ShardEntry:
    with ShardWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    return ShardEntry.of(prefix.name, split="train", stats=writer.finish())


def test_other_ids_or_borders_are_not_the_same(tmp_path: Path) -> None:
    entries = (write(tmp_path / "a", [[1, 2], [3]]), write(tmp_path / "b", [[4, 5, 6]]))
    identity = TokenizerIdentity(kind="none", file="", sha256="", vocab_size=9, eod_id=0, pad_id=-1)
    write_manifest(tmp_path, Manifest(identity, dtype="uint16", shards=entries, source={}))
    peers = {
        "the same": ([[1, 2], [3], [4, 5, 6]], "<u2", True),
        "another id": ([[1, 2], [3], [4, 5, 7]], "<u2", False),
        "another border": ([[1], [2, 3], [4, 5, 6]], "<u2", False),
        "one more": ([[1, 2], [3], [4, 5, 6], [1]], "<u2", False),
        "one less": ([[1, 2], [3]], "<u2", False),
        "another type": ([[1, 2], [3], [4, 5, 6]], "<i4", False),
    }
    for name, (documents, dtype, same) in peers.items():
        write(tmp_path / name, documents, dtype)
        assert same_ids(tmp_path, tmp_path / name) is same, name


def test_shards_of_holes_are_a_data_set_and_take_no_space(tmp_path: Path) -> None:
    folder = many_shards(tmp_path / "many", 3)
    shards = open_shards(folder, read_manifest(folder), split="train")
    assert [shard.tokens for shard in shards] == [SHARD_TOKENS] * 3
    assert shards[2].documents == 10**7
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 1e6


def test_the_text_of_folders_is_the_same_each_time_and_has_no_doubles(tmp_path: Path) -> None:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for number in range(30):
        for folder, suffix in ((library / f"p{number}", ".py"), (packages / f"q{number}", ".md"), (library / "o", f"{number}.bin")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"x{suffix}").write_text(f"{folder.name} {number}")
    (library / "double.txt").write_text("p3 3")
    (library / "blank.txt").write_text(" ")
    (library / "broken.txt").write_bytes(b"\xff")
    (library / "table.txt").write_text("x" * 1_000_001)
    found = list(text_of([library, packages]))
    assert sorted(found) == sorted([f"p{number} {number}" for number in range(30)] + [f"q{number} {number}" for number in range(30)])
    assert {text[0] for text in found[:15]} == {"p", "q"}, "mixed"
    assert list(text_of([library, packages])) == found
    assert next(text_of(installed_folders()))


def test_the_steady_rate_leaves_out_the_start_and_the_end(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "x" * 99}) + "\n" for _ in range(60)))
    out = tmp_path / "out"
    wanted = ["--input", str(text), "--tokenizer", "bytes", "--split", "1,0,0", "--workers", "1", "--unit-bytes", "672"]
    notes = preprocess(wanted, str(out))()
    assert notes["cpu"] > 0.05 and notes["peak"] > 10e6  # no upper bound: Linux counts what this process held when it forked
    records = sorted((out / "units").glob("part-*.json"))
    assert len(records) == 10
    tokens = [json.loads(record.read_text())["shards"]["train"]["tokens"] for record in records]
    assert tokens == [600] * 10  # 99 bytes and an end, six times
    times = [100, 101, 103, 104, 106, 107, 109, 110, 112, 150]  # the last worker alone, and slow
    for record, seconds in zip(records, times, strict=True):
        os.utime(record, (seconds, seconds))
    assert _steady_rate(out, 1) == pytest.approx(9 * 600 / 50)
    assert _steady_rate(out, 2) == pytest.approx(7 * 600 / 11)


def test_a_command_that_fails_is_told_with_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)preprocess_data.py --input nowhere.jsonl .*exit code 2:.*nowhere.jsonl"):
        preprocess(["--input", "nowhere.jsonl", "--tokenizer", "bytes"], str(tmp_path / "out"))()
