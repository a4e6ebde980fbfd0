"""Runs in forked processes: killed, stopped and diverged ones, and the command around them."""

import fcntl
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ranks
from commands import call
from lr_specs import SMALL, write_spec

from megagate.analysis.lr import local
from megagate.analysis.lr.local import run_local
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.data.manifest import Manifest, ShardEntry, SplitName, TokenizerIdentity, write_manifest
from megagate.data.shards import ShardWriter
from megagate.errors import RunError

command = partial(call, "lr_stability")
LIMIT_S = 240  # the first run waits for torch and DeepSpeed, a minute and more on a machine that is busy
FIRST, OTHER = RunKey("baseline", 4e-3, 0), RunKey("elementwise", 4e-3, 0)
HOSTS = {"kind": "hosts", "nodes": 1, "gpus_per_node": 1, "hostfile": "F"}
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


# ---- the order of things, with processes that are none


class Pretended:
    """Stands for a run's process: `act` is asked for its exit code at each look. As a real one it is looked at often, but not for ever."""

    act: Callable[[Study, RunKey], int | None]
    begun: list[RunKey]
    going: list[RunKey]
    ended: list[RunKey]
    most: int

    def __init__(self, study: Study, key: RunKey, config: Any, *, threads: int):
        assert len(self.begun) < 20, "begun again and again"
        self.begun.append(key)
        self.going.append(key)
        type(self).most = max(self.most, len(self.going))
        self.study, self.key, self.looks = study, key, 0
        self.process = SimpleNamespace(sentinel=os.open(os.devnull, os.O_RDONLY))  # there is always something to read

    def code(self) -> int | None:
        self.looks += 1
        assert self.looks < 20, "nobody stops it"
        code = self.act(self.study, self.key)
        if code is not None:
            self.leave()
        return code

    def leave(self) -> None:
        self.going.remove(self.key)
        os.close(self.process.sentinel)

    def is_due(self) -> bool:
        return True

    def tell(self, number: int) -> None:
        pass

    def end(self, limit: float) -> None:
        self.ended.append(self.key)
        self.leave()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    runs = type("Runs", (Pretended,), {"begun": [], "going": [], "ended": [], "most": 0})
    monkeypatch.setattr(local, "_Run", runs)
    monkeypatch.setattr(local, "_start_server", lambda: None)
    return runs


def small(folder: Path) -> Study:
    study = Study(read_spec(write_spec(folder, seeds=[0])), folder / "out")
    study.claim(study.spec.decides(), "")
    return study


def record(study: Study, key: RunKey, losses: list[float], **last: float) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines[-1] |= last
    study.run_folder(key).mkdir(parents=True, exist_ok=True)
    (study.run_folder(key) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(study: Study, key: RunKey) -> int:
    record(study, key, [3.0] * 12, val_loss=2.5)
    return 0


def test_a_run_that_is_killed_each_time_is_given_up_and_the_others_are_done(tmp_path: Path, pretended: type[Pretended]) -> None:
    study = small(tmp_path)
    pretended.act = lambda self, study, key: -signal.SIGKILL if key == FIRST else finish(study, key)
    with pytest.raises(RunError, match="baseline-lr0.004-s0 ended with exit code -9"):
        run_local(study, study.configs(study.keys), jobs=1, threads=1)
    assert pretended.begun == [FIRST] * 3 + study.keys[1:] and list(study.outcomes()) == study.keys[1:]


def test_behind_three_failures_no_further_run_is_begun(tmp_path: Path, pretended: type[Pretended]) -> None:
    study = small(tmp_path)
    pretended.act = lambda self, study, key: 2
    with pytest.raises(RunError) as error:
        run_local(study, study.configs(study.keys), jobs=1, threads=1)
    assert pretended.begun == study.keys[:3] and str(error.value).count("ended with exit code 2") == 3


def test_as_many_go_at_a_time_as_were_asked_for(tmp_path: Path, pretended: type[Pretended]) -> None:
    study = small(tmp_path)
    pretended.act = lambda self, study, key: finish(study, key) if self.looks > 3 else None
    run_local(study, study.configs(study.keys), jobs=2, threads=1)
    assert (pretended.most, pretended.begun, list(study.outcomes())) == (2, study.keys, study.keys)


def test_one_that_diverges_by_the_rule_is_stopped(tmp_path: Path, pretended: type[Pretended]) -> None:
    study = small(tmp_path)

    def act(self: Pretended, study: Study, key: RunKey) -> int | None:
        return record(study, key, [3.0] * 3 + [9.0] * 3) if key == FIRST else finish(study, key)

    pretended.act = act
    run_local(study, study.configs([FIRST, OTHER]), jobs=1, threads=1)
    assert pretended.ended == [FIRST] and [one.status for one in study.outcomes().values()] == ["diverged", "finished"]
    told = json.loads((study.folder / "study.json").read_text())["runs"]
    assert [one["status"] for one in told] == ["diverged", "finished"]


def test_a_run_whose_end_nobody_noted_is_not_begun_again(tmp_path: Path, pretended: type[Pretended]) -> None:
    study = small(tmp_path)
    finish(study, FIRST)
    pretended.act = lambda self, study, key: finish(study, key)
    run_local(study, study.configs([FIRST, OTHER]), jobs=1, threads=1)
    assert pretended.begun == [OTHER] and list(study.outcomes()) == [FIRST, OTHER]


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[RunKey], dict[str, Any]]]:
    """What the command would have run, which nothing does."""
    found: list[tuple[list[RunKey], dict[str, Any]]] = []
    monkeypatch.setattr(local, "run_local", lambda study, configs, *, tell, **how: found.append((list(configs), how)))
    return found


def test_data_that_are_gone_or_others_leave_a_study_as_it_is(tmp_path: Path, asked: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    data, out = prepared(tmp_path / "data", "train", "valid"), tmp_path / "out"
    spec = write_spec(tmp_path, set=SMALL["set"] | {"data.path": str(data)})
    assert command("run", spec, "--output", out) == 0
    finish(Study(read_spec(spec), out), FIRST)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    data.rename(tmp_path / "moved")
    assert command("run", spec, "--output", out) == 2
    assert str(data) in capfd.readouterr().err
    prepared(data, "train", "valid", first=1)
    assert command("run", spec, "--output", out) == 2
    assert "holds another study:\n  data/baseline: " in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"} == kept
    assert len(asked) == 1, "nothing was run of what differs"


def test_data_without_a_held_out_part_are_refused(tmp_path: Path, asked: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    spec = write_spec(tmp_path, set=SMALL["set"] | {"data.path": str(prepared(tmp_path / "data", "train"))})
    assert command("run", spec, "--output", tmp_path / "out") == 2
    assert "has no held-out tokens, which a study of losses needs; give another" in capfd.readouterr().err
    assert not asked and not (tmp_path / "out").exists()


def test_the_specs_jobs_and_threads_count_and_the_options_before_them(tmp_path: Path, asked: list[Any]) -> None:
    spec, out = write_spec(tmp_path, executor={"kind": "local", "jobs": 2, "threads": 3}), tmp_path / "out"
    assert command("run", spec, "--output", out) == command("run", spec, "--output", out, "--jobs", 5) == 0
    assert [how for _, how in asked] == [{"jobs": 2, "threads": 3}, {"jobs": 5, "threads": 3}]


def test_a_study_is_looked_at_by_its_own_spec_alone(tmp_path: Path, asked: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    spec, out = write_spec(tmp_path), tmp_path / "out"
    for word in ("status", "report"):
        assert command(word, spec, "--output", out) == 2
        assert f"--output {out}: holds no study; `run` makes one" in capfd.readouterr().err and not out.exists()
    assert command("run", spec, "--output", out) == 0
    study = Study(read_spec(spec), out)
    finish(study, FIRST)
    study.settle_if_over(FIRST, study.configs([FIRST])[FIRST], tell=lambda text: None)
    assert command("report", spec, "--output", out) == 0, "of a run that somebody else has settled, too"
    assert json.loads((out / "report" / "report.json").read_text())["statistics"]["runs"] == 1
    capfd.readouterr()
    write_spec(tmp_path, collapsed_above=2.0)
    for word in ("status", "report"):
        assert command(word, spec, "--output", out) == 2
        told = capfd.readouterr()
        assert "holds another study:\n  collapsed_above: None there, 2.0 here" in told.err and not told.out


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
