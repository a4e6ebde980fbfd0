"""The main job in small: real text, a sample, and commands that work."""

import re
import shlex
from pathlib import Path

import pytest
from train_jobs import ROOT, Jobs, metrics

from megagate.config.cli import parse
from megagate.config.rules import check

TINY = ROOT / "examples" / "configs" / "tiny.yaml"
SMALL = (
    *("--model.vocab_size", 512, "--model.hidden_size", 48, "--model.num_layers", 2, "--model.moe.ffn_size", 32, "--train.seq_len", 64),
    *("--train.steps", 12, "--schedule.warmup_steps", 4, "--eval.every", 6, "--eval.batches", 2, "--eval.min_gain_nats", 0),
    *("--eval.sample_tokens", 12, "--checkpoint.every", 6),
)


@pytest.mark.slow
def test_the_main_job_in_small(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "my run"  # a space, as in many home folders
    job = jobs.run("--train.output_dir", run, *SMALL, config=TINY)
    assert "a sample: 'The function returns" in job.text
    (learnt,) = re.findall(r"validation loss ([\d.]+) nats; unigram entropy of the same ([\d,]+) tokens ([\d.]+) nats", job.text)
    assert float(learnt[0]) == pytest.approx(metrics(run)[-1]["val_loss"], abs=1e-3)
    assert learnt[1] == f"{2 * 8 * 64:,}" and 3 < float(learnt[2]) < 6.3
    assert f"the run is in {run}" in job.text

    monkeypatch.chdir(ROOT)  # the commands name the script as one sees it there
    assert_commands_work(job.text, {f"{run}-baseline": 1, f"{run}-ep2": 2, f"{run}-more": 1})

    # The data of the run are used again by the same command, here for its closing words.
    assert jobs.run("--train.output_dir", run, *SMALL, config=TINY).text.count("finished already") == 1


def test_data_too_short_for_a_window_leave_nothing_behind(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.run("--train.output_dir", tmp_path / "run", *SMALL, "--train.seq_len", 10**6, config=TINY, expect=2)
    assert job.text.count("DataError") == 1 and "train.seq_len" in job.text
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    jobs.run("--train.output_dir", tmp_path / "run", *SMALL, "--train.seq_len", 10**6, config=TINY, expect=2)
    assert (tmp_path / "run" / "notes.txt").exists(), "a folder that was there before stays"


def assert_commands_work(text: str, expected: dict[str, int]) -> None:
    """The printed commands start jobs in these folders, on so many ranks, which the rules accept."""
    commands = [line.split(":", 1)[1] for line in text.split("next:\n")[1].splitlines() if "deepspeed " in line]
    found = {}
    for words in map(shlex.split, commands):
        ranks = int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 1
        config = parse(words[words.index("examples/pretrain_moe.sh") + 1 :], prog="test")
        check(config, world_size=ranks)
        found[config.train.output_dir] = ranks
    assert found == expected


def test_the_commands_fit_the_layout_of_the_run(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, run = tmp_path / "old", tmp_path / "run"
    jobs.run("--train.output_dir", old, "--train.steps", 3)
    job = jobs.run("--train.output_dir", run, "--parallel.tp", 2, "--train.steps", 4, "--train.resume", old / "checkpoints", world=2)
    monkeypatch.chdir(ROOT)
    assert_commands_work(job.text, {f"{run}-baseline": 2, f"{run}-one": 1, f"{run}-more": 2})
    baseline = next(line for line in job.text.splitlines() if "gate_none.yaml" in line)
    assert "--train.resume auto" in baseline, "the checkpoint that this run began from holds another model"
    odd = jobs.run("--train.output_dir", tmp_path / "odd", "--train.global_batch_size", 3, "--train.steps", 2)
    assert_commands_work(odd.text, {f"{tmp_path}/odd-baseline": 1, f"{tmp_path}/odd-more": 1})
