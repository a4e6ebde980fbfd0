"""SIGTERM and Ctrl-C save, say so once, and leave; the same command goes on, bit for bit."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from train_jobs import Job, Jobs, metrics, numbers, steps_recorded

from megagate.checkpoint.folders import complete_steps

SAVED_WITHIN_S = 30.0  # the launcher kills what is still there after so long
MANY = ("--train.steps", 30, "--checkpoint.every", 0, "--eval.every", 0)
DP2_EP2 = ("--parallel.ep", 2)


def assert_stopped_and_saved(job: Job, run: Path, number: int) -> None:
    """It said so once, and the checkpoint is that of its last record."""
    said = f"stopped by signal {number} at step "
    assert job.text.count("stopped by signal") == 1 and said in job.text, job.text
    step = int(job.text.split(said)[1].split(";")[0])
    assert 0 < step < 30, "the signal came too late"
    assert complete_steps(run / "checkpoints")[-1] == step
    assert [record["step"] for record in metrics(run)] == list(range(1, step + 1))
    assert "Traceback" not in job.text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The records of the uninterrupted run on two ranks."""
    jobs = Jobs(tmp_path_factory.mktemp("whole"))
    try:
        jobs.run("--train.output_dir", jobs.folder / "run", *MANY, *DP2_EP2, world=2)
    finally:
        jobs.close()
    return numbers(metrics(jobs.folder / "run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_ranks(jobs: Jobs, tmp_path: Path, whole: list[dict[str, object]], number: int) -> None:
    run = tmp_path / "run"
    command = ("--train.output_dir", run, *MANY, *DP2_EP2)
    job = jobs.fork(*command, world=2)
    job.until(lambda: steps_recorded(run) >= 4)
    job.send(number)
    job.send(number)  # the launcher repeats what the terminal has sent
    assert job.wait(SAVED_WITHIN_S) == [128 + number] * 2
    assert_stopped_and_saved(job, run, number)
    jobs.run(*command, world=2)
    assert numbers(metrics(run)) == whole


def test_a_signal_to_one_rank_stops_all(jobs: Jobs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs.fork("--train.output_dir", run, *MANY, "--eval.every", 0, world=2)
    job.until(lambda: steps_recorded(run) >= 3)
    os.kill(job.forked[1].pid, signal.SIGTERM)
    assert job.wait(SAVED_WITHIN_S) == [128 + signal.SIGTERM] * 2
    assert_stopped_and_saved(job, run, signal.SIGTERM)
    assert len(complete_steps(run / "checkpoints")) == 1, "no other step had a reason to be saved"


def test_a_signal_before_the_first_step_leaves_no_half_run(jobs: Jobs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs.fork("--train.output_dir", run)
    time.sleep(0.1)
    job.send(signal.SIGTERM)
    assert job.wait(SAVED_WITHIN_S)[0] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    jobs.run("--train.output_dir", run)
    assert len(metrics(run)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to the launcher", "Ctrl-C"])
def test_under_the_launcher(jobs: Jobs, tmp_path: Path, whole: list[dict[str, object]], how: str) -> None:
    run = tmp_path / "run"
    settings = ("--train.output_dir", run, *MANY, *DP2_EP2)
    job = jobs.deepspeed(["--num_gpus", 2], settings)
    job.until(lambda: steps_recorded(run) >= 4)
    trainers = job.find("megagate.train.main")
    assert len(trainers) == 2
    began = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    else:
        (launcher,) = (process for process in job.find("deepspeed.launcher.launch"))
        launcher.send_signal(signal.SIGTERM)
    assert job.wait(SAVED_WITHIN_S) != [0]
    gone, alive = psutil.wait_procs(trainers, timeout=SAVED_WITHIN_S - (time.monotonic() - began))
    assert not alive
    # What DeepSpeed's own runner says to Ctrl-C is its affair.
    lines = [line for line in job.text.splitlines() if "megagate" in line]
    assert sum("stopped by signal" in line for line in lines) == 1, job.text
    step = complete_steps(run / "checkpoints")[-1]
    assert any(f"at step {step}; saved" in line for line in lines)
    jobs.run(*settings, world=2)
    assert numbers(metrics(run)) == whole
