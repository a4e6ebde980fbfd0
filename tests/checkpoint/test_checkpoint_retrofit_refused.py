"""A retrofit that is refused writes nothing; one that is killed or finds no space leaves all or nothing."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import crash_writer
import pytest
import torch
from checkpoint_helpers import contents
from own_memory import growth, in_fresh_process
from retrofits import LAYERS, STEPS, assert_same, loaded, masters, refused, save, save_whole, tensors, trained
from torch import Tensor

from megagate.checkpoint import store
from megagate.checkpoint.rankfile import PieceFile
from megagate.checkpoint.retrofit import add_gate, remove_gate
from megagate.checkpoint.store import Checkpoint
from megagate.config.cli import parse
from megagate.config.count import parameter_shapes
from megagate.config.keys import to_dict
from megagate.config.model import AttentionConfig, GateConfig, GatePosition, ModelConfig
from megagate.config.run import RunConfig
from megagate.errors import MegagateError, RunError


@pytest.mark.parametrize("position", get_args(GatePosition))
def test_positions(tmp_path: Path, position: GatePosition) -> None:
    a = trained(tmp_path / "a", gate=GateConfig(position), mute=True)
    key = f"model.attention.gate.position is {position}"
    if position == "none":
        assert f"{key}, and --gate none needs a gate at G1" in refused(lambda: remove_gate(a, tmp_path / "b"), tmp_path)
        return
    message = refused(lambda: add_gate(a, tmp_path / "b", "headwise"), tmp_path)
    assert f"{key}, so the model is gated already, and --gate headwise needs an ungated one" in message and str(a) in message
    if position != "G1":
        message = refused(lambda: remove_gate(a, tmp_path / "b"), tmp_path)
        assert f"{key}, and --gate none needs a gate at G1" in message and "only at G1" in message


def test_a_gate_to_be_added_is_at_g1(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")
    message = refused(lambda: add_gate(a, tmp_path / "b", "G2"), tmp_path)
    assert message.startswith("--gate (G2) must be elementwise or headwise, which add a sigmoid gate at G1, or none")


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        (GateConfig("G1", combine="add"), "gate.score is input, model.attention.gate.combine add"),
        (GateConfig("G1", score="parameter", combine="add"), "gate.score is parameter, model.attention.gate.combine add"),
        (GateConfig("G1", score="self", activation="silu"), "gate.score is self"),
        (GateConfig("G1", score="parameter", activation="identity"), "gate.activation is identity, and"),
        (GateConfig("G1", activation="silu"), "it is 0 at 0, unlike sigmoid and ns_sigmoid"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.score} {value.activation} {value.combine}",
)
def test_what_is_no_factor(tmp_path: Path, gate: GateConfig, told: str) -> None:
    a = trained(tmp_path / "a", gate=gate, mute=gate.score == "input")
    assert told in refused(lambda: remove_gate(a, tmp_path / "b"), tmp_path)


@pytest.mark.parametrize("largest", [1e-30, -3.0, float("nan")])
def test_a_gate_that_has_learnt_is_named(tmp_path: Path, largest: float) -> None:
    """One weight of the second layer."""
    engine = loaded(trained(tmp_path / "a", gate=GateConfig("G1"), mute=True))
    engine.masters[f"{LAYERS[1]}.gate.weight"].data[5, 3] = largest
    save(engine, tmp_path / "learnt", STEPS)
    message = refused(lambda: remove_gate(tmp_path / "learnt", tmp_path / "b"), tmp_path)
    assert f"the largest weight of master/{LAYERS[1]}.gate.weight is {abs(largest):.3g}, and" in message
    assert "(1 of 2 tensors are not)" in message


MASTER_O = f"master/{LAYERS[1]}.o.weight"
MASTER_GATE = f"master/{LAYERS[0]}.gate.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda state: state.pop(MASTER_O), f"1 of its tensors are not those of the model in its config: {MASTER_O} is missing"),
    "another shape": (lambda state: state.update({MASTER_O: torch.ones(32, 31)}), f"{MASTER_O} has the shape [32, 31], not [32, 32]"),
    "another dtype": (lambda state: state.update({MASTER_O: state[MASTER_O].bfloat16()}), f"{MASTER_O} is stored as torch.bfloat16"),
    "a gate": (lambda state: state.update({MASTER_GATE: torch.zeros(32, 32)}), f"{MASTER_GATE} [32, 32] is not in that model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_their_config(tmp_path: Path, case: str) -> None:
    change, told = WRONG[case]
    a = trained(tmp_path / "a")
    state = tensors(a)
    change(state)
    save_whole(tmp_path / "wrong", state, Checkpoint.open(a).metadata)
    assert told in refused(lambda: add_gate(tmp_path / "wrong", tmp_path / "b", "headwise"), tmp_path)


def test_a_gate_of_another_shape(tmp_path: Path) -> None:
    a = trained(tmp_path / "a", gate=GateConfig("G1"), mute=True)
    save_whole(tmp_path / "wrong", tensors(a) | {MASTER_GATE: torch.zeros(4, 32)}, Checkpoint.open(a).metadata)
    message = refused(lambda: remove_gate(tmp_path / "wrong", tmp_path / "b"), tmp_path)
    assert f"{MASTER_GATE} has the shape [4, 32], not [32, 32]" in message


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, "holds no config, so no run saved it"),
        ({"config": {"model": {"hiden_size": 8}}}, "is of another version: model.hiden_size is not"),
    ],
)
def test_a_checkpoint_without_a_config_of_ours(tmp_path: Path, metadata: dict[str, object], told: str) -> None:
    save_whole(tmp_path / "a", {"master/w": torch.ones(2)}, metadata)
    assert told in refused(lambda: add_gate(tmp_path / "a", tmp_path / "b", "headwise"), tmp_path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "step-00000003.tmp").mkdir()
    for name, told in {
        "nowhere": "does not exist",
        "empty": "holds no complete checkpoint",
        "file": "is no folder",
        "step-00000003.tmp": "holds no complete checkpoint",
    }.items():
        assert f"{name} {told}" in refused(lambda name=name: add_gate(tmp_path / name, tmp_path / "b", "headwise"), tmp_path)


def test_an_output_that_is_in_use_or_inside(tmp_path: Path) -> None:
    root = trained(tmp_path / "run" / "checkpoints")
    step = root / f"step-{STEPS:08d}"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    new = "must be a new or an empty folder, and it exists"
    for source, output, told in (
        (tmp_path / "run", tmp_path / "full", new),
        (tmp_path / "run", tmp_path / "file", new),
        (tmp_path / "run", tmp_path / "run", new),
        (tmp_path / "run", root, new),
        (tmp_path / "run", tmp_path / "run" / "gated", f"must not lie in the run that is read ({tmp_path / 'run'})"),
        (tmp_path / "run", tmp_path / "link" / "gated", "must not lie in the run"),
        (step, tmp_path / "run" / "gated", "must not lie in the run"),
        (root, root / "gated", "must not lie in the run"),
        (step, step / "gated", "must not lie in the run"),
        (tmp_path / "run", tmp_path / "b" / "step-00000009", "step-* names one of them"),
    ):
        message = refused(lambda source=source, output=output: add_gate(source, output, "headwise"), tmp_path)
        assert message.startswith(f"--output ({output}) ") and told in message
    (tmp_path / "made").mkdir()
    assert add_gate(root, tmp_path / "made", "headwise").folder.parent == tmp_path / "made"


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"--output \(.*/file/b\) cannot be written, or .* not be read \(Not a directory\)"):
        add_gate(a, tmp_path / "file" / "b", "headwise")


def test_a_damaged_master_is_found_and_a_damaged_moment_is_not_needed(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")
    folder = store.resolve(a)
    for name, harmful in (("exp_avg/embedding.weight", False), ("master/embedding.weight", True)):
        (piece,) = Checkpoint.open(a).stored(name).pieces
        begin, _ = PieceFile(folder / piece.file).span(name, piece.box, torch.float32)
        content = bytearray((folder / piece.file).read_bytes())
        content[begin] ^= 1
        (folder / piece.file).write_bytes(content)
        if harmful:
            assert "master/embedding.weight, piece at [0, 0]" in refused(lambda: add_gate(a, tmp_path / "c", "headwise"), tmp_path)
        else:
            add_gate(a, tmp_path / "b", "headwise")


# ---- it is whole, or it is not there


def test_without_space_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, write = trained(tmp_path / "a"), os.write
    before, left = contents(tmp_path), 0

    def until_full(descriptor: int, data: memoryview) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", until_full)
    writes = 0
    while True:
        left = writes
        try:
            add_gate(a, tmp_path / "b", "headwise")
        except RunError as error:
            assert "no space" in str(error)
            assert contents(tmp_path) == before, f"after {writes} writes"
            writes += 1
        else:
            break
    assert writes > 20, "it must fail at many places"
    assert masters(tmp_path / "b")


def test_killed_at_any_operation_on_files_it_leaves_nothing_or_all(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")
    untouched, expected = contents(a), {}
    found = []
    for operation in range(0, 1000, 3):
        root = tmp_path / f"b{operation}"
        pid = os.fork()
        if not pid:
            try:
                crash_writer.die_before(operation, root)
                add_gate(a, root, "elementwise")
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        try:
            tensors_there = tensors(root)
        except MegagateError:
            found.append(False)
        else:
            found.append(True)
            expected = expected or tensors_there
            assert_same(tensors_there, expected)
            assert parse(["--config", str(root / "config.yaml")], prog="test").model.attention.gate.position == "G1"
        if not os.WIFSIGNALED(status):
            break
    assert found == sorted(found) and found.count(False) > 10 and found[-1]
    assert contents(a) == untouched


def test_no_more_than_a_tensor_is_held(tmp_path: Path) -> None:
    """Memory of the process's own while 8 projections of 8 MB pass, and as many other tensors; malloc is told to keep nothing."""
    attention = AttentionConfig(num_heads=32, num_kv_heads=1, head_dim=128)
    model = ModelConfig(vocab_size=128, hidden_size=512, num_layers=8, ffn_size=16, attention=attention)
    state = {f"master/{name}": torch.ones(()).expand(shape) for name, shape in parameter_shapes(model).items()}
    save_whole(tmp_path / "a", state, {"config": to_dict(RunConfig(model=model))})
    assert 8e6 < in_fresh_process(growth_of_one, tmp_path) < 32e6, "one projection, what scales it, and what is on its way to the disk"


def growth_of_one(folder: str) -> int:
    """While it adds a gate."""
    add_gate(Path(folder) / "a", Path(folder) / "warm", "headwise")
    return growth(lambda: add_gate(Path(folder) / "a", Path(folder) / "b", "elementwise"))
