"""Runs in forked processes: killed, stopped and diverged ones, and the command around them."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks
from commands import call
from lr_specs import SMALL, write_spec

from megagate.analysis.lr.local import run_local
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.errors import RunError

command = partial(call, "lr_stability")
LIMIT_S = 240  # the first run waits for torch and DeepSpeed, a minute and more on a machine that is busy
FIRST, OTHER = RunKey("baseline", 4e-3, 0), RunKey("elementwise", 4e-3, 0)
LONG = {"steps": 300, "seeds": [0], "set": SMALL["set"] | {"checkpoint.every": 20}}


@pytest.fixture(autouse=True)
def _server() -> None:
    ranks.start()


def made(folder: Path, name: str, **changes: Any) -> Study:
    study = Study(read_spec(write_spec(folder, **(LONG | changes))), folder / name)
    study.claim(study.spec.decides(), "")
    return study


def process_of(study: Study, key: RunKey) -> int:
    """The process that writes the log of a run."""
    log = str(study.log(key))
    for process in psutil.process_iter(["pid"]):
        try:
            if os.readlink(f"/proc/{process.pid}/fd/1") == log:
                return process.pid
        except OSError:
            continue
    raise AssertionError(f"nobody writes {log}")


def kill_at(study: Study, key: RunKey, step: int) -> None:
    process = None
    until = time.monotonic() + LIMIT_S
    while (there := len(study.records(key))) < step and time.monotonic() < until:
        process = process_of(study, key) if there and not process else process  # before the moment, for it takes a while
        time.sleep(0.01)
    os.kill(process or process_of(study, key), signal.SIGKILL)


def test_a_killed_run_goes_on_and_leaves_the_others_alone_and_diverged_ones_are_told(tmp_path: Path) -> None:
    study, told = made(tmp_path, "killed", learning_rates=[4e-3, 1e30]), []
    killer = threading.Thread(target=kill_at, args=(study, FIRST, 30))
    killer.start()
    configs = study.configs([FIRST, OTHER, RunKey("baseline", 1e30, 0)])
    run_local(study, configs, jobs=2, threads=1, tell=told.append)
    killer.join()
    assert {str(key): one.status for key, one in study.outcomes().items()} == {
        "baseline-lr0.004-s0": "finished",
        "elementwise-lr0.004-s0": "finished",
        "baseline-lr1e+30-s0": "diverged",
    }
    assert study.outcome(RunKey("baseline", 1e30, 0)).reason == "the loss or the gradient is not finite"
    assert sum("its process was killed at step" in line for line in told) == 1
    assert "resumed from the checkpoint of step" in study.log(FIRST).read_text()
    assert "resumed" not in study.log(OTHER).read_text()
    assert not list(study.folder.glob("runs/*/checkpoints"))

    whole = made(tmp_path, "whole")
    run_local(whole, whole.configs([FIRST]), jobs=1, threads=1)
    assert whole.outcome(FIRST).val_loss == study.outcome(FIRST).val_loss, "the same bits as of a run that nobody killed"
    before = [path.stat().st_mtime_ns for path in sorted(study.folder.rglob("*"))]
    run_local(study, configs, jobs=2, threads=1)
    assert [path.stat().st_mtime_ns for path in sorted(study.folder.rglob("*"))] == before, "nothing was left to do"


def test_a_stop_saves_what_runs(tmp_path: Path) -> None:
    study = made(tmp_path, "stopped", steps=100_000, set=SMALL["set"] | {"checkpoint.every": 0}, learning_rates=[4e-3, 1e30])

    def stop(text: str) -> None:  # at the first run that is over, while the long one goes on
        assert "diverged" in text
        until = time.monotonic() + LIMIT_S
        while len(study.records(FIRST)) < 20 and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt

    bad = RunKey("baseline", 1e30, 0)
    with pytest.raises(KeyboardInterrupt):
        run_local(study, study.configs([FIRST, bad]), jobs=2, threads=1, tell=stop)
    steps = len(study.records(FIRST))
    assert 20 <= steps < 100_000 and list(study.outcomes()) == [bad]
    assert f"stopped by signal {int(signal.SIGTERM)} at step {steps}; saved" in study.log(FIRST).read_text()


def waits(path: Path) -> bool:
    """Whether somebody waits for the lock of a file."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("-> FLOCK" in line and f":{path.stat().st_ino} " in line for line in lines)


def test_a_run_waits_for_the_process_that_still_writes_it(tmp_path: Path) -> None:
    """As after a `kill -9` of the tool, whose runs still save while the next one is there already."""
    study, seen = made(tmp_path, "shared", variants=["baseline"], learning_rates=[4e-3]), []
    study.log(FIRST).touch()
    with study.log(FIRST).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)

        def release() -> None:
            until = time.monotonic() + LIMIT_S
            while not waits(study.log(FIRST)) and not study.records(FIRST) and time.monotonic() < until:
                time.sleep(0.01)
            seen.append((waits(study.log(FIRST)), len(study.records(FIRST))))
            fcntl.flock(log, fcntl.LOCK_UN)

        thread = threading.Thread(target=release)
        thread.start()
        run_local(study, study.configs([FIRST]), jobs=1, threads=1)
        thread.join()
    assert seen == [(True, 0)] and study.outcome(FIRST).status == "finished"


def test_a_run_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    study = made(tmp_path, "failing")
    study.run_folder(FIRST).mkdir(parents=True)
    (study.run_folder(FIRST) / "checkpoints").write_text("no folder")
    with pytest.raises(RunError, match=r"(?s)baseline-lr0.004-s0 ended with exit code \d+; the end of .*checkpoints"):
        run_local(study, study.configs([FIRST, OTHER]), jobs=1, threads=1)
    assert list(study.outcomes()) == [OTHER], "the others are done"


# ---- the command


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

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    write_spec(tmp_path, set=SMALL["set"] | {"optim.beta2": 0.5})
    assert command("run", spec, "--output", out) == 2
    assert "variants.baseline.optim.beta2: 0.95 there, 0.5 here" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept


def test_a_reader_that_goes_ends_it_quietly(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, seeds=list(range(200)))  # more than a pipe holds
    tool = Path(__file__).parents[2] / "tools" / "lr_stability.py"
    words = [sys.executable, str(tool), "run", str(spec), "--output", str(tmp_path / "out"), "--dry-run"]
    shell = f"{shlex.join(words)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"set": SMALL["set"] | {"data.path": "nowhere"}}, [], "data.path"),
        ({}, ["--only", "baseline/8e-3"], "--only baseline/8e-3: must be VARIANT/LR/SEED; write it as in baseline/0.004/0"),
        ({}, ["--only", "half/*/*"], "--only half/*/*: names no run of small"),
        ({"executor": {"kind": "slurm", "nodes": 3, "gpus_per_node": 1, "script": "S"}}, ["--dry-run"], "on 3 ranks"),
    ],
)
def test_bad_input_leaves_nothing(
    changes: Any, arguments: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec, out = write_spec(tmp_path, **changes), tmp_path / "out"
    assert command("run", spec, "--output", out, *arguments) == 2
    assert words in capfd.readouterr().err and not out.exists()
