"""The command that retrofits a gate: its words and exit codes, and that a refusal writes nothing."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import TOOLS, call
from parity.engines import MOE
from parity.sharded import random

from megagate.checkpoint import store
from megagate.config.cli import parse
from megagate.config.count import parameter_shapes
from megagate.config.keys import to_dict
from megagate.config.model import GateConfig
from megagate.config.run import RunConfig, TrainConfig

TOOL = TOOLS / "retrofit_gate.py"
main = partial(call, "retrofit_gate")
STEP = 7


def checkpoint(run: Path, gate: GateConfig | None = None, *, steps: int = 10) -> Path:
    """A run's folder with one checkpoint of arbitrary weights."""
    model = replace(MOE, attention=replace(MOE.attention, gate=gate or GateConfig()))
    pieces = [store.Piece(f"master/{name}", s, (0,) * len(s), random(name, *s)) for name, s in parameter_shapes(model).items()]
    store.write_rank(store.begin(run / "checkpoints", STEP), 0, pieces)
    metadata = {"config": to_dict(RunConfig(model=model, train=TrainConfig(steps=steps)))}
    store.publish(run / "checkpoints", STEP, world_size=1, metadata=metadata)
    return run


def test_it_says_what_it_did_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = checkpoint(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    assert main("--checkpoint", a, "--gate", "elementwise", "--output", b) == 0
    said, err = capsys.readouterr()
    assert said.startswith(f"{a}/checkpoints/step-00000007, step 7 -> {b}/step-00000007\n") and err == ""
    for words in (
        "a sigmoid gate at G1, elementwise, 2 weights of zeros",
        "projections: x 2\n",
        "exact, by powers of two",
        "moments were left out",
    ):
        assert words in said
    assert "NOT EXACT" not in said and "raise train.steps" not in said
    assert said.endswith(f"go on with: --config {b}/config.yaml --train.resume {b} --train.output_dir NEW\n")
    again = said.splitlines()[-1].removeprefix("go on with: ").split()
    config = parse(again, prog="test")
    assert config.model.attention.gate == GateConfig("G1") and store.resolve(Path(config.train.resume)) == b / "step-00000007"

    assert main("--checkpoint", b, "--gate", "none", "--output", c) == 0
    said = capsys.readouterr().out
    assert "the gate is removed\n" in said and "projections: x 0.5\n" in said and "exact, by powers of two" in said
    first, last = (store.Checkpoint.open(path) for path in (a, c))
    assert first.tensors.keys() == last.tensors.keys()
    assert all(torch.equal(first.read_whole(name), last.read_whole(name)) for name in first.tensors)


def test_what_is_not_exact_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = checkpoint(tmp_path / "a", GateConfig("G1", "headwise", score="parameter"), steps=STEP)
    assert main("--checkpoint", a, "--gate", "none", "--output", tmp_path / "b") == 0
    said = capsys.readouterr().out
    (line,) = [
        line for line in said.splitlines() if line.startswith("NOT EXACT: these are no powers of two; masters were rounded by up to ")
    ]
    assert 1e-8 < float(line.split("up to ")[1].split()[0]) < 6e-8
    factors = next(line for line in said.splitlines() if line.startswith("output projections: x "))
    low, high = (float(word) for word in factors.removeprefix("output projections: x ").split(" to "))
    assert 0 < low < high < 1
    assert "exact, by" not in said and "raise train.steps, which is 7: the run was at its end" in said


@pytest.mark.parametrize(
    ("gate", "wanted", "told"),
    [
        (GateConfig("G1"), "headwise", "so the model is gated already"),
        (GateConfig(), "none", "there is no gate to remove"),
        (GateConfig("G1"), "none", "the gate depends on the input: the largest weight of master/layers."),
        (GateConfig("G2"), "none", "model.attention.gate.position is G2"),
        (GateConfig(), "G3", "--gate (G3) must be elementwise or headwise"),
    ],
    ids=lambda value: value.position if isinstance(value, GateConfig) else value.split()[0],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], gate: GateConfig, wanted: str, told: str) -> None:
    a = checkpoint(tmp_path / "a", gate)
    assert main("--checkpoint", a, "--gate", wanted, "--output", tmp_path / "b") == 2
    assert_refused(capsys, told)
    assert not (tmp_path / "b").exists()


def assert_refused(capsys: pytest.CaptureFixture[str], told: str) -> None:
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1 and err.startswith(("CheckpointError: ", "ConfigError: "))


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = checkpoint(tmp_path / "a")
    for source, output, told in (
        (tmp_path / "nowhere", tmp_path / "b", "nowhere does not exist"),
        (a, a / "gated", "must not lie in the run that is read"),
        (a, tmp_path, "must be a new or an empty folder, and it exists"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert main("--checkpoint", source, "--gate", "headwise", "--output", output) == 2
        assert_refused(capsys, told)
        assert sorted(tmp_path.rglob("*")) == before


def test_all_three_options_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--gate", "none") == 2
    assert "required: --checkpoint, --output" in capsys.readouterr().err


def test_help_is_instant_and_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(TOOL), "--help"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(TOOL.parents[1])])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--checkpoint", "--gate", "--output"))
