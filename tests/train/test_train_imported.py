"""A run begins from an imported checkpoint: weights alone, of step 0, no sample seen."""

import math
from pathlib import Path

import pytest
from train_jobs import NANO, Jobs, metrics

from megagate.checkpoint import store
from megagate.checkpoint.store import Checkpoint, Piece
from megagate.config.cli import parse
from megagate.config.keys import to_dict

TP2_EP2 = ("--parallel.tp", 2, "--parallel.ep", 2, "--train.micro_batch_size", 2)


def import_weights(source: Path, root: Path, *, step: int = 0) -> Path:
    """The weights of a checkpoint as a conversion leaves them: without moments, data and a generator's state."""
    metadata = {
        "config": to_dict(parse(["--config", str(NANO)], prog="test")),
        "applied_steps": 0,
        "data": None,
        "micro_step_samples": None,
        "best_val_loss": None,
        "megagate": "0",
        "imported_from": "elsewhere",
    }
    with Checkpoint.open(source) as checkpoint:
        names = [name for name in checkpoint.tensors if name.startswith(("master/", "state/"))]
        pieces = [Piece(name, tensor.shape, (0,) * tensor.dim(), tensor) for name in names for tensor in [checkpoint.read_whole(name)]]
        store.write_rank(store.begin(root, step), 0, pieces)
    return store.publish(root, step, world_size=1, metadata=metadata)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps."""
    jobs = Jobs(tmp_path_factory.mktemp("trained"))
    try:
        jobs.run("--train.output_dir", jobs.folder / "run", "--train.steps", 5)
    finally:
        jobs.close()
    return jobs.folder / "run"


def test_it_trains_from_its_first_sample_on(jobs: Jobs, tmp_path: Path, trained: Path) -> None:
    folder = import_weights(trained, tmp_path / "imported")
    settings = ("--train.steps", 3, "--train.resume", folder, "--eval.every", 1)
    jobs.run("--train.output_dir", tmp_path / "one", *settings, "--train.micro_batch_size", 2)
    job = jobs.run("--train.output_dir", tmp_path / "two", *settings, *TP2_EP2, world=2)
    assert job.text.count("resumed from the checkpoint of step 0") == job.text.count("NOT CHECKED by doing the next step again") == 1
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [record["step"] for record in two] == [1, 2, 3]
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-5) for a, b in zip(one, two, strict=True))
    assert two[0]["loss"] < metrics(trained)[0]["loss"] - 0.01, "the same samples, by weights that have learnt"
    with Checkpoint.open(tmp_path / "two") as checkpoint:
        assert checkpoint.metadata["applied_steps"] == 3 and checkpoint.metadata["data"]["samples"] == 24


def test_of_a_later_step_it_must_say_what_it_has_seen(jobs: Jobs, tmp_path: Path, trained: Path) -> None:
    folder = import_weights(trained, tmp_path / "imported", step=2)
    job = jobs.run("--train.output_dir", tmp_path / "new", "--train.resume", folder, world=2, expect=2)
    assert job.text.count("DataError") == 1 and "is of step 2 and does not say which samples it has seen" in job.text
    assert not (tmp_path / "new").exists()
