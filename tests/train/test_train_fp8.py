"""A run under emulated FP8: its histories are part of what is resumed, other precisions take its checkpoints, exports leave them out."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from train_jobs import Jobs, contents, metrics, numbers

from megagate.checkpoint import store
from megagate.checkpoint.certificate import NEXT_STEP_NAME
from megagate.checkpoint.fingerprint import FINGERPRINT
from megagate.checkpoint.hf.export import export
from megagate.checkpoint.hf.verify import verify_export
from megagate.checkpoint.retrofit import add_gate
from megagate.checkpoint.saved_model import PRECISION_STATE
from megagate.checkpoint.store import Checkpoint, Piece

DP2_EP2 = ("--parallel.ep", 2)
SETTINGS = (
    *("--train.steps", 8, "--checkpoint.every", 4, "--checkpoint.keep", 0, "--schedule.kind", "constant"),
    *("--model.attention.gate.position", "none", *DP2_EP2),
)
SHORT = (*SETTINGS, "--train.steps", 6)
DELAYED = ("--precision.fp8.recipe", "delayed", "--precision.fp8.emulate", "true", "--precision.fp8.amax_history", 16)
NEWEST = "step-00000008"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight steps without a break; its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("fp8")
    started = Jobs(folder)
    started.run("--train.output_dir", folder / "whole", *SETTINGS, *DELAYED, world=2)
    yield folder / "whole" / "checkpoints" / "step-00000004"
    started.close()


def kept(path: Path) -> list[str]:
    with Checkpoint.open(path) as checkpoint:
        return [name for name in checkpoint.tensors if name.startswith(PRECISION_STATE)]


def without_histories(path: Path, output: Path, *, promised: bool) -> Path:
    """The same checkpoint in another folder, but for what precision keeps, which its fingerprint may still tell of."""
    with Checkpoint.open(path) as checkpoint:
        names = [name for name in checkpoint.tensors if not name.startswith(PRECISION_STATE)]
        whole = {name: checkpoint.read_whole(name) for name in names}
        store.write_rank(store.begin(output, checkpoint.step), 0, [Piece(n, t.shape, (0,) * t.dim(), t) for n, t in whole.items()])
        told = {name: one for name, one in checkpoint.metadata[FINGERPRINT].items() if promised or name in names}
        store.publish(output, checkpoint.step, world_size=1, metadata=checkpoint.metadata | {FINGERPRINT: told})
    return output / path.name


def with_an_infinity(path: Path, output: Path) -> Path:
    """The same checkpoint, without a fingerprint, whose second block has an infinity in a weight."""
    with Checkpoint.open(path) as checkpoint:
        whole = {name: checkpoint.read_whole(name) for name in checkpoint.tensors}
        whole["master/layers.1.attention.q.weight"][3, 5] = torch.inf
        store.write_rank(store.begin(output, checkpoint.step), 0, [Piece(n, t.shape, (0,) * t.dim(), t) for n, t in whole.items()])
        metadata = {key: value for key, value in checkpoint.metadata.items() if key != FINGERPRINT}
        store.publish(output, checkpoint.step, world_size=1, metadata=metadata)
    return output / path.name


def tensors(run: Path) -> dict[str, str]:
    """A digest of each file of tensors of the last step."""
    return {name: digest for name, digest in contents(run / "checkpoints" / NEWEST).items() if name.endswith(".safetensors")}


def test_four_steps_and_four_are_eight_bit_for_bit(jobs: Jobs, tmp_path: Path, whole: Path) -> None:
    job = jobs.run("--train.output_dir", tmp_path / "run", "--train.resume", whole, *SETTINGS, *DELAYED, world=2)
    assert "step 5, done again, is the one that followed step-00000004 when it was saved\n" in job.text
    assert "the loaded state is the one that was saved" in job.text and "FP8" not in job.text
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(whole.parents[1]))[4:]
    assert tensors(tmp_path / "run") == tensors(whole.parents[1])
    assert len(kept(whole)) == 2 * 4 * 3 * 2, "layers, products, operands, history and scale"


def test_without_its_histories_it_is_another_run(jobs: Jobs, tmp_path: Path, whole: Path) -> None:
    """Refused where a fingerprint says that they were there; else it is said, and found out by the next step."""
    command = ("--train.output_dir", tmp_path / "run", *SHORT, *DELAYED, "--train.resume")
    job = jobs.run(*command, without_histories(whole, tmp_path / "lost", promised=True), world=2, expect=2)
    assert "is not what was saved: its fingerprint is missing" in job.text and "47 other tensors differ too" in job.text
    bare = without_histories(whole, tmp_path / "bare", promised=False)
    job = jobs.run(*command, bare, world=2)
    assert job.text.count("48 tensors of FP8's delayed scaling begin fresh, such as state/fp8/layers.0.attention.project.input.") == 1
    assert "but 48 of FP8 are not compared" in job.text and "NOT CHECKED by doing the next step again" in job.text
    assert [one["loss"] for one in metrics(tmp_path / "run")] != [one["loss"] for one in metrics(whole.parents[1])[4:6]]
    shutil.rmtree(tmp_path / "run")
    shutil.copy(whole / NEXT_STEP_NAME, bare)
    job = jobs.run(*command, bare, world=2, expect=2)
    assert "step 5, done again from" in job.text and "began with the very state" not in job.text


def test_another_layout_goes_on_with_its_histories(jobs: Jobs, tmp_path: Path, whole: Path) -> None:
    layout = ("--parallel.tp", 2, "--parallel.ep", 4, "--train.micro_batch_size", 1)
    job = jobs.run("--train.output_dir", tmp_path / "run", "--train.resume", whole, *SHORT, *DELAYED, *layout, world=4)
    assert "step 5, done again, is the one that followed step-00000004 when it was saved, to rounding" in job.text
    assert "the loaded state is the one that was saved" in job.text and "FP8" not in job.text
    for record, other in zip(metrics(tmp_path / "run"), metrics(whole.parents[1])[4:6], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=2e-3)


@pytest.mark.parametrize("history", ["none", 16, 8])
def test_another_precision_takes_it_and_says_what_it_left(jobs: Jobs, tmp_path: Path, whole: Path, history: str | int) -> None:
    """Without FP8 (from it, and to it), and with a history of another length."""
    delayed = (*DELAYED, "--precision.fp8.amax_history", history)
    if history == 16:
        jobs.run("--train.output_dir", tmp_path / "plain", *SHORT, world=2)
        whole = tmp_path / "plain" / "checkpoints" / whole.name
    precision = () if history == "none" else delayed
    job = jobs.run("--train.output_dir", whole.parents[1], *SETTINGS, *precision, world=2, expect=2)
    assert "holds a run of another config" in job.text and "  precision.fp8." in job.text
    job = jobs.run("--train.output_dir", tmp_path / "run", "--train.resume", whole, *SHORT, *precision, world=2)
    begun, left = {"none": (0, 48), 16: (48, 0), 8: (24, 24)}[history]
    assert (f"{begun} tensors of FP8's delayed scaling begin fresh" in job.text) == bool(begun)
    assert (f"{left} tensors of FP8's delayed scaling in step-00000004 are left there" in job.text) == bool(left)
    assert f"tensors have the same fingerprints, but {begun + left} of FP8 are not compared" in job.text
    assert "NOT CHECKED against next_step.json of step-00000004: the loss and the gradient norm and the updates: the config" in job.text
    losses, others = ([one["loss"] for one in records] for records in (metrics(tmp_path / "run"), metrics(whole.parents[1])[4:6]))
    assert losses == pytest.approx(others, rel=0.02) and losses != others


def test_an_export_has_no_state_of_fp8_and_verifies(tmp_path: Path, whole: Path) -> None:
    written, names = export(whole, tmp_path / "hf"), []
    found = verify_export(whole, tmp_path / "hf")
    assert found.passed and found.tensors == written.tensors and found.logits is not None, found.lines()
    for path in sorted((tmp_path / "hf").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    words = ("_extra_state", "fp8", "scale", "history", "amax")
    assert len(names) == written.tensors and not [name for name in names if any(word in name for word in words)]


def test_a_retrofit_leaves_histories_behind(tmp_path: Path, whole: Path) -> None:
    """They are of an output projection and its input that are now multiplied by 2 and by 1/2."""
    made = add_gate(whole, tmp_path / "gated", "elementwise")
    assert kept(whole) and not kept(made.folder)
    assert made.config.precision.fp8.recipe == "delayed"


def test_a_number_that_is_not_finite_is_named(jobs: Jobs, tmp_path: Path) -> None:
    """By layer and tensor, once, whether the run stops or goes on."""
    fp8 = ("--precision.fp8.recipe", "current", "--precision.fp8.emulate", "true")
    explode = ("--optim.lr", 1e30, "--schedule.min_lr", 0, "--schedule.warmup_steps", 4, "--schedule.kind", "constant", "--train.steps", 4)
    named = r"step \d+: the loss is \S+ and the gradient norm \S+; the first: \S.* is not finite \(\d+ nan and \d+ inf of \d+\), on rank \d"
    job = jobs.run("--train.output_dir", tmp_path / "a", *DP2_EP2, *fp8, *explode, world=2, expect=3)
    assert len(re.findall(named + "; training stops", job.text)) == 1, job.text
    job = jobs.run("--train.output_dir", tmp_path / "b", *DP2_EP2, *fp8, *explode, "--train.on_nonfinite", "skip", world=2)
    skipped = sum("skipped" in record for record in metrics(tmp_path / "b"))
    assert len(re.findall(named + "; the parameters keep", job.text)) == skipped > 0, job.text


def test_an_infinity_that_delayed_scaling_saturates_is_named(jobs: Jobs, tmp_path: Path, whole: Path) -> None:
    """Though the loss is finite: it stops the run, which saves nothing, or is told at each step."""
    command = ("--train.resume", with_an_infinity(whole, tmp_path / "infinite"), *SHORT, *DELAYED, "--checkpoint.every", 1)
    told = r"step (\d+): layers\.1\.attention\.project's weight held an infinity, which FP8's delayed scaling made its largest number: the "
    told += r"loss is \d\.\d+ and the step was applied with that; training "
    job = jobs.run("--train.output_dir", tmp_path / "a", *command, world=2, expect=3)
    assert re.findall(told + r"stops \(train.on_nonfinite: stop\) and the checkpoints in \S+ stay", job.text) == ["5"], job.text
    assert "Traceback" not in job.text and not list((tmp_path / "a").glob("checkpoints/*"))
    job = jobs.run("--train.output_dir", tmp_path / "b", *command, "--train.on_nonfinite", "skip", world=2)
    assert re.findall(told + r"goes on \(train.on_nonfinite: skip\)\n", job.text) == ["5", "6"], job.text
    assert [record["step"] for record in metrics(tmp_path / "b") if "skipped" not in record] == [5, 6]
