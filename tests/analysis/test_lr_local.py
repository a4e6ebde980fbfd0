"""Runs in forked processes: killed, stopped, failing and diverged ones. The command around them: test_lr_command.py."""

import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ranks
from lr_specs import SMALL, write_spec

from megagate.analysis.lr import local
from megagate.analysis.lr.local import run_local
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.errors import RunError

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


def processes_of(study: Study, key: RunKey) -> list[int]:
    """The processes that write the log of a run."""
    log, found = str(study.log(key)), []
    for process in psutil.process_iter(["pid"]):
        with suppress(OSError):
            if os.readlink(f"/proc/{process.pid}/fd/1") == log:
                found.append(process.pid)
    return found


def kill_at(study: Study, key: RunKey, step: int) -> None:
    process = None
    until = time.monotonic() + LIMIT_S
    while (there := len(study.records(key))) < step and time.monotonic() < until:
        process = processes_of(study, key)[0] if there and not process else process  # before the moment, for it takes a while
        time.sleep(0.01)
    os.kill(process or processes_of(study, key)[0], signal.SIGKILL)


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


def test_a_run_that_is_killed_each_time_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    study, killed = made(tmp_path, "killed", learning_rates=[4e-3]), []

    def kill() -> None:
        until = time.monotonic() + LIMIT_S
        while len(killed) < 3 and time.monotonic() < until:
            for process in set(processes_of(study, FIRST)).difference(killed):
                killed.append(process)
                os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RunError, match="baseline-lr0.004-s0 ended with exit code -9"):
        run_local(study, study.configs([FIRST, OTHER]), jobs=1, threads=1)
    thread.join()
    assert len(killed) == 3 and list(study.outcomes()) == [OTHER]


def test_behind_three_failures_no_further_run_is_begun(tmp_path: Path) -> None:
    study = made(tmp_path, "failing", seeds=[0, 1])
    for key in study.keys:
        study.run_folder(key).mkdir(parents=True)
        (study.run_folder(key) / "checkpoints").write_text("no folder")
    with pytest.raises(RunError) as error:
        run_local(study, study.configs(study.keys), jobs=1, threads=1)
    assert str(error.value).count("ended with exit code") == 3
    assert [study.log(key).exists() for key in study.keys] == [True] * 3 + [False] * 5


def test_a_run_whose_records_end_before_its_checkpoint_is_refused_before_it_trains(tmp_path: Path) -> None:
    """As a machine that goes down may leave it: what such a run came to could never be told, however long it went on."""
    study = made(tmp_path, "torn", learning_rates=[4e-3])
    kill_at_40 = threading.Thread(target=kill_at, args=(study, FIRST, 40))
    kill_at_40.start()
    with pytest.raises(KeyboardInterrupt):
        run_local(study, study.configs([FIRST]), jobs=1, threads=1, tell=stop_at_the_first)
    kill_at_40.join()
    records = study.run_folder(FIRST) / "metrics.jsonl"
    whole, log = records.read_text(), study.log(FIRST).read_text()
    assert not study.gap(FIRST)
    records.write_text("".join(whole.splitlines(keepends=True)[:10]) + '{"step": 11, "lo')
    said = r"baseline-lr0.004-s0 would go on from its checkpoint of step \d+, but .*metrics.jsonl has the steps up to 10 only, .*; restore"
    with pytest.raises(RunError, match=said):
        run_local(study, study.configs([FIRST, OTHER]), jobs=1, threads=1)
    assert study.log(FIRST).read_text() == log and list(study.outcomes()) == [OTHER], "nothing was trained of it; the other is done"
    records.write_text(whole)
    run_local(study, study.configs([FIRST]), jobs=1, threads=1)
    assert study.outcome(FIRST).status == "finished"


def stop_at_the_first(text: str) -> None:
    raise KeyboardInterrupt


def going(study: Study) -> int:
    """How many runs have a process, each of which holds its log."""
    lines = Path("/proc/locks").read_text().splitlines()
    logs = [f":{path.stat().st_ino} " for path in study.folder.glob("logs/*")]
    return sum(" FLOCK " in line and "->" not in line and any(log in line for log in logs) for line in lines)


def test_as_many_go_at_a_time_as_were_asked_for(tmp_path: Path) -> None:
    study, seen, over = made(tmp_path, "shared", steps=100), [], threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            seen.append(going(study))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        run_local(study, study.configs(study.keys), jobs=2, threads=1)
    finally:
        over.set()
        thread.join()
    assert max(seen) == 2 and list(study.outcomes()) == study.keys


def test_one_that_diverges_by_the_rule_is_stopped(tmp_path: Path) -> None:
    rule = {"steps": 4000, "learning_rates": [0.5], "variants": ["baseline"], "stop": {"above_initial": 0.1, "window": 3}}
    study = made(tmp_path, "diverging", **rule)
    run_local(study, study.configs(study.keys), jobs=1, threads=1)
    ((key, outcome),) = study.outcomes().items()
    assert outcome.status == "diverged" and "nats above that of the first 3" in outcome.reason
    assert outcome.step < len(study.records(key)) < 4000
    assert [one["status"] for one in json.loads((study.folder / "study.json").read_text())["runs"]] == ["diverged"]


def test_a_run_whose_end_nobody_noted_is_not_begun_again(tmp_path: Path) -> None:
    study = made(tmp_path, "ended", steps=12)
    run_local(study, study.configs([FIRST]), jobs=1, threads=1)
    before = study.outcome(FIRST)
    (study.run_folder(FIRST) / "outcome.json").unlink()
    study.log(FIRST).unlink()
    run_local(study, study.configs([FIRST, OTHER]), jobs=1, threads=1)
    assert list(study.outcomes()) == [FIRST, OTHER] and study.outcome(FIRST) == before and not study.log(FIRST).exists()


# ---- the run's side, with a job that is none


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # where pytest has a stream of its own in the place of Python's


def told_of_itself(arguments: list[str]) -> int:
    """Stands for the job: what its process is like."""
    import torch

    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "MASTER_PORT")
    there = {name: os.environ.get(name) for name in names}
    say(json.dumps([arguments, there, torch.get_num_threads(), os.getsid(0) == os.getpid()]))
    return 3


def told_to_stop(arguments: list[str]) -> int:
    """Stands for the job: goes on until it is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: (say("saved"), sys.exit(143)))
    say("goes on")
    time.sleep(60)
    return 0


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    def use(main: Callable[[list[str]], int]) -> None:
        monkeypatch.setattr(local, "_JOB", "job_that_is_none")
        monkeypatch.setitem(sys.modules, "job_that_is_none", SimpleNamespace(main=main))

    return use


FORK = multiprocessing.get_context("fork")  # of this process, which has what stands for the job


def test_a_run_is_a_world_of_one_with_the_threads_it_is_given(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(told_of_itself)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_PORT", "1"), ("CUDA_VISIBLE_DEVICES", "0")):
        monkeypatch.setenv(name, value)
    (tmp_path / "log").write_text("of before\n")
    process = FORK.Process(target=local._work, args=("c.yaml", str(tmp_path / "log"), 2))
    process.start()
    process.join(LIMIT_S)
    assert not process.is_alive()
    before, said = (tmp_path / "log").read_text().splitlines()
    wanted = {"OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "RANK": None, "WORLD_SIZE": None}
    assert json.loads(said) == [["--config", "c.yaml"], wanted | {"MASTER_PORT": None}, 2, True]
    assert (process.exitcode, before) == (3, "of before")


def begin_and_wait(log: str) -> None:
    FORK.Process(target=local._work, args=("c.yaml", log, 1)).start()
    time.sleep(60)


def test_a_run_stops_with_a_caller_that_is_killed(job: Any, tmp_path: Path) -> None:
    job(told_to_stop)
    log = tmp_path / "log"
    caller = FORK.Process(target=begin_and_wait, args=(str(log),))
    caller.start()
    for text, then, limit_s in (("goes on\n", caller.kill, LIMIT_S), ("goes on\nsaved\n", caller.join, 60)):
        until = time.monotonic() + limit_s
        while not (log.exists() and log.read_text() == text):
            assert time.monotonic() < until, text
            time.sleep(0.01)
        then()
