"""Bad input: one clear message, exit code 2, nothing written."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from train_data import make_data
from train_jobs import NANO, Jobs, contents, metrics, steps_recorded

from megagate.checkpoint.certificate import NEXT_STEP_NAME
from megagate.checkpoint.folders import complete_steps
from megagate.checkpoint.store import Checkpoint
from megagate.data.shards import ShardWriter
from megagate.train.main import main


def refused(argv: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What the job says about arguments that it refuses, here in this process: no process group is made for them."""
    assert main([str(word) for word in argv]) == 2
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


BAD_FILES = {
    "a file that is missing": (["--config", "missing.yaml"], "missing.yaml cannot be read"),
    "broken YAML": (["--config", "broken.yaml"], "broken.yaml line 3, column 1 is not valid YAML"),
    "an unknown key in a file": (["--config", "unknown.yaml"], "(unknown.yaml line 2) is not a known key; did you mean optim.weight_decay"),
    "no base config": (["--train.steps", 5], "model.hidden_size (0) must be at least 1; give a base config first"),
}
BAD_VALUES = {
    "an unknown key": (["--train.step", 5], "did you mean --train.steps?"),
    "a wrong type": (["--train.steps", "many"], "on the command line) must be a whole number"),
    "a wrong choice": (["--precision.dtype", "bf15"], "did you mean bf16?"),
    "out of range": (["--optim.beta1", 1.5], "optim.beta1 (1.5) must be less than 1"),
    "a recipe that nobody has": (["--precision.fp8.recipe", "delayed"], "precision.fp8.recipe (delayed) needs FP8 kernels or their"),
    "an emulation of nothing": (["--precision.fp8.emulate", "true"], "precision.fp8.emulate (true) needs a recipe to emulate"),
    "a size that FP8 cannot have": (
        ["--precision.fp8.recipe", "current", "--precision.fp8.emulate", "true", "--train.seq_len", 24],
        "train.seq_len (24) must be a multiple of 16 where precision.fp8.recipe is current",
    ),
    "an unsupported stage": (["--parallel.zero_stage", 0], "parallel.zero_stage (0) must be at least 1 for a mixture of experts"),
    "tp that does not divide heads": (["--parallel.tp", 8], "model.attention.num_heads (4) must be divisible by parallel.tp (8)"),
    "ep that does not divide experts": (["--parallel.ep", 3], "model.moe.num_experts (8) must be divisible by parallel.ep (3)"),
    "a blend of another form": (["--data.path", "0.5 /a 0.5"], "data.path: `0.5` (word 3) is no weight with its folder"),
    "a weight that is too small": (["--data.path", "1 /a 0.00001 /b"], "data.path: weight 1e-05 of 1.00001 in all is too small"),
    "weights from an earlier sample": (["--data.path", "1 /a from 5 1 /b from 4 1 /a"], "weights count from samples [0, 5, 4]"),
    "a validation set without a name": (["--data.valid", "/a"], "data.valid: `/a` must be NAME=FOLDER"),
    "a fused optimizer without Adam": (
        ["--optim.name", "sgd", "--optim.implementation", "apex"],
        "optim.implementation (apex) must be torch where optim.name is sgd: the others are for adamw; set optim.implementation to torch",
    ),
    "micro-batch that does not divide": (["--train.micro_batch_size", 3], "train.global_batch_size (8) must be divisible by"),
}
BAD_ARGUMENTS = BAD_FILES | {case: (["--config", NANO, *argv], message) for case, (argv, message) in BAD_VALUES.items()}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("train:\n  steps: [1, 2\n", encoding="utf-8")
    (tmp_path / "unknown.yaml").write_text("optim:\n  weight_decya: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    argv, message = BAD_ARGUMENTS[case]
    said = refused([*argv, "--train.output_dir", "run"], capsys)
    assert said.startswith("[megagate] ConfigError: ") and said.count(message) == 1, said
    assert contents(tmp_path) == before


def test_all_violations_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    many = ["--parallel.tp", 2, "--parallel.ep", 3, "--optim.lr", -1, "--train.seq_len", 33, "--data.path", "1 /a 2", "--data.valid", "x"]
    said = refused(["--config", NANO, "--train.output_dir", tmp_path / "run", *many], capsys)
    texts = ("optim.lr (-1.0)", "train.seq_len (33)", "data.path: `2`", "data.valid: `x`")
    keys = (*texts, "model.moe.num_experts (8)", "parallel.tp (2) must divide", "the number of ranks (3)")
    assert all(key in said for key in keys), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ["--parallel.tp", "--parallel.ep"])
def test_a_world_that_does_not_fit(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    said = refused(["--config", NANO, layout, 4, "--train.output_dir", tmp_path / "run"], capsys)
    assert f"the number of ranks (6) must be divisible by {layout.removeprefix('--')} (4); start 4 or 8 ranks" in said
    assert not (tmp_path / "run").exists()


def test_other_ranks_of_a_machine_keep_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "missing.yaml" in refused(["--config", tmp_path / "missing.yaml"], capsys), "another machine may lack what the first one has"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refused(["--config", tmp_path / "missing.yaml"], capsys) == ""
    assert refused(["--config", NANO, "--parallel.tp", 3], capsys) == ""


@pytest.mark.slow
def test_under_the_launcher_the_message_comes_once(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.deepspeed(["--num_gpus", 2], ["--train.output_dir", tmp_path / "run", "--parallel.tp", 4])
    assert job.wait() == [2], job.text
    assert job.text.count("ConfigError") == job.text.count("the number of ranks (2) must be divisible by parallel.tp (4)") == 1
    assert "Traceback" not in job.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("implementation", ["apex", "te"])  # the third would be compiled if this failed
def test_a_fused_optimizer_without_a_gpu(implementation: str, jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.run("--train.output_dir", tmp_path / "run", "--optim.implementation", implementation, world=2, expect=2)
    assert job.text.count(f"ConfigError: optim.implementation ({implementation}) needs a CUDA GPU") == 1, job.text
    assert not (tmp_path / "run").exists()


# ---- data


def spoil(data: Path, how: str) -> None:
    shard, manifest = data / "train-00000.bin", data / "dataset.json"
    if how == "truncated":
        os.truncate(shard, shard.stat().st_size - 20)
    elif how == "of the wrong dtype":
        with ShardWriter(data / "train-00000", dtype=np.dtype("<i4")) as writer:  # the manifest says uint16
            writer.add(np.zeros(6_000))
            writer.finish()
    elif how == "without its manifest":
        manifest.unlink()
    elif how == "with a truncated index":
        os.truncate(data / "train-00000.idx", 40)
    elif how == "a bare shard":
        for suffix in (".bin", ".idx"):
            (data / f"train-00000{suffix}").rename(f"{data}{suffix}")
        shutil.rmtree(data)
    elif how == "with a broken manifest":
        manifest.write_text(manifest.read_text(encoding="utf-8")[:-40], encoding="utf-8")


BAD_DATA = {
    "missing": "there is no such folder",
    "truncated": "train-00000.bin",
    "with a truncated index": "train-00000.idx is truncated: 40 bytes",
    "a bare shard": "tools/merge_data.py --input",
    "of the wrong dtype": "int32",
    "without its manifest": "dataset.json",
    "with a broken manifest": "dataset.json",
    "of a larger vocabulary": "model.vocab_size",
    "too short for a window": "train.seq_len",
}


@pytest.mark.parametrize("how", BAD_DATA)
def test_bad_data(jobs: Jobs, tmp_path: Path, how: str) -> None:
    data = tmp_path / "data"
    if how != "missing":
        make_data(data, vocab_size=1024 if how == "of a larger vocabulary" else 512, tokens=30 if "short" in how else 6_000)
        spoil(data, how)
    job = jobs.run("--train.output_dir", tmp_path / "run", "--data.path", data, world=2, expect=2)
    assert job.text.count("DataError") == 1 and BAD_DATA[how] in job.text, job.text
    assert "Traceback" not in job.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_damage_that_one_rank_meets_ends_all(jobs: Jobs, tmp_path: Path, split: str) -> None:
    """A single id above the vocabulary, in one window: the files have their sizes, so that only who reads it can tell."""
    data = make_data(tmp_path / "data")
    with open(data / f"{split}-00000.bin", "r+b") as stream:
        stream.seek(2 * 900)
        stream.write(b"\xff\xff")
    steps = ("--train.steps", 40, "--eval.every", 4, "--eval.batches", 8)
    job = jobs.run("--train.output_dir", tmp_path / "run", "--data.path", data, *steps, world=2, expect=2)
    assert job.text.count("DataError") == 1 and f"{split}-00000.bin holds ids" in job.text and "to 65535 near token" in job.text, job.text
    assert "Traceback" not in job.text


def test_machines_read_their_own_copies(jobs: Jobs, tmp_path: Path) -> None:
    """The same relative path on the disks of two machines: equal copies serve as one, others are refused before anything is written."""
    disks = [tmp_path / name for name in ("first", "second")]
    for disk in disks:
        disk.mkdir()
        make_data(disk / "data")
    command = ("--data.path", "data", "--data.valid", "own=data", "--train.steps", 2)
    jobs.run("--train.output_dir", tmp_path / "one", *command, folders=disks[:1])
    jobs.run("--train.output_dir", tmp_path / "two", *command, "--parallel.ep", 2, world=2, folders=disks)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-6)
    shutil.rmtree(disks[1] / "data")
    make_data(disks[1] / "data", seed=1)
    job = jobs.run("--train.output_dir", tmp_path / "run", *command, world=2, folders=disks, expect=2)
    said = r"DataError: data.path \(data\) or data.valid holds other tokens .* \(fingerprint \w{12} for rank 0, \w{12} for rank 1\); copy"
    assert len(re.findall(said, job.text)) == 1 and "Traceback" not in job.text, job.text
    shutil.rmtree(disks[1] / "data")
    job = jobs.run("--train.output_dir", tmp_path / "run", *command, world=2, folders=disks, expect=2)
    assert len(re.findall(r"DataError: .* no such folder; .* \(on \S+, rank 1\)", job.text)) == 1 and "Traceback" not in job.text, job.text
    assert not (tmp_path / "run").exists()


def test_good_data_of_the_same_writer_is_trained_on(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run("--train.output_dir", tmp_path / "run", "--data.path", make_data(tmp_path / "data"), "--train.steps", 2)
    assert len(metrics(tmp_path / "run")) == 2


def test_windows_are_cut_into_documents_where_documents_have_ends(jobs: Jobs, tmp_path: Path) -> None:
    data = ("--data.path", make_data(tmp_path / "data", eod_id=7), "--train.steps", 3, "--eval.every", 3)
    cut = (*data, "--data.attention", "document")
    # (ranks, tp, micro-batch): four samples to a micro-step in each, on which the balance loss depends
    layouts = {"one": (1, 1, 4), "two": (2, 1, 2), "tp": (2, 2, 4)}
    for name, (world, tp, micro) in layouts.items():
        layout = ("--parallel.tp", tp, "--train.micro_batch_size", micro)
        jobs.run("--train.output_dir", tmp_path / name, *cut, *layout, world=world)
    jobs.run("--train.output_dir", tmp_path / "joined", *data)
    one = metrics(tmp_path / "one")
    for name in ("two", "tp"):
        for step, other in zip(metrics(tmp_path / name), one, strict=True):
            assert (step["loss"], step["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=2e-6)
        assert metrics(tmp_path / name)[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=2e-6)
    assert abs(metrics(tmp_path / "joined")[0]["loss"] - one[0]["loss"]) > 1e-4
    work = {name: [step["tflops_per_device"] * step["step_seconds"] for step in metrics(tmp_path / name)] for name in (*layouts, "joined")}
    assert len(set(work["one"])) == 3, "each step has other documents"
    for name in ("two", "tp"):
        assert work[name] == pytest.approx([of_step / 2 for of_step in work["one"]], rel=1e-9)
    assert all(of_step < whole for of_step, whole in zip(work["one"], work["joined"], strict=True))
    job = jobs.run("--train.output_dir", tmp_path / "one", *data, "--train.steps", 6, expect=2)
    assert "data.attention" in job.text, "it would be another run"


def test_documents_that_have_no_end_are_not_cut(jobs: Jobs, tmp_path: Path) -> None:
    for path in ("synthetic", make_data(tmp_path / "data")):
        job = jobs.run("--train.output_dir", tmp_path / "run", "--data.path", path, "--data.attention", "document", world=2, expect=2)
        assert job.text.count("DataError: data.attention is document") == 1 and "Traceback" not in job.text
        assert not (tmp_path / "run").exists()


def test_a_validation_needs_a_split(jobs: Jobs, tmp_path: Path) -> None:
    run = ("--train.output_dir", tmp_path / "run", "--train.steps", 2)
    data = ("--data.path", make_data(tmp_path / "data", splits=("train",)))
    for wish in (("--eval.every", 1), ("--eval.min_gain_nats", 0.5)):
        job = jobs.run(*run, *data, *wish, expect=2)
        assert job.text.count("has no validation tokens, but eval.every is") == 1
        assert not (tmp_path / "run").exists()
    jobs.run(*run, *data)
    assert all("val_loss" not in record for record in metrics(tmp_path / "run"))


def test_the_validation_split_may_be_short(jobs: Jobs, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", tokens=40)  # one window in each split: less than a batch
    job = jobs.run("--train.output_dir", tmp_path / "run", "--data.path", data, "--train.steps", 2, "--train.global_batch_size", 1)
    assert "val_loss" in metrics(tmp_path / "run")[-1]
    assert "unigram entropy of the same 32 tokens" in job.text


# ---- the disk


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_a_file_where_the_folder_belongs(jobs: Jobs, tmp_path: Path, place: str) -> None:
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    job = jobs.run("--train.output_dir", tmp_path / place, world=2, expect=2)
    assert job.text.count("RunError") == 1 and f"train.output_dir ({tmp_path / place}) cannot be written" in job.text
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB, of which a checkpoint of nano takes 2.4: room for two and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("world", "beside"), [(1, "true"), (2, "true"), (2, "false")])
def test_no_space_for_a_checkpoint(jobs: Jobs, small_disk: Path, world: int, beside: str) -> None:
    run = small_disk / "run"
    command = ("--train.output_dir", run, "--checkpoint.every", 2, "--checkpoint.keep", 0, "--checkpoint.asynchronous", beside)
    job = jobs.run(*command, world=world, expect=2)
    assert job.text.count("RunError") == job.text.count("no space") == 1, job.text
    assert "Traceback" not in job.text
    steps = complete_steps(run / "checkpoints")
    # Beside training it is known after a later step, at the latest when the next save asks.
    assert steps == [2, 4] and steps_recorded(run) in ((6, 7, 8) if beside == "true" else (6,))
    assert not list((run / "checkpoints").glob("*.tmp")), "what was written of it would fill the disk"
    for step in steps:
        Checkpoint.open(run / "checkpoints" / f"step-{step:08d}").verify()


@pytest.mark.parametrize("world", [1, 2])
def test_no_space_for_a_record(jobs: Jobs, small_disk: Path, world: int) -> None:
    run = small_disk / "run"
    command = ("--train.output_dir", run, "--checkpoint.every", 20, "--train.steps", 40)
    job = jobs.fork(*command, world=world)
    job.until((run / "checkpoints" / "step-00000020" / NEXT_STEP_NAME).exists)
    ballast = os.open(small_disk / "ballast", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(ballast, b"x" * 4096)
    os.close(ballast)
    assert job.wait() == [2] * world, job.text
    assert job.text.count("RunError") == 1 and "metrics.jsonl: cannot be written" in job.text, job.text
    assert "Traceback" not in job.text
    (small_disk / "ballast").unlink()
    Checkpoint.open(run / "checkpoints" / "step-00000020").verify()
    jobs.run(*command, world=world)
    assert [record["step"] for record in metrics(run)] == list(range(1, 41))
