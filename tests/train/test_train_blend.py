"""A job on a blend: the same on two ranks, validation sets by name, weights that change from a later sample on."""

from pathlib import Path

import pytest
from train_data import make_data
from train_jobs import Jobs, metrics


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Two data sets, the second of so few tokens that a run reads it several times."""
    return make_data(tmp_path / "a"), make_data(tmp_path / "b", tokens=400, seed=1)


def test_a_blend_is_trained_on_and_each_set_is_measured(jobs: Jobs, tmp_path: Path, places: tuple[Path, Path]) -> None:
    a, b = places
    settings = ("--data.path", f"0.5 {a} 0.5 {b}", "--train.steps", 4, "--eval.every", 2)
    one = jobs.run("--train.output_dir", tmp_path / "one", *settings)
    assert f"blend: 4 steps read {a} 0.09 times, {b} 1.45 times" in one.text, one.text  # 16 of 186 windows, 16 of 11
    jobs.run("--train.output_dir", tmp_path / "two", *settings, "--parallel.ep", 2, world=2)
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", *(["val_loss", "val_loss/a", "val_loss/b"] if first["step"] in (2, 4) else [])):
            assert first[key] == pytest.approx(second[key], rel=1e-4)
    last = metrics(tmp_path / "one")[-1]
    # a: 16 windows, the length of a validation; b: its 12
    assert last["val_loss"] == pytest.approx((16 * last["val_loss/a"] + 12 * last["val_loss/b"]) / 28, rel=1e-12)
    assert last["val_loss/a"] != last["val_loss/b"]
    assert "unigram entropy of the same 896 tokens" in one.text


def test_validation_sets_of_a_single_data_set_may_be_named(jobs: Jobs, tmp_path: Path, places: tuple[Path, Path]) -> None:
    a, b = places
    jobs.run("--train.output_dir", tmp_path / "run", "--data.path", a, "--data.valid", f"other={b}", "--train.steps", 2)
    record = metrics(tmp_path / "run")[-1]
    assert record["val_loss"] == record["val_loss/other"] and "val_loss/a" not in record


def test_weights_may_change_where_a_run_stands(jobs: Jobs, tmp_path: Path, places: tuple[Path, Path]) -> None:
    a, b = places
    saves = ("--checkpoint.every", 2, "--checkpoint.keep", 0)
    jobs.run("--train.output_dir", tmp_path / "plain", "--data.path", a, "--train.steps", 4, *saves)
    resume = ("--train.resume", tmp_path / "plain" / "checkpoints" / "step-00000002", "--train.steps", 4)
    early = jobs.run("--train.output_dir", tmp_path / "early", "--data.path", f"1 {a} from 15 1 {a} 1 {b}", *resume, expect=2)
    assert early.text.count("was trained on another data set or sample order (") == 1 and f"({b} only here); a resumed run" in early.text
    assert "its weights may change from a later" in early.text
    jobs.run("--train.output_dir", tmp_path / "more", "--data.path", f"1 {a} from 24 1 {a} 1 {b}", *resume)
    plain, more = metrics(tmp_path / "plain"), metrics(tmp_path / "more")
    assert [record["step"] for record in more] == [3, 4]
    assert more[0]["loss"] == plain[2]["loss"]
    assert more[1]["loss"] != plain[3]["loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5 {a} 0.5 synthetic", "DataError: {a} and synthetic were made by different tokenizers"),
        ("0.5 {a} 0.5 {a}/../a", "DataError: data.path: {a} and {a}/../a hold the same tokens"),
    ],
)
def test_a_blend_that_cannot_be_is_refused_once(
    text: str, message: str, jobs: Jobs, tmp_path: Path, places: tuple[Path, Path]
) -> None:
    a, b = places
    job = jobs.run("--train.output_dir", tmp_path / "run", "--data.path", text.format(a=a, b=b), world=2, expect=2)
    assert job.text.count(message.format(a=a)) == 1, job.text
    assert "Traceback" not in job.text and not (tmp_path / "run").exists()
