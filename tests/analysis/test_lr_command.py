"""The command of a study on this machine: what it runs, shows and refuses."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from commands import TOOLS, call
from lr_specs import SMALL, write_spec

from megagate.analysis.lr import local
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.checkpoint.folders import read_pointer
from megagate.data.manifest import Manifest, ShardEntry, SplitName, TokenizerIdentity, write_manifest
from megagate.data.shards import ShardWriter

command = partial(call, "lr_stability")
LIMIT_S = 240  # the first run waits for torch and DeepSpeed, a minute and more on a machine that is busy
HOSTS = {"kind": "hosts", "nodes": 1, "gpus_per_node": 1, "hostfile": "F"}


@pytest.fixture(autouse=True)
def _server() -> None:
    ranks.start()


def test_the_command_runs_what_it_is_asked_for_and_shows_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec, out = write_spec(tmp_path), tmp_path / "out"
    assert command("run", spec, "--output", out, "--dry-run", "--only", "*/8e-3/1") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == ["baseline-lr0.008-s1.yaml", "elementwise-lr0.008-s1.yaml"] and not out.exists()
    assert command("run", spec, "--output", out, "--only", "*/8e-3/1") == 0
    runs = json.loads((out / "study.json").read_text())["runs"]
    assert [(run["variant"], run["lr"], run["seed"]) for run in runs] == [("baseline", 8e-3, 1), ("elementwise", 8e-3, 1)]
    capfd.readouterr()
    assert command("status", spec, "--output", out) == 0
    shown = capfd.readouterr().out
    assert f"| baseline | - - | - {runs[0]['val_loss']:.3f} |" in shown
    assert "2 of 8 runs are over (0 diverged), 0 begun, 6 to begin" in shown

    outcome = out / "runs" / "baseline-lr0.008-s1" / "outcome.json"
    whole = outcome.read_text()
    outcome.write_text("{")
    for word in ("run", "status", "report"):
        assert command(word, spec, "--output", out) == 2
        assert "outcome.json: cannot be read" in capfd.readouterr().err
    assert not (out / "report").exists(), "no report of an old study.json"
    outcome.write_text(whole)

    assert command("run", spec, "--output", out, "--dry-run") == 0
    assert "# 8 of 8 runs, 2 of them over; every config fits 1 rank; the data were not looked at" in capfd.readouterr().err

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    write_spec(tmp_path, set=SMALL["set"] | {"optim.beta2": 0.5})
    for options in ((), ("--dry-run",)):
        assert command("run", spec, "--output", out, *options) == 2
        assert "variants.baseline.optim.beta2: 0.95 there, 0.5 here" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept


def prepared(folder: Path, *splits: SplitName, first: int = 0) -> Path:
    """A data set of 2,000 tokens a split."""
    folder.mkdir()
    entries = []
    for split in splits:
        with ShardWriter(folder / split, dtype=np.dtype(np.uint16)) as writer:
            writer.add(np.arange(first, first + 2_000) % 258)
        entries.append(ShardEntry.of(split, split=split, stats=writer.finish()))
    identity = TokenizerIdentity(kind="none", file="", sha256="", vocab_size=258, eod_id=-1, pad_id=-1)
    write_manifest(folder, Manifest(identity, "uint16", tuple(entries), {}))
    return folder


def test_data_that_are_gone_or_others_leave_a_study_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = prepared(tmp_path / "data", "train", "valid"), tmp_path / "out"
    spec = write_spec(tmp_path, set=SMALL["set"] | {"data.path": str(data)})
    assert command("run", spec, "--output", out, "--only", "baseline/4e-3/0") == 0
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    data.rename(tmp_path / "moved")
    assert command("run", spec, "--output", out) == 2
    assert str(data) in capfd.readouterr().err
    prepared(data, "train", "valid", first=1)
    assert command("run", spec, "--output", out) == 2
    assert "holds another study:\n  data/baseline: " in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"} == kept


def test_data_too_short_for_what_runs_read_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = SMALL["set"] | {"data.path": str(prepared(tmp_path / "data", "train", "valid")), "train.seq_len": 2_000}
    spec, out = write_spec(tmp_path, set=settings), tmp_path / "out"
    assert command("run", spec, "--output", out) == 2
    assert "no shard of it holds one window of 2001 (train.seq_len + 1); lower train.seq_len" in capfd.readouterr().err
    assert not out.exists(), "so that the corrected spec is no other study"


def test_data_without_a_held_out_part_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = write_spec(tmp_path, set=SMALL["set"] | {"data.path": str(prepared(tmp_path / "data", "train"))})
    assert command("run", spec, "--output", tmp_path / "out") == 2
    assert "has no held-out tokens, which a study of losses needs; give another" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_specs_jobs_and_threads_count_and_the_options_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, asked, run = write_spec(tmp_path, executor={"kind": "local", "jobs": 2, "threads": 3}), [], local.run_local

    def look(study: Study, configs: Any, **how: Any) -> None:
        asked.append((how["jobs"], how["threads"]))
        run(study, configs, **how)

    monkeypatch.setattr(local, "run_local", look)
    for options in ((), ("--jobs", 5)):
        assert command("run", spec, "--output", tmp_path / "out", "--only", "baseline/4e-3/0", *options) == 0
    assert asked == [(2, 3), (5, 3)]


def test_a_study_is_looked_at_by_its_own_spec_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec, out = write_spec(tmp_path), tmp_path / "out"
    for word in ("status", "report"):
        assert command(word, spec, "--output", out) == 2
        assert f"--output {out}: holds no study; `run` makes one" in capfd.readouterr().err and not out.exists()
    assert command("run", spec, "--output", out, "--only", "baseline/4e-3/0") == 0
    record = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(record | {"runs": []}))
    assert command("report", spec, "--output", out) == 0
    assert json.loads((out / "report" / "report.json").read_text())["statistics"]["runs"] == 1, "also one that a task has settled alone"
    capfd.readouterr()
    write_spec(tmp_path, collapsed_above=2.0)
    for word in ("status", "report"):
        assert command(word, spec, "--output", out) == 2
        told = capfd.readouterr()
        assert "holds another study:\n  collapsed_above: None there, 2.0 here" in told.err and not told.out


def test_a_study_that_lost_its_spec_json_is_told_alike_by_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec, out = write_spec(tmp_path), tmp_path / "out"
    assert command("run", spec, "--output", out, "--only", "baseline/4e-3/0") == 0
    (out / "spec.json").unlink()
    for word in ("run", "status", "report"):
        assert command(word, spec, "--output", out) == 2
        assert "holds runs but no spec.json, so no study; its digest" in capfd.readouterr().err


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_whole_process_group_saves_what_runs(tmp_path: Path, signal_name: str) -> None:
    """As of a terminal that closes, of `timeout`, or of a service manager."""
    spec = write_spec(tmp_path, steps=100_000, seeds=[0], set=SMALL["set"] | {"checkpoint.every": 0})
    study, number = Study(read_spec(spec), tmp_path / "out"), getattr(signal, signal_name)
    words = [sys.executable, str(TOOLS / "lr_stability.py"), "run", str(spec), "--output", str(study.folder), "--jobs", "2"]
    heed = partial(signal.signal, number, signal.SIG_DFL)  # also where these tests run under nohup
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        until = time.monotonic() + LIMIT_S
        while min(len(study.records(key)) for key in study.keys[:2]) < 10 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=LIMIT_S)[1]
    finally:
        process.kill()  # its runs end with it
        process.wait()
    assert process.returncode == 128 + number and "what was running is saved" in said
    for key in study.keys[:2]:
        steps = len(study.records(key))
        assert f"at step {steps}; saved" in study.log(key).read_text() and not study.gap(key)
        assert read_pointer(study.run_folder(key) / "checkpoints", "latest") == steps


def test_a_reader_that_goes_ends_it_quietly(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, seeds=list(range(200)))  # more than a pipe holds
    words = [sys.executable, str(TOOLS / "lr_stability.py"), "run", str(spec), "--output", str(tmp_path / "out"), "--dry-run"]
    shell = f"{shlex.join(words)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"set": SMALL["set"] | {"data.path": "nowhere"}}, [], "data.path"),
        ({}, ["--only", "baseline/8e-3"], "--only baseline/8e-3: must be VARIANT/LR/SEED; write it as in baseline/0.004/0"),
        ({}, ["--only", "half/*/*"], "--only half/*/*: names no run of small"),
        ({"executor": HOSTS}, ["--jobs", "2"], "--jobs 2: executor.kind is hosts, which does one run after another; leave it out"),
        ({"executor": {"kind": "slurm", "nodes": 3, "gpus_per_node": 1, "script": "S"}}, ["--dry-run"], "on 3 ranks"),
    ],
)
def test_bad_input_leaves_nothing(
    changes: Any, arguments: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec, out = write_spec(tmp_path, **changes), tmp_path / "out"
    assert command("run", spec, "--output", out, *arguments) == 2
    assert words in capfd.readouterr().err and not out.exists()
