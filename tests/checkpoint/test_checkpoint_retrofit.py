"""A gate added to a trained model, or a constant one removed, leaves its logits as they are, bit for bit; what does not fit is refused."""

import errno
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import crash_writer
import pytest
import torch
from checkpoint_helpers import Layouts, contents, save_layout
from parity.engines import MOE, TIED_DENSE, Layout, Run, batch, run_config, train
from parity.sharded import BACKEND, CPU, clear_routes, fill
from parity.sharded import random as random_tensor
from torch import Tensor
from torch.nn import functional as F

from megagate.backend.native import NativeBackend
from megagate.checkpoint import store
from megagate.checkpoint.rankfile import PieceFile
from megagate.checkpoint.retrofit import Retrofit, add_gate, remove_gate
from megagate.checkpoint.store import Checkpoint
from megagate.config.cli import parse
from megagate.config.count import parameter_shapes
from megagate.config.keys import differences, from_dict, to_dict
from megagate.config.model import GateActivation, GateConfig, GateGranularity, GatePosition, ModelConfig, SwitchConfig
from megagate.config.run import RunConfig
from megagate.engine.reference import ReferenceEngine
from megagate.errors import CheckpointError, ConfigError, MegagateError, RunError
from megagate.model.lm import LanguageModel
from megagate.nn.gate import ACTIVATIONS, AttentionGate
from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.train.folder import require_same_model
from megagate.train.saver import Saver

ALONE = ParallelMesh.single()
STEPS = 3
KINDS = {"dense": TIED_DENSE, "moe": MOE}
GRANULARITIES = get_args(GateGranularity)
LAYERS = [f"layers.{layer}.attention" for layer in range(MOE.num_layers)]
TOKENS = batch(7, ALONE)[0].flatten(0, 1)


class Separate(NativeBackend):
    """One GEMM per weight, so that a gate's rows change no other product."""

    def column_linears(self, x: Tensor, weights: list[Tensor], tp: Axis) -> list[Tensor]:
        x = enter(x, tp, dim=1)
        return [F.linear(x, weight) for weight in weights]


SEPARATE = Separate(CPU)


def gated(model: ModelConfig, gate: GateConfig) -> ModelConfig:
    return replace(model, attention=replace(model.attention, gate=gate))


def engine_of(config: RunConfig, backend: NativeBackend = BACKEND) -> ReferenceEngine:
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    return ReferenceEngine(fill(LanguageModel(config.model, dtype=dtype, backend=backend, mesh=ALONE)), config, ALONE)


def save(engine: ReferenceEngine, root: Path, step: int) -> Path:
    Saver(root, config=engine.config, mesh=ALONE, data="the order").save(engine, step=step, best_val_loss=1.5)
    return root


def trained(root: Path, kind: str = "dense", *, dtype: str = "fp32", gate: GateConfig | None = None, mute: bool = False) -> Path:
    """A checkpoint after some steps, so that no weight has its initial value; `mute` sets an input-dependent gate back to zeros."""
    base = run_config(Run(optimizer="adamw", dtype=dtype), Layout())
    engine = engine_of(replace(base, model=gated(KINDS[kind], gate or GateConfig())))
    train(engine, range(STEPS), lr=1e-2)
    for name, master in engine.masters.items():
        if mute and "attention.gate" in name:
            master.data.zero_()
    return save(engine, root, STEPS)


def loaded(path: Path, backend: NativeBackend = BACKEND) -> ReferenceEngine:
    """The engine of a checkpoint's own config with its state."""
    with Checkpoint.open(path) as checkpoint:
        engine = engine_of(from_dict(checkpoint.metadata["config"]), backend)
        engine.load_state(checkpoint, applied_steps=checkpoint.metadata["applied_steps"])
    return engine


def tensors(path: Path) -> dict[str, Tensor]:
    """All logical tensors."""
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.verify()
        return {name: checkpoint.read_whole(name) for name in checkpoint.tensors}


def masters(path: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(path).items() if name.startswith("master/")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ---- a gate is added


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_equal_bit_for_bit(tmp_path: Path, kind: str, dtype: str, granularity: GateGranularity) -> None:
    a = trained(tmp_path / "a", kind, dtype=dtype)
    done = add_gate(a, tmp_path / "b", granularity)
    before, after = loaded(a, SEPARATE).model, loaded(tmp_path / "b", SEPARATE).model
    gates = [module for module in after.modules() if isinstance(module, AttentionGate)]
    assert len(gates) == MOE.num_layers and all(gate.config.granularity == granularity for gate in gates)
    assert torch.equal(after.logits(TOKENS), before.logits(TOKENS))
    untrained = engine_of(from_dict(Checkpoint.open(a).metadata["config"]), SEPARATE).model
    assert not torch.equal(untrained.logits(TOKENS), before.logits(TOKENS)), "the weights must not be initial"
    assert (done.factors, done.rounding, done.powers_of_two) == ((2.0, 2.0), 0.0, True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("kind", "dtype"), [("dense", "fp32"), ("dense", "bf16"), ("moe", "fp32")])
def test_in_one_gemm_logits_are_equal_to_one_unit_of_the_largest(
    tmp_path: Path, kind: str, dtype: str, granularity: GateGranularity
) -> None:
    """Its kernel may be another one with the gate's rows. (On the CPUs seen so far it was not: the difference was 0.)"""
    a = trained(tmp_path / "a", kind, dtype=dtype)
    add_gate(a, tmp_path / "b", granularity)
    model = loaded(a).model
    with clear_routes(model):
        before = model.logits(TOKENS)
    after = loaded(tmp_path / "b").model.logits(TOKENS)
    unit = torch.finfo(torch.bfloat16).eps * 2 ** before.abs().max().log2().floor()  # in fp32 it is large, but a wrong factor is larger
    assert (after - before).abs().max() <= unit


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written(tmp_path: Path, kind: str, granularity: GateGranularity) -> None:
    a, b = trained(tmp_path / "a", kind), tmp_path / "b"
    untouched = contents(a)
    done = add_gate(a, b, granularity)
    assert contents(a) == untouched
    rows = MOE.attention.num_heads * (MOE.attention.head_dim if granularity == "elementwise" else 1)
    expected = masters(a)
    for layer in LAYERS:
        expected[f"master/{layer}.o.weight"] = 2 * expected[f"master/{layer}.o.weight"]
        expected[f"master/{layer}.gate.weight"] = torch.zeros(rows, MOE.hidden_size)
    assert_same(tensors(b), expected)  # and no moments
    assert any(name.startswith("exp_avg_sq/") for name in tensors(a))

    old, new = Checkpoint.open(a), Checkpoint.open(b)
    assert (new.folder, new.step, store.read_pointer(b, "latest")) == (done.folder, STEPS, STEPS)
    before, config = from_dict(old.metadata["config"]), from_dict(new.metadata["config"])
    assert [key for key, *_ in differences(before, config) if not key.startswith("model.attention.gate.")] == []
    assert config.model.attention.gate == GateConfig("G1", granularity)
    kept = {key: value for key, value in old.metadata.items() if key not in ("config", "applied_steps")}
    assert new.metadata["applied_steps"] == 0 and kept.items() <= new.metadata.items() and kept["data"]["order"] == "the order"
    assert parse(["--config", str(b / "config.yaml")], prog="test") == config == done.config
    require_same_model(new, replace(before, model=gated(before.model, GateConfig("G1", granularity))))
    with pytest.raises(CheckpointError, match="holds another model"):
        require_same_model(new, before)


def test_the_optimizer_begins_anew_and_the_gate_learns(tmp_path: Path) -> None:
    add_gate(trained(tmp_path / "a", "moe"), tmp_path / "b", "elementwise")
    resumed, fresh = loaded(tmp_path / "b"), loaded(tmp_path / "b")
    fresh = ReferenceEngine(fresh.model, fresh.config, ALONE)  # only its weights
    train(resumed, [STEPS], lr=1e-2)
    train(fresh, [STEPS], lr=1e-2)
    weights = dict(resumed.model.named_parameters())
    assert_same(weights, dict(fresh.model.named_parameters()))
    assert all((weights[f"{layer}.gate.weight"] != 0).any(1).all() for layer in LAYERS), "every score learns"
    assert resumed.applied_steps == 1
    save(resumed, tmp_path / "c", STEPS + 1)
    assert tensors(tmp_path / "c").keys() > {f"exp_avg/{layer}.gate.weight" for layer in LAYERS}


def test_any_layout_and_other_states_pass_through(tmp_path: Path) -> None:
    """Ragged pieces of several ranks; tensors that are neither masters nor moments, of any dtype."""
    a = trained(tmp_path / "a", "moe")
    others = {
        "state/layers.0.moe.router.bias": torch.arange(-4, 4, dtype=torch.int32),
        "state/layers.1.moe.router.weight": torch.arange(8, dtype=torch.int64),  # a state with a parameter's name
        "rng/rank": torch.arange(50, dtype=torch.uint8),
    }
    state, metadata = tensors(a) | others, Checkpoint.open(a).metadata
    layout = Layouts.draw({name: tuple(tensor.shape) for name, tensor in state.items()}, 5, random.Random(1))
    add_gate(a, tmp_path / "b", "headwise")
    expected = tensors(tmp_path / "b") | others
    save_layout(tmp_path / "ragged", STEPS, state, layout, metadata)
    add_gate(tmp_path / "ragged", tmp_path / "c", "headwise")
    assert_same(tensors(tmp_path / "c"), expected)
    nothing = {"rng/empty": torch.zeros(0, 3)}
    save_whole(tmp_path / "whole", state | nothing, metadata)
    add_gate(tmp_path / "whole", tmp_path / "d", "headwise")
    assert_same(tensors(tmp_path / "d"), expected | nothing)


VARIANTS = {
    "switch heads": replace(MOE, attention=replace(MOE.attention, switch=SwitchConfig("kv", 4, 2))),
    "sandwich norms, clipped": replace(TIED_DENSE, sandwich_norm=True, residual_clip=100.0),
    "all of a mixture": replace(
        MOE, ffn_size=48, moe=replace(MOE.moe, first_dense_layers=1, shared_ffn_size=16, shared_gate=True, score="sigmoid")
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_only_the_output_projections_change_in_any_model(tmp_path: Path, case: str) -> None:
    model = gated(VARIANTS[case], GateConfig())
    state = {f"master/{name}": random_tensor(name, *shape) for name, shape in parameter_shapes(model).items()}
    save_whole(tmp_path / "a", state, {"config": to_dict(RunConfig(model=model)), "applied_steps": 9})
    add_gate(tmp_path / "a", tmp_path / "b", "headwise")
    expected = {name: 2 * tensor if name.endswith("attention.o.weight") else tensor for name, tensor in state.items()}
    gates = {f"master/{layer}.gate.weight": torch.zeros(MOE.attention.num_heads, MOE.hidden_size) for layer in LAYERS}
    assert_same(tensors(tmp_path / "b"), expected | gates)
    remove_gate(tmp_path / "b", tmp_path / "c")
    assert_same(tensors(tmp_path / "c"), state)


def test_a_run_its_checkpoints_and_a_step_are_the_same(tmp_path: Path) -> None:
    root = trained(tmp_path / "run" / "checkpoints")
    for index, path in enumerate((tmp_path / "run", root, root / f"step-{STEPS:08d}")):
        done = add_gate(path, tmp_path / f"b{index}", "headwise")
        assert done.source == root / f"step-{STEPS:08d}"
    assert contents(tmp_path / "b0") == contents(tmp_path / "b1") == contents(tmp_path / "b2")


# ---- a constant gate is removed


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("kind", "dtype"), [("dense", "fp32"), ("moe", "bf16")])
def test_there_and_back_is_the_same_model(tmp_path: Path, kind: str, dtype: str, granularity: GateGranularity) -> None:
    a = trained(tmp_path / "a", kind, dtype=dtype)
    add_gate(a, tmp_path / "b", granularity)
    done = remove_gate(tmp_path / "b", tmp_path / "c")
    assert_same(tensors(tmp_path / "c"), masters(a))
    assert (done.factors, done.rounding, done.powers_of_two) == ((0.5, 0.5), 0.0, True)
    assert Checkpoint.open(tmp_path / "c").metadata["config"] == Checkpoint.open(a).metadata["config"]
    assert torch.equal(loaded(tmp_path / "c").model.logits(TOKENS), loaded(a).model.logits(TOKENS))


CONSTANT = {
    "half": (GateConfig("G1", score="constant", constant=0.5), True),
    "two, whatever the activation": (GateConfig("G1", score="constant", constant=2.0, activation="silu"), True),
    "a third": (GateConfig("G1", score="constant", constant=1 / 3), False),
    "sigmoid of zeros": (GateConfig("G1"), True),
    "their mean over heads": (GateConfig("G1", head_shared=True), True),
    "ns_sigmoid of zeros": (GateConfig("G1", "headwise", activation="ns_sigmoid"), False),
    "a parameter per channel": (GateConfig("G1", score="parameter"), False),
    "a parameter per head": (GateConfig("G1", "headwise", score="parameter", activation="ns_sigmoid"), False),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_every_constant_gate_is_folded(tmp_path: Path, case: str) -> None:
    gate, exact = CONSTANT[case]
    a = trained(tmp_path / "a", gate=gate, mute=gate.score == "input")
    done = remove_gate(a, tmp_path / "b")
    before, after = (loaded(path, SEPARATE).model.logits(TOKENS) for path in (a, tmp_path / "b"))
    assert not any("attention.gate" in name for name in tensors(tmp_path / "b"))
    assert done.powers_of_two == exact
    if exact:
        assert torch.equal(after, before) and done.rounding == 0
    else:
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        assert 0 < done.rounding <= 2**-24, "half a unit in the last place of fp32"
        assert not torch.equal(after, before), "the words about rounding would be idle"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_parameter_s_factors_are_of_its_channels_or_heads(tmp_path: Path, granularity: GateGranularity) -> None:
    a = trained(tmp_path / "a", gate=GateConfig("G1", granularity, score="parameter"))
    done = remove_gate(a, tmp_path / "b")
    found, given = masters(tmp_path / "b"), masters(a)
    lowest = []
    for layer in LAYERS:
        scores = given[f"master/{layer}.gate.weight"].sigmoid()
        whole = given[f"master/{layer}.o.weight"].unflatten(1, (MOE.attention.num_heads, MOE.attention.head_dim))
        assert torch.equal(found[f"master/{layer}.o.weight"], (whole * scores).flatten(1))
        assert scores.unique().numel() == scores.numel(), "columns must be told apart"
        lowest.append(scores.min().item())
    assert done.factors[0] == min(lowest) < done.factors[1]


@pytest.mark.parametrize("activation", get_args(GateActivation))
def test_each_activation_of_zeros_is_a_factor_or_refused(tmp_path: Path, activation: GateActivation) -> None:
    at_zero = ACTIVATIONS[activation](torch.zeros(1)).item()
    score = "self" if activation == "rmsnorm" else "input"
    a = trained(tmp_path / "a", gate=GateConfig("G1", activation=activation, score=score), mute=True)
    if at_zero:
        assert remove_gate(a, tmp_path / "b").factors == (at_zero, at_zero) == ({"sigmoid": 0.5, "ns_sigmoid": 0.75}[activation],) * 2
    else:
        assert "keep the gate" in refused(lambda: remove_gate(a, tmp_path / "b"), tmp_path)


# ---- refused, with nothing written


def refused(change: Callable[[], Retrofit], folder: Path) -> str:
    """The message; no file in `folder` is made or changed."""
    before = contents(folder)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        change()
    assert contents(folder) == before
    return str(caught.value)


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
    message = refused(lambda: add_gate(trained(tmp_path / "a"), tmp_path / "b", "G2"), tmp_path / "b")
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


def save_whole(root: Path, state: dict[str, Tensor], metadata: dict[str, object]) -> None:
    pieces = [store.Piece(name, tensor.shape, (0,) * tensor.dim(), tensor) for name, tensor in state.items()]
    store.write_rank(store.begin(root, STEPS), 0, pieces)
    store.publish(root, STEPS, world_size=1, metadata=metadata)


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
        (tmp_path / "run", tmp_path / "run" / "gated", f"must not lie in the checkpoint that is read ({tmp_path / 'run'})"),
        (tmp_path / "run", tmp_path / "link" / "gated", "must not lie in the checkpoint"),
        (root, root / "gated", "must not lie in the checkpoint"),
        (step, step / "gated", "must not lie in the checkpoint"),
        (tmp_path / "run", tmp_path / "b" / "step-00000009", "step-* names one of them"),
    ):
        message = refused(lambda source=source, output=output: add_gate(source, output, "headwise"), tmp_path)
        assert message.startswith(f"--output ({output}) ") and told in message
    (tmp_path / "made").mkdir()
    assert add_gate(root, tmp_path / "made", "headwise").folder.parent == tmp_path / "made"


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"--output \(.*/file/b\) cannot be written \(Not a directory\); choose another folder"):
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
