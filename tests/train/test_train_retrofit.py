"""A run goes on from a checkpoint that got a gate: at its step, with its loss, and the gate learns."""

import math
from pathlib import Path

import pytest
from train_jobs import Jobs, metrics

from megagate.checkpoint.retrofit import add_gate
from megagate.checkpoint.store import Checkpoint
from megagate.config.model import GateGranularity

EXACT_TO = 1e-6  # relative; the GEMM of q, k and v has other shapes with the gate in it
BASE = ("--schedule.kind", "constant", "--model.attention.gate.position", "none")
LAYOUTS = {1: (), 2: ("--parallel.tp", 2, "--parallel.ep", 2, "--train.micro_batch_size", 1, "--parallel.zero_stage", 2)}


@pytest.mark.parametrize(("world", "granularity"), [(1, "elementwise"), (2, "headwise")])
def test_a_run_goes_on_with_a_gate(jobs: Jobs, tmp_path: Path, world: int, granularity: GateGranularity) -> None:
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    jobs.run("--train.output_dir", a, *BASE, "--train.steps", 5, *LAYOUTS[world], world=world)
    jobs.run("--train.output_dir", tmp_path / "whole", *BASE, "--train.steps", 6, *LAYOUTS[world], world=world)
    add_gate(a, b, granularity)
    command = ("--train.output_dir", c, "--train.resume", b, "--train.steps", 7, *LAYOUTS[world])

    job = jobs.run(*command, *BASE, world=world, expect=2)
    assert "model.attention.gate.position: G1 there, none here" in job.text and not c.exists()
    job = jobs.run(*command, world=world, config=b / "config.yaml")
    assert job.text.count("resumed from the checkpoint of step 5") == 1
    records, expected = metrics(c), metrics(tmp_path / "whole")[-1]
    assert [record["step"] for record in records] == [6, 7] and expected["step"] == 6
    for key in ("loss", "aux_loss", "z_loss", "tokens", "lr"):
        assert math.isclose(records[0][key], expected[key], rel_tol=EXACT_TO), key
    with Checkpoint.open(c) as checkpoint:
        assert checkpoint.metadata["applied_steps"] == 2
        for name in ("layers.0.attention.gate.weight", "layers.1.attention.gate.weight"):
            assert (checkpoint.read_whole(f"master/{name}") != 0).any(1).all()
            assert (checkpoint.read_whole(f"exp_avg_sq/{name}") != 0).any(1).all()
