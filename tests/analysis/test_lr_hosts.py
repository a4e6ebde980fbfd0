"""A study over a host file: the launch script, the launcher and its ranks, on this machine, stopped in the middle."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from lr_specs import SMALL, write_spec
from processes import gone
from test_lr_command import command

from megagate.analysis.lr.hosts import run_hosts
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.analysis.lr.study import Study
from megagate.errors import RunError

ROOT = Path(__file__).parents[2]
LIMIT_S = 180
FIRST, SECOND = RunKey("baseline", 4e-3, 0), RunKey("elementwise", 4e-3, 0)


def rank_of(study: Study, key: RunKey) -> psutil.Process:
    """The process of a run that trains."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(study.config_file(key)) in words and "megagate.train.main" in words:
            return process
    raise AssertionError(f"nobody trains {key}")


def stop_in_the_middle(study: Study, key: RunKey, seen: dict[str, str]) -> None:
    """The caller gets TERM once the run has made a few steps."""
    until = time.monotonic() + LIMIT_S
    while len(study.records(key)) < 10 and time.monotonic() < until:
        time.sleep(0.05)
    try:
        seen |= rank_of(study, key).environ()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_ladder_over_a_host_file_is_stopped_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("# this machine\nlocalhost slots=2\n")
    (tmp_path / "settings.env").write_text("# one thread\nOMP_NUM_THREADS=1\n# a value of words\nMEGAGATE_SEEN=two words\n")
    executor = {"kind": "hosts", "nodes": 1, "gpus_per_node": 1, "hostfile": str(tmp_path / "hosts"), "env": str(tmp_path / "settings.env")}
    settings = SMALL["set"] | {"checkpoint.every": 0}
    spec, out = write_spec(tmp_path, executor=executor, learning_rates=[4e-3], seeds=[0], steps=500, set=settings), tmp_path / "out"
    study, seen = Study(read_spec(spec), out), {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    killer = threading.Thread(target=stop_in_the_middle, args=(study, SECOND, seen))
    killer.start()
    assert command("run", spec, "--output", out) == 128 + signal.SIGTERM
    killer.join()
    told = capfd.readouterr()
    assert f"{FIRST}: finished, held-out loss" in told.out and "the same command goes on from there" in told.err
    steps = len(study.records(SECOND))
    assert 10 <= steps < 500 and list(study.outcomes()) == [FIRST]
    assert f"stopped by signal {int(signal.SIGTERM)} at step {steps}; saved" in study.log(SECOND).read_text()
    assert seen["MEGAGATE_SEEN"] == "two words" and seen["WORLD_SIZE"] == "1" and seen["OMP_NUM_THREADS"] == "1"
    assert gone(one.pid for one in psutil.process_iter(["cmdline"]) if str(out) in " ".join(one.info["cmdline"] or []))

    before = (study.run_folder(FIRST) / "outcome.json").stat().st_mtime_ns
    assert command("run", spec, "--output", out) == 0
    assert f"resumed from the checkpoint of step {steps}" in study.log(SECOND).read_text()
    runs = json.loads((out / "study.json").read_text())["runs"]
    assert [(run["variant"], run["status"], run["steps"]) for run in runs] == [(key.variant, "finished", 500) for key in (FIRST, SECOND)]
    assert (study.run_folder(FIRST) / "outcome.json").stat().st_mtime_ns == before


def study_by(script: str, folder: Path) -> Study:
    """Of four runs, each started by a script of its own making."""
    (folder / "hosts").write_text("localhost slots=1\n")
    (folder / "start.sh").write_text(script)
    files = {"hostfile": str(folder / "hosts"), "script": str(folder / "start.sh")}
    executor = {"kind": "hosts", "nodes": 1, "gpus_per_node": 1, **files}
    study = Study(read_spec(write_spec(folder, executor=executor, seeds=[0])), folder / "out")
    study.claim(study.spec.decides(), "")
    return study


def test_what_fails_does_not_keep_the_others_from_being_tried_up_to_the_third(tmp_path: Path) -> None:
    study = study_by("echo of no use: $*\nexit 7\n", tmp_path)
    with pytest.raises(RunError, match=r"(?s)baseline-lr0.004-s0 ended with exit code 7; .*of no use: --hostfile .* -- --config ") as error:
        run_hosts(study, study.configs(study.keys))
    assert str(error.value).count("ended with exit code 7") == 3
    assert [study.log(key).exists() for key in study.keys] == [True, True, True, False]
    assert json.loads((study.folder / "study.json").read_text())["runs"] == []


def test_ranks_that_somebody_else_stopped_end_the_command(tmp_path: Path) -> None:
    study = study_by("exit 143\n", tmp_path)
    with pytest.raises(RunError, match="baseline-lr0.004-s0: its ranks were told to stop by somebody else at step 0, and saved; run again"):
        run_hosts(study, study.configs(study.keys))
    assert [study.log(key).exists() for key in study.keys] == [True, False, False, False]
