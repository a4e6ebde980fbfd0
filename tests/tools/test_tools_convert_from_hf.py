"""`tools/convert_checkpoint.py from-hf`: its words and exit codes."""

import json
from functools import partial
from pathlib import Path

import pytest
from checkpoint.hf.hf_dirs import USE, export_of, random_state, theirs_of, write_directory
from checkpoint.hf.hf_released import released
from commands import call
from parity.variants import MOE
from torch import Tensor

from megagate.checkpoint.hf import ops
from megagate.checkpoint.hf.hf_config import hf_config
from megagate.config.cli import parse

main = partial(call, "convert_checkpoint")


def test_an_export_comes_back_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = export_of(tmp_path / "hf", MOE, "qwen3_next", random_state(MOE)), tmp_path / "o u t"
    assert main("from-hf", source, out) == 0
    told = capsys.readouterr().out
    assert f"{source} -> {out / 'step-00000000'}" in told
    assert "read as qwen3_next, written by to-hf" in told
    assert "norm weights are below 1/2" in told
    assert "compared bit by bit" in told and "logits: largest error" in told and "greedy continuation" in told
    assert f"go on with: --config '{out}/config.yaml' --train.resume '{out}' --train.output_dir NEW" in told
    assert parse(["--config", str(out / "config.yaml"), "--train.resume", str(out)], prog="test").model == MOE


def test_without_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("from-hf", export_of(tmp_path / "hf", MOE, "remote-code", random_state(MOE)), tmp_path / "out", "--no-verify") == 0
    told = capsys.readouterr().out
    assert "go on with" in told and "verified" not in told and "logits" not in told and "1/2" not in told


def test_what_is_refused_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = theirs_of(MOE, "qwen3_next", random_state(MOE))
    del theirs["model.layers.1.mlp.experts.3.down_proj.weight"]
    source = write_directory(tmp_path / "hf", hf_config(MOE, "qwen3_next", USE), theirs)
    assert main("from-hf", source, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"CheckpointError: {source}: 1 of its tensors are not those of the model") and not captured.out
    assert not (tmp_path / "out").exists()


def test_a_failed_verification_removes_nothing_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = export_of(tmp_path / "hf", MOE, "qwen3_next", random_state(MOE))
    right = ops.QueryAndGate.from_hf

    def wrong(self: ops.QueryAndGate, theirs: list[Tensor], *, where: str) -> list[Tensor]:
        return [part.flip(0) for part in right(self, theirs, where=where)]

    monkeypatch.setattr(ops.QueryAndGate, "from_hf", wrong)
    assert main("from-hf", source, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "WRONG: logits differ" in captured.out and "the first part whose output differs is layers.0.attention" in captured.out
    assert "but do not train on it" in captured.out and (tmp_path / "out" / "step-00000000").is_dir()


def test_a_released_model_says_what_its_logits_were_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = released(tmp_path / "hf", "headwise")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    assert main("from-hf", folder, tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "read as gated_attention, not written by to-hf" in told
    assert "bit by bit" in told and "the code released with these models is not run" in told
