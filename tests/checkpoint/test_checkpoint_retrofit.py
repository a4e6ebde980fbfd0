"""A gate added to a trained model, or a constant one removed, leaves its logits as they are, bit for bit; what does not fit is refused."""

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from checkpoint_helpers import Layouts, contents, save_layout
from parity.engines import MOE, TIED_DENSE, train
from parity.sharded import clear_routes
from parity.sharded import random as random_tensor
from retrofits import (
    ALONE,
    GRANULARITIES,
    KINDS,
    LAYERS,
    SEPARATE,
    STEPS,
    TOKENS,
    assert_same,
    engine_of,
    gated,
    loaded,
    masters,
    refused,
    save,
    save_whole,
    tensors,
    trained,
)

from megagate.checkpoint import store
from megagate.checkpoint.retrofit import add_gate, remove_gate
from megagate.checkpoint.store import Checkpoint
from megagate.config.cli import parse
from megagate.config.count import parameter_shapes
from megagate.config.keys import differences, from_dict, to_dict
from megagate.config.model import GateActivation, GateConfig, GateGranularity, SwitchConfig
from megagate.config.run import RunConfig
from megagate.engine.reference import ReferenceEngine
from megagate.errors import CheckpointError
from megagate.nn.gate import ACTIVATIONS, AttentionGate
from megagate.train.folder import require_same_model

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
    kept = {key: value for key, value in old.metadata.items() if key not in ("config", "applied_steps", "fingerprint")}
    assert "fingerprint" in old.metadata and "fingerprint" not in new.metadata, "its tensors are others"
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
    at_zero = 0.0 if activation == "rmsnorm" else ACTIVATIONS[activation](torch.zeros(1)).item()
    score = "self" if activation == "rmsnorm" else "input"
    a = trained(tmp_path / "a", gate=GateConfig("G1", activation=activation, score=score), mute=True)
    if at_zero:
        assert remove_gate(a, tmp_path / "b").factors == (at_zero, at_zero) == ({"sigmoid": 0.5, "ns_sigmoid": 0.75}[activation],) * 2
    else:
        assert "keep the gate" in refused(lambda: remove_gate(a, tmp_path / "b"), tmp_path)
