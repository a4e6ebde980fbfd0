"""`tools/inspect_checkpoint.py`: what it tells is what was saved; damage and differences are named under any layouts; exit codes."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import Layouts, save_layout
from commands import TOOLS, call

import megagate
from megagate.checkpoint import inspection
from megagate.checkpoint.certificate import Circumstances, NextStep, write_next_step
from megagate.checkpoint.fingerprint import digits, piece_sum
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import to_dict
from megagate.config.run import RunConfig

TOOL = TOOLS / "inspect_checkpoint.py"
SHAPES = {"master/w": (12, 7), "exp_avg/w": (12, 7), "exp_avg_sq/w": (12, 7), "master/e": (6, 5, 4), "state/b": (3,), "master/s": ()}
STATE = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, (name, shape) in enumerate(SHAPES.items())}
STATE["state/b"] = torch.arange(3, dtype=torch.int32)
METADATA = {"config": to_dict(RunConfig()), "applied_steps": 4, "best_val_loss": math.inf}
AROUND = Circumstances(2, 2, 4, 1, 8, "cpu", "a \x1b[31mred one", "fp32", "fp32", "2.13", 1)
NEXT = NextStep(
    step=5,
    tokens="ab12",
    loss=6.25,
    grad_norm=0.5,
    lr=1e-3,
    applied=True,
    updates={"master/w": 3.0, "master/e": 4.0, "exp_avg/w": 9.0},
    bits={"master/w": "1f"},
    circumstances=AROUND,
)


def saved(root: Path, *, world: int = 3, seed: int = 0, metadata: dict[str, Any] = METADATA, **changed: torch.Tensor | None) -> Path:
    """The state at step 4, cut at random; `changed` replaces tensors, or leaves them out."""
    state = {name: tensor for name, tensor in {**STATE, **changed}.items() if tensor is not None}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return save_layout(root, 4, state, Layouts.draw(shapes, world, random.Random(seed)), metadata)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`run(*arguments)`: the exit code, and what was said on both streams."""

    def call_and_hear(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = call("inspect_checkpoint", *arguments)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out if code == 0 or said.out else said.err

    return call_and_hear


def test_it_tells_what_was_saved(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    folder = saved(tmp_path, **{"state/fp8/site.input.history": torch.ones(2, 4)})
    code, said = run(tmp_path, "--json")
    value = json.loads(said)
    assert code == 0 and (value["folder"], value["step"], value["next_step"]) == (str(folder), 4, None)
    assert value["kinds"]["master"] == {"tensors": 3, "elements": 84 + 120 + 1, "bytes": 4 * 205, "dtypes": ["float32"]}
    assert value["kinds"]["state/fp8"] == {"tensors": 1, "elements": 8, "bytes": 32, "dtypes": ["float32"]}
    assert value["kinds"]["state"] == {"tensors": 1, "elements": 3, "bytes": 12, "dtypes": ["int32"]}
    assert value["files"] == {path.name: path.stat().st_size for path in sorted(folder.glob("rank-*"))} and len(value["files"]) == 3
    with Checkpoint.open(folder) as checkpoint:
        assert value["tensors"]["master/e"] == {
            "shape": [6, 5, 4],
            "dtype": "float32",
            "pieces": len(checkpoint.stored("master/e").pieces),
            "files": sorted({piece.file for piece in checkpoint.stored("master/e").pieces}),
        }
    assert value["metadata"]["best_val_loss"] == "inf" and value["metadata"]["config"] == json.loads(json.dumps(METADATA["config"]))
    assert "damages" not in value and "compared" not in value


def test_its_text(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    folder = saved(tmp_path)
    code, short = run(folder)
    assert code == 0 and f"{folder}: step 4, 0.00 MB by 3 ranks" in short
    assert "  model.num_layers: " in short and "applied_steps: 4" in short and "best_val_loss: Infinity" in short
    assert "master            3 tensors" in short and "nobody has recorded what the next step did" in short
    assert "optim.weight_decay" not in short and "master/e float32" not in short
    code, long = run(folder, "--config", "--tensors", "--verify")
    assert code == 0 and "  optim.weight_decay: " in long and "  master/e float32 [6, 5, 4]: " in long and "verified: " in long


def test_the_certificate_is_told(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    folder = saved(tmp_path)
    write_next_step(folder, NEXT)
    code, said = run(folder, "--tensors")
    assert code == 0 and "certificate: digests of all tensors, and step 5:" in said
    assert "loss 6.250000, gradient norm 0.5, update norm 5, learning rate 0.001, tokens ab12" in said
    assert "dp 2, tp 2, ep 4, zero_stage 1" in said and "update of exp_avg/w: 9" in said
    assert "\x1b" not in said, "what a file holds cannot steer a terminal"
    value = json.loads(run(folder, "--json")[1])["next_step"]
    assert (value["update_norm"], value["updates"], value["circumstances"]["ep"]) == (5.0, dict(NEXT.updates), 4)
    write_next_step(folder, replace(NEXT, applied=False, loss=math.nan, grad_norm=math.inf, updates={}))
    assert "step 5, skipped: a number was not finite:" in run(folder)[1]
    assert json.loads(run(folder, "--json")[1])["next_step"]["loss"] == "nan"
    (folder / "next_step.json").write_text("{}")
    code, said = run(folder)
    assert code == 2 and "next_step.json is damaged or was edited" in said


def test_the_fingerprint_is_told_and_taken_again(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    """Of tensors in pieces; a checkpoint without one is verified by its digests alone."""
    prints = {name: digits(int(piece_sum(tensor, (0,) * tensor.dim()))) for name, tensor in STATE.items()}
    folder = saved(tmp_path / "a", metadata={**METADATA, "fingerprint": prints})
    code, said = run(folder, "--verify", "--tensors")
    assert code == 0 and "fingerprint of the state in memory: of 6 tensors" in said
    assert f"fingerprint of master/w: {prints['master/w']}" in said
    assert "when they were saved, and 6 tensors their fingerprints" in said
    value = json.loads(run(folder, "--json")[1])
    assert value["fingerprint"] == prints and "fingerprint" not in value["metadata"]
    other = {**prints, "master/w": prints["exp_avg/w"], "lost": prints["master/w"]}
    damaged = saved(tmp_path / "b", metadata={**METADATA, "fingerprint": other})
    code, said = run(damaged, "--verify")
    assert code == 1 and said.count("DAMAGED: ") == 2
    assert f"DAMAGED: lost is not what was in memory when it was saved: its fingerprint is missing, {other['lost']} was recorded" in said
    assert f"master/w is not what was in memory when it was saved: its fingerprint is {prints['master/w']}, {other['master/w']} was" in said
    code, said = run(folder, "--compare", damaged)
    assert code == 0 and "they are the same" in said, "it is no setting"
    assert "fingerprint of the state in memory: none" in run(saved(tmp_path / "c"), "--verify")[1]
    broken = saved(tmp_path / "d", metadata={**METADATA, "fingerprint": [1]})
    assert run(broken)[0] == 2 and "16 hexadecimal digits" in run(broken)[1]


def test_all_damages_are_named(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    folder = saved(tmp_path)
    assert run(folder, "--verify")[0] == 0
    flip(folder / "rank-00000.safetensors", -1)
    flip(folder / "rank-00002.safetensors", -1)
    code, said = run(folder, "--verify", "--json")
    damages = json.loads(said)["damages"]
    assert code == 1 and len(damages) == 2
    assert all(f"rank-0000{rank}.safetensors: its bytes have the digest" in text for rank, text in zip((0, 2), damages, strict=True))
    code, said = run(folder, "--verify")
    assert code == 1 and said.count("DAMAGED: ") == 2 and "verified" not in said
    flip(folder / "rank-00000.safetensors", 9)
    assert run(folder, "--verify")[1].count("its header is damaged") == 1
    assert run(folder)[0] == 0, "without --verify no data is read"
    os.truncate(folder / "rank-00001.safetensors", 100)
    assert [run(folder, *words)[0] for words in ((), ("--verify",))] == [2, 1]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("world", [1, 4])
def test_other_layouts_are_the_same(
    tmp_path: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, block: int, world: int
) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", world=world, seed=1)
    code, said = run(a, "--compare", b)
    assert code == 0 and "6 tensors have the same bits\nthey are the same" in said


def changed(name: str, index: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = STATE[name].clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_differences_are_measured(
    tmp_path: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    one, other = changed("master/e", (3, 2, 1), 40.0), changed("master/e", (3, 2, 1), -2.0)
    other[5, 4, 3] += 0.5
    zeros = {"exp_avg/w": changed("exp_avg/w", (0, 0), 0.0)}, {"exp_avg/w": changed("exp_avg/w", (0, 0), -0.0)}
    ids = {"state/b": torch.tensor([0, 1, 7], dtype=torch.int32)}
    nan = {"exp_avg_sq/w": changed("exp_avg_sq/w", (11, 6), math.nan)}
    a = saved(tmp_path / "a", **{"master/e": one}, **zeros[0])
    b = saved(tmp_path / "b", world=2, seed=1, **{"master/e": other}, **zeros[1], **nan, **ids)
    code, said = run(a, "--compare", b, "--json")
    value = json.loads(said)["compared"]
    found = {row.pop("name"): row for row in value["tensors"]}
    assert code == 1 and not value["same"] and not value["settings"] and len(found) == 6
    assert found["master/e"] == {"same_bits": False, "largest": 42.0, "scale": 40.0, "unequal": 2, "elements": 120}
    assert found["exp_avg/w"]["largest"] == 0 and found["exp_avg/w"]["unequal"] == 1 and not found["exp_avg/w"]["same_bits"]
    assert found["exp_avg_sq/w"]["largest"] == "nan" and found["exp_avg_sq/w"]["unequal"] == 1
    assert found["state/b"]["largest"] == 5 and found["master/w"]["same_bits"] and found["master/s"]["same_bits"]
    code, said = run(a, "--compare", b)
    lines = said[said.index("compared with") :].splitlines()
    assert [line.split(":")[0].strip() for line in lines[2:6]] == ["exp_avg_sq/w", "master/e", "state/b", "exp_avg/w"], "the worst first"
    assert lines[1:] == [
        "  4 tensors of other bits:",
        *lines[2:6],
        "  2 tensors have the same bits",
        "they differ",
    ]


def test_equal_nans_are_equal(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    nan = {"master/w": changed("master/w", (2, 2), math.nan)}
    assert run(saved(tmp_path / "a", **nan), "--compare", saved(tmp_path / "b", seed=2, **nan))[0] == 0


def test_settings_and_tensors_that_differ_are_named(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    config = RunConfig()
    other = {"config": to_dict(replace(config, optim=replace(config.optim, weight_decay=0.25))), "applied_steps": True, "note": 1}
    a = saved(tmp_path / "a")
    b = saved(tmp_path / "b", metadata=other, **{"master/s": None, "more": torch.ones(2), "master/w": torch.ones(7, 12)})
    code, said = run(a, "--compare", b, "--json")
    value = json.loads(said)["compared"]
    assert code == 1 and value["settings"] == {
        "config.optim.weight_decay": [config.optim.weight_decay, 0.25],
        "applied_steps": [4, True],
        "best_val_loss": ["inf", None],
        "note": [None, 1],
    }
    assert (value["missing"], value["extra"]) == (["master/s"], ["more"])
    assert value["reshaped"] == {"master/w": ["float32 [12, 7]", "float32 [7, 12]"]}
    said = run(a, "--compare", b)[1]
    assert "1 tensor only here:\n    master/s\n  1 tensor only there:\n    more\n" in said
    assert f"config.optim.weight_decay: {config.optim.weight_decay}, there 0.25" in said
    c = saved(tmp_path / "c", metadata={**METADATA, "applied_steps": 5})
    code, said = run(a, "--compare", c)
    assert code == 1 and said.endswith("their tensors are the same\n")


def test_bad_words_and_a_pipe_that_ends(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(tmp_path / "nowhere")
    assert code == 2 and said.startswith("CheckpointError: ") and "nowhere does not exist; name a step-* folder" in said
    code, said = run(tmp_path / ("x" * 300))
    assert code == 2 and "cannot be reached (File name too long); check the path" in said
    folder = saved(tmp_path)
    assert run(folder, "--compare", tmp_path / "nowhere")[0] == 2
    command = f"{sys.executable} {TOOL} {folder} --tensors --config | head -n 1"
    path = os.pathsep.join([str(Path(megagate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert result.stdout.startswith(str(folder)) and result.stderr == ""
