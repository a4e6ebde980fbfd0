"""What a config can ask of a training run, seen from outside."""

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_jobs import NANO, Job, Jobs, contents, metrics, numbers, steps_recorded

from megagate.checkpoint.folders import complete_steps
from megagate.checkpoint.store import Checkpoint
from megagate.config.cli import parse

# Warm-up to an absurd learning rate: the first step applied with it makes weights from which no step is finite.
EXPLODING = ("--optim.lr", 1e30, "--schedule.min_lr", 0, "--schedule.warmup_steps", 8, "--schedule.kind", "constant")
RECORD_KEYS = [
    *("step", "tokens", "loss", "lr", "grad_norm", "aux_loss", "z_loss"),
    *("step_seconds", "tokens_per_second", "tflops_per_device", "peak_memory_bytes"),
]


@pytest.mark.parametrize("world", [1, 2])
def test_a_number_that_is_not_finite_stops_the_run(jobs: Jobs, tmp_path: Path, world: int) -> None:
    run = tmp_path / "run"
    command = ("--train.output_dir", run, *EXPLODING, "--checkpoint.every", 1)
    job = jobs.run(*command, world=world, expect=3)
    assert job.text.count("NotFiniteError") == job.text.count("training stops (train.on_nonfinite: stop)") == 1
    assert "Traceback" not in job.text
    last = metrics(run)[-1]["step"]
    assert f"step {last + 1}: the loss is " in job.text and "the gradient norm inf" in job.text
    first = re.search(r"; the first: .* is not finite \(\d+ nan and \d+ inf of \d+\)(, on rank \d)?; training stops", job.text)
    assert first is not None and bool(first[1]) == (world == 2), job.text
    assert complete_steps(run / "checkpoints")[-1] == last
    Checkpoint.open(run / "checkpoints" / f"step-{last:08d}").verify()
    before = contents(run / "checkpoints")
    jobs.run(*command, world=world, expect=3)
    assert contents(run / "checkpoints") == before, "a run that stops again must leave the last good checkpoint alone"


@pytest.mark.parametrize("world", [1, 2])
def test_a_number_that_is_not_finite_is_skipped(jobs: Jobs, tmp_path: Path, world: int) -> None:
    run = tmp_path / "run"
    skip = ("--train.on_nonfinite", "skip", "--eval.every", 1, "--observe.every", 1)
    job = jobs.run("--train.output_dir", run, *EXPLODING, *skip, world=world)
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 11))
    skipped = [record["step"] for record in records if "skipped" in record]
    assert skipped and skipped[0] > 1
    seen = records[skipped[0] - 1]
    assert "gate_mean" in seen and all(value is None for key, value in seen.items() if key.startswith("grad_norm/"))
    assert all(record["grad_norm"] is None for record in records if "skipped" in record), "JSON has no infinity"
    for step in skipped:
        assert job.text.count(f"step {step}: the loss is ") == 1, "told once"
    values = {record["val_loss"] for record in records if record["step"] >= skipped[0] - 1}
    assert len(values) == 1, "a skipped step changes no parameter"


def test_a_run_with_skipped_steps_resumes_bit_for_bit(jobs: Jobs, tmp_path: Path) -> None:
    """The optimizer's own count of steps is less than the run's, and Adam's bias correction depends on it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    skip = (*EXPLODING, "--train.on_nonfinite", "skip")
    jobs.run("--train.output_dir", whole, *skip)
    assert any("skipped" in record for record in metrics(whole)[:5])
    jobs.run("--train.output_dir", cut, *skip, "--train.resume", whole / "checkpoints" / "step-00000005")
    assert numbers(metrics(cut)) == numbers(metrics(whole))[5:]
    applied = 10 - sum("skipped" in record for record in metrics(whole))
    for run in (whole, cut):
        assert Checkpoint.open(run / "checkpoints" / "step-00000010").metadata["applied_steps"] == applied


def test_the_schedules_in_the_records(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run("--train.output_dir", tmp_path / "cosine")
    wsd = ("--schedule.kind", "wsd", "--schedule.decay_steps", 4)
    jobs.run("--train.output_dir", tmp_path / "wsd", *wsd)
    # nano: peak 2e-3, floor 2e-4, 2 steps of warm-up, 10 in all
    cosine = [1e-3, 2e-3, *(2e-4 + 0.9e-3 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9))]
    assert [record["lr"] for record in metrics(tmp_path / "cosine")] == pytest.approx(cosine, rel=1e-12)
    decay = [1e-3, *([2e-3] * 5), 1.55e-3, 1.1e-3, 0.65e-3, 2e-4]
    assert [record["lr"] for record in metrics(tmp_path / "wsd")] == pytest.approx(decay, rel=1e-12)


def test_recomputed_activations_change_nothing_and_may_be_switched_on_later(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run("--train.output_dir", tmp_path / "off")
    jobs.run("--train.output_dir", tmp_path / "on", "--train.recompute", "true")
    for off, on in zip(numbers(metrics(tmp_path / "off")), numbers(metrics(tmp_path / "on")), strict=True):
        assert on == pytest.approx(off, rel=1e-6)
    jobs.run("--train.output_dir", tmp_path / "on")  # finished; but not another run


def test_zero_2_trains_the_same_model(jobs: Jobs, tmp_path: Path) -> None:
    for stage in (1, 2):
        jobs.run("--train.output_dir", tmp_path / f"{stage}", "--parallel.zero_stage", stage, "--parallel.ep", 2, world=2)
    for one, two in zip(numbers(metrics(tmp_path / "1")), numbers(metrics(tmp_path / "2")), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_another_others(jobs: Jobs, tmp_path: Path) -> None:
    for name in ("one", "again"):
        jobs.run("--train.output_dir", tmp_path / name, "--parallel.ep", 2, "--train.steps", 5, world=2)
    jobs.run("--train.output_dir", tmp_path / "other", "--parallel.ep", 2, "--train.steps", 5, "--train.seed", 1, world=2)
    assert numbers(metrics(tmp_path / "one")) == numbers(metrics(tmp_path / "again"))
    assert metrics(tmp_path / "one")[0]["loss"] != metrics(tmp_path / "other")[0]["loss"]


def test_the_files_of_a_run(jobs: Jobs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("--train.output_dir", run, "--eval.every", 4, "--optim.lr", 1e-3)
    jobs.run(*command, world=2)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    config = parse(["--config", str(NANO), *map(str, command)], prog="test")
    assert parse(["--config", str(run / "config.yaml")], prog="test") == config
    for step, record in enumerate(metrics(run), start=1):
        stall = ["checkpoint_stall_seconds"] * ("checkpoint_stall_seconds" in record)
        assert list(record) == [*RECORD_KEYS, *(["val_loss"] if step in (4, 8, 10) else []), *stall]
        assert bool(stall) or step not in (5, 6, 9), "after the saves of steps 4, 5 and 8, the best and the fifth"
        assert not stall or step > 4
        assert (record["step"], record["tokens"]) == (step, step * 8 * 32)
        assert all(math.isfinite(value) and value > 0 for value in record.values())
    before = contents(run)
    jobs.run(config=run / "config.yaml", world=2)  # the same run: finished
    assert contents(run) == before


def test_a_trace_of_chosen_steps(jobs: Jobs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("--train.output_dir", run, "--profile.start_step", 4, "--profile.steps", 2, "--train.micro_batch_size", 4)
    jobs.run(*command, world=2)
    (file,) = (run / "profile").iterdir()
    events = [event for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"] if event.get("ph") == "X"]
    names = [event["name"] for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("aten::" in name for name in names)
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step-00000010" / "index.json").unlink()
    job = jobs.run(*command, world=2)
    assert "resumed from the checkpoint of step 5" in job.text
    assert len(list((run / "profile").iterdir())) == 1, "the chosen steps are over"


@pytest.fixture
def start_wandb(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Starts the job of one rank with `wandb.mode` and more, at home in an empty folder and without a key."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)

    def start(mode: str, *argv: object) -> Job:
        trainer = [sys.executable, "-m", "megagate.train.main", "--config", NANO, "--train.output_dir", tmp_path / "run"]
        return jobs.command([*trainer, "--wandb.mode", mode, *argv], HOME=str(tmp_path))

    return start


def test_weights_and_biases_offline_needs_no_key(start_wandb: Callable[..., Job], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_wandb("offline", "--train.steps", 5, "--observe.every", 5)
    assert job.wait() == [0], job.text
    (found,) = (run / "wandb").glob("offline-run-*")
    (record,) = found.glob("*.wandb")
    stored = record.read_bytes()
    assert all(key.encode() in stored for key in metrics(run)[-1]) and "gate_mean/1" in metrics(run)[-1]
    assert found.name.endswith((run / "wandb" / "id").read_text(encoding="utf-8")), "a resumed run goes on under this name"
    assert len(metrics(run)) == 5


def test_ctrl_c_ends_the_service_of_weights_and_biases_but_not_the_save(start_wandb: Callable[..., Job], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_wandb("offline", "--train.steps", 200, "--checkpoint.every", 0)
    job.until(lambda: steps_recorded(run) >= 3)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.wait() == [128 + signal.SIGINT], job.text
    assert job.text.count("stopped by signal 2") == 1 and "Traceback" not in job.text
    assert complete_steps(run / "checkpoints") == [len(metrics(run))]


def test_weights_and_biases_online_without_a_key_is_one_message(start_wandb: Callable[..., Job], tmp_path: Path) -> None:
    job = start_wandb("online")
    assert job.wait() == [2], job.text
    assert job.text.count("RunError: wandb.mode is online") == 1 and "Traceback" not in job.text
    assert metrics(tmp_path / "run") == [], "the folder belongs to no config yet"


# ---- has it learnt?

QUICK: dict[str, Any] = {
    "--train.steps": 60,
    "--train.micro_batch_size": 8,
    "--optim.lr": 1e-2,
    "--schedule.min_lr": 1e-3,
    "--eval.batches": 16,
}


def flat(settings: dict[str, Any]) -> list[Any]:
    return [word for item in settings.items() for word in item]


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_at_its_initial_weights_has_learnt_nothing(jobs: Jobs, tmp_path: Path, world: int) -> None:
    nothing = QUICK | {"--train.steps": 1, "--optim.lr": 1e-12, "--schedule.min_lr": 0, "--schedule.warmup_steps": 0}
    nothing |= {"--train.micro_batch_size": 4, "--eval.min_gain_nats": 1.0}
    job = jobs.run("--train.output_dir", tmp_path / "run", *flat(nothing), world=world, expect=1)
    assert job.text.count("FAILED: eval.min_gain_nats asks for at least 1.000 nats below") == 1


def test_a_model_that_has_learnt_passes(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.run("--train.output_dir", tmp_path / "run", *flat(QUICK | {"--eval.min_gain_nats": 0.3}))
    assert "FAILED" not in job.text
    assert job.text.count("unigram entropy of the same 4,096 tokens") == 1
    jobs.run("--train.output_dir", tmp_path / "run", *flat(QUICK | {"--eval.min_gain_nats": 0.3}))


def test_a_validation_is_the_same_for_any_micro_batch(jobs: Jobs, tmp_path: Path) -> None:
    """Whole global batches of windows; and the run's config names the precision that `auto` came to."""
    losses = []
    for micro in (1, 4, 0):
        run = tmp_path / f"run-{micro}"
        jobs.run("--train.output_dir", run, "--train.steps", 2, "--train.micro_batch_size", micro, "--precision.dtype", "auto")
        losses.append(metrics(run)[-1]["val_loss"])
        assert parse(["--config", str(run / "config.yaml")], prog="test").precision.dtype == "fp32"
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
