"""`tools/benchmark.py fp8`: the jobs it starts, its arithmetic on numbers whose gaps are known, resumption, and a small study."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import gone
from test_tools_benchmark import LIMIT_S, ROOT, TOOL, run

from megagate.analysis.benchmark.fp8 import (
    BASE,
    EXACT,
    RECIPES,
    ROWS,
    TAIL,
    TWIN,
    Key,
    Numbers,
    Record,
    gap,
    keys,
    numbers_of,
    remark,
    run_config,
    table,
)
from megagate.analysis.benchmark.fp8_runs import study
from megagate.config.cli import parse
from megagate.config.rules import changed_keys, check
from megagate.config.run import RunConfig
from megagate.errors import RunError

TINY = parse(["--config", str(ROOT / "examples" / "configs" / "tiny.yaml")], prog="test")
SEEDS = (1234, 1235, 1236)
STEPS = 100
SMALL = """
model:
  vocab_size: 256
  hidden_size: 32
  num_layers: 1
  attention: {num_heads: 2, num_kv_heads: 2, head_dim: 16}
  ffn_size: 64
train: {steps: 100, global_batch_size: 2, seq_len: 32, seed: 7}
data: {path: synthetic}
schedule: {warmup_steps: 2}
eval: {batches: 1}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


# ---- the jobs


def config_of(row: str, *, base: RunConfig = TINY, steps: int = 600, seed: int = 1234) -> RunConfig:
    return run_config(base, Key(row, seed), steps=steps, valid_tokens=21_154, folder=Path("/study"))


@pytest.mark.parametrize("row", ROWS)
def test_a_job_is_the_config_with_the_rows_numbers(row: str) -> None:
    config = config_of(row)
    check(config, world_size=1)
    changed = {key: value for key, _, value in changed_keys(TINY, config)}
    precision = {"precision.dtype": "fp32" if row == EXACT else "bf16"}
    if row in RECIPES:
        precision |= {"precision.fp8.recipe": row, "precision.fp8.emulate": True}
    nudged = {"model.init_std": 0.02 * 1.0001} if row == TWIN else {}
    assert changed == precision | nudged
    assert config.train.output_dir == f"/study/{row}-1234" and config.data.cache_dir == "/study/data"
    assert (config.eval.every, config.eval.batches) == (0, 21), "the whole split, at the end"
    long = run_config(TINY, Key(row, 1234), steps=600, valid_tokens=10**9, folder=Path("/study"))
    assert long.eval.batches == 10 * TINY.eval.batches


def test_every_recipe_has_a_row_and_seeds_come_one_after_the_other() -> None:
    assert list(ROWS) == [BASE, EXACT, TWIN, "delayed", "current", "blockwise", "mxfp8"]
    assert keys(["bf16", "current"], SEEDS[:2]) == [("bf16", 1234), ("current", 1234), ("bf16", 1235), ("current", 1235)]


def test_fewer_steps_shrink_the_schedule_and_a_recipes_settings_are_kept() -> None:
    assert config_of(BASE, steps=100).schedule == replace(TINY.schedule, warmup_steps=10)
    fp8 = replace(TINY.precision.fp8, amax_history=16, keep_high_precision=("embedding", "head", "router"))
    base = replace(TINY, precision=replace(TINY.precision, fp8=fp8))
    assert config_of("delayed", base=base).precision.fp8 == replace(fp8, recipe="delayed", emulate=True)
    assert config_of("current", base=base).precision.fp8.keep_high_precision == fp8.keep_high_precision
    assert config_of(BASE, base=base).precision.fp8 == TINY.precision.fp8


# ---- its arithmetic


def record_of(gaps: dict[str, list[float]], *, base: tuple[float, ...] = (4.9, 4.7, 5.0)) -> Record:
    """Of three seeds, whose own effect is far larger than the gaps."""
    record = Record.empty(TINY, steps=600, machine="one")
    for row, each in {BASE: [0.0] * 3, **gaps}.items():
        for seed, val, extra in zip(SEEDS, base, each, strict=False):
            record.runs[str(Key(row, seed))] = Numbers(val + extra, val + 2 * extra, 0.1)
    return record


def test_a_gap_is_paired_by_seed() -> None:
    runs = record_of({"current": [0.01, 0.02, 0.03]}).runs
    found = gap(runs, "current", SEEDS, lambda one: one.val_loss)
    assert found.each == pytest.approx((0.01, 0.02, 0.03)) and found.mean == pytest.approx(0.02)
    assert found.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3) and not found.separable
    assert gap(runs, "current", SEEDS, lambda one: one.train_loss).mean == pytest.approx(0.04)
    assert gap(runs, "current", SEEDS[:1], lambda one: one.val_loss).half_width == math.inf


def test_the_table_tells_effect_from_chance() -> None:
    record = record_of({TWIN: [0.01, -0.01, 0.002], "delayed": [0.030, 0.031, 0.029], "mxfp8": [0.02, 0.03]})
    lines = table(record, [BASE, TWIN, "delayed", "current", "mxfp8"], SEEDS)
    cells = {line.split("(`")[1].split("`")[0]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "(`" in line}
    assert list(cells) == [BASE, TWIN, "delayed", "mxfp8"], "no line without a run"
    assert cells[BASE] == ["4.8667", "0", "-", "-", "0"]
    assert cells["delayed"] == ["4.8967", "+0.0300 [+0.0275, +0.0325]", "+0.0300, +0.0310, +0.0290", "yes", "+0.0600 [+0.0550, +0.0650]"]
    assert cells[TWIN][3] == "no" and cells["mxfp8"][0] == "4.8250", "of the two seeds that it has"
    assert lines[-1].endswith("bf16 ends 4.9000, 4.7000, 5.0000 nats: a standard deviation of 0.1528.")


def test_a_history_that_forgets_nothing_is_told() -> None:
    assert "history of 1024 is no shorter than a run's 600 micro-steps" in remark(TINY, ["bf16", "delayed"], steps=600)
    assert not remark(TINY, ["bf16", "delayed"], steps=1100) and not remark(TINY, ["bf16", "current"], steps=600)
    accumulating = replace(TINY, train=replace(TINY.train, micro_batch_size=4))
    assert not remark(accumulating, ["delayed"], steps=600), "two micro-steps in each step"


def test_numbers_are_of_a_finished_run(tmp_path: Path) -> None:
    path, steps = tmp_path / "metrics.jsonl", TAIL + 10
    lines = [{"step": step, "loss": 9.0 if step <= 10 else step / 10, "step_seconds": 0.5} for step in range(1, steps + 1)]
    lines[-1]["val_loss"] = 3.5
    path.write_text("\n".join(map(json.dumps, lines)))
    assert numbers_of(path, steps=steps) == Numbers(3.5, pytest.approx(3.55), 0.5)
    for text, message in [
        (path.read_text().rsplit("\n", 1)[0], "not the 60 steps"),
        ("{", "cannot be read"),
        ('{"step": 1}', "not the 60 steps"),
    ]:
        path.write_text(text)
        with pytest.raises(RunError, match=message):
            numbers_of(path, steps=steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 300}, "steps = 300, this run has 600"),
        ({"machine": "other"}, "machine = other, this run has one"),
        ({"config": "123"}, "config = 123"),
        ({"code": "123"}, "code = 123"),
    ],
)
def test_another_study_is_not_resumed(tmp_path: Path, change: dict, message: str) -> None:
    path, fresh = tmp_path / "record.json", Record.empty(TINY, steps=600, machine="one")
    record_of({}).write(path)
    fresh.resume(path)
    assert fresh == record_of({})
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "conditions": {**held["conditions"], **change}}))
    fresh = Record.empty(TINY, steps=600, machine="one")
    with pytest.raises(RunError, match=message):
        fresh.resume(path)
    assert not fresh.runs
    path.write_text('{"runs": {}}')
    with pytest.raises(RunError, match="no record of this command"):
        fresh.resume(path)


# ---- the command


def stopped(arguments: list[str], metrics: Path, number: int) -> tuple[int, int]:
    """Start the command, and stop it after a few steps of its first run. -> exit code, and the steps that are done."""
    deadline = time.monotonic() + LIMIT_S
    with subprocess.Popen([sys.executable, str(TOOL), *arguments], cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE) as process:
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(timeout=LIMIT_S)
    assert children and gone(child.pid for child in children)
    return process.returncode, metrics.read_text().count("\n")


def test_a_study_of_the_real_job_is_stopped_and_goes_on_with_what_there_is(tmp_path: Path, small: Path) -> None:
    record, runs = tmp_path / "record.json", tmp_path / "record.json.runs"
    command = ["fp8", "--config", str(small), "--threads", "1", "--json", str(record), "--seeds", "1", "--rows"]
    code, done = stopped([*command, "current"], runs / "bf16-7" / "metrics.jsonl", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and 3 < done < STEPS and json.loads(record.read_text())["runs"] == {}
    command = [*command, "current", "--jobs", "2", "--resume"]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert f"resumed from the checkpoint of step {done}" in (runs / "bf16-7.log").read_text()
    held = json.loads(record.read_text())["runs"]
    assert held.keys() == {"bf16-7", "current-7"} and held["bf16-7"]["val_loss"] != held["current-7"]["val_loss"]
    assert all(4.0 < numbers["val_loss"] < 6.0 for numbers in held.values()), "ln 256 is 5.5"
    assert "recipe: current" in (runs / "current-7" / "config.yaml").read_text() and not (runs / "current-7" / "checkpoints").exists()
    out = result.stdout.splitlines()
    assert f"small.yaml, {STEPS} steps of 64 tokens, 1 seeds; 640 tokens to validate on; " in out[0] and "torch" in out[0]
    assert [line.split("(`")[1].split("`")[0] for line in out if "(`" in line] == ["bf16", "current"]
    assert out[-1].strip() == f"python tools/benchmark.py {' '.join(command)}"
    logs = {path: path.stat().st_mtime_ns for path in runs.glob("*.log")}
    assert run(*command).stdout == result.stdout
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*.log")} == logs, "finished runs are not made again"


def test_a_run_whose_study_was_killed_saves_and_ends(tmp_path: Path, small: Path) -> None:
    record, runs = tmp_path / "record.json", tmp_path / "record.json.runs"
    arguments = ["fp8", "--config", str(small), "--threads", "1", "--rows", "bf16", "--seeds", "1", "--json", str(record)]
    code, done = stopped(arguments, runs / "bf16-7" / "metrics.jsonl", signal.SIGKILL)
    assert code == -signal.SIGKILL and 3 < done < STEPS
    assert (runs / "bf16-7" / "checkpoints" / f"step-{done:08d}").is_dir()


def test_bad_options_are_told_before_anything_is_written(tmp_path: Path, small: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    for options, message in [
        (["--rows", "bf16,nvfp4"], "no row nvfp4; there are bf16, fp32, twin, delayed"),
        (["--resume"], "needs --json"),
        (["--json", str(there)], "exists; give --resume"),
        (["--json", str(tmp_path / "no" / "file")], "no folder"),
        (["--seeds", "0"], "--seeds"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
    ]:
        result = run("fp8", "--config", str(small), *options)
        assert (result.returncode, result.stdout) == (2, ""), options
        assert message in result.stderr and "Traceback" not in result.stderr
    assert there.read_text() == "{}" and len(list(tmp_path.iterdir())) == 2


def test_a_failing_job_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho training stops\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    record, how = Record.empty(TINY, steps=2), {"folder": tmp_path, "valid_tokens": 100, "jobs": 1, "threads": 1}
    with pytest.raises(RunError, match=r"the run bf16-7 ended with exit code 3; the end of \S+bf16-7\.log:\ntraining stops"):
        study(record, TINY, rows=[BASE], seeds=[7], **how)
    assert not record.runs
