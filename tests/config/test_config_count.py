"""Parameter and FLOP counts against numbers worked out by hand and the paper's."""

import math
import typing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megagate.config.cli import parse
from megagate.config.count import (
    Part,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    narrowed_ffn_size,
    parameter_parts,
    parameter_shapes,
    parameters,
)
from megagate.config.model import AttentionConfig, GateConfig, GatePosition, ModelConfig, MoEConfig, SwitchConfig, SwitchProjections
from megagate.config.paper import preset

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

SMALL = ModelConfig(
    vocab_size=10,
    hidden_size=6,
    num_layers=2,
    ffn_size=5,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=2),
)
SMALL_MOE = replace(SMALL, moe=MoEConfig(num_experts=4, top_k=2, ffn_size=3))
SMALL_SHARED = replace(SMALL_MOE, moe=replace(SMALL_MOE.moe, shared_ffn_size=5))


def with_gate(model: ModelConfig, position: Any, **values: Any) -> ModelConfig:
    return replace(model, attention=replace(model.attention, gate=GateConfig(position, **values)))


def with_switch(model: ModelConfig, *values: Any) -> ModelConfig:
    return replace(model, attention=replace(model.attention, switch=SwitchConfig(*values)))


def example(*names: str, overrides: tuple[str, ...] = ()) -> ModelConfig:
    argv = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return parse([*argv, *overrides], prog="megagate").model


def parts_of(model: ModelConfig) -> dict[Part, int]:
    """The parts that the model has."""
    return {part: size for part, size in count_parameters(model).parts.items() if size}


def more_than(base: ModelConfig, model: ModelConfig) -> tuple[int, int, int]:
    """What `model` has beyond `base`: parameters in all, active ones, and those that work in matrix products."""
    count, other = count_parameters(model), count_parameters(base)
    work = Fraction(flops_per_token(model, 7) - flops_per_token(base, 7), 6)
    assert work.denominator == 1
    return count.total - other.total, count.active - other.active, int(work)


def test_dense_by_hand() -> None:
    count = count_parameters(SMALL)
    assert set(count.parts) == set(count.active_parts) == set(typing.get_args(Part)), "parts that it has not are 0"
    assert parts_of(SMALL) == {
        "embedding": 60,
        "attention": 2 * (48 + 24 + 24 + 48),
        "ffn": 2 * 3 * 30,
        "norms": 2 * (6 + 6 + 2 + 2) + 6,
        "head": 60,
    }
    assert count.active_parts == count.parts
    assert count.total == count.active == 60 + 60 + 288 + 180 + 38


def test_moe_by_hand() -> None:
    count = count_parameters(SMALL_MOE)
    assert parts_of(SMALL_MOE) == {
        "embedding": 60,
        "attention": 288,
        "router": 2 * 4 * 6,
        "experts": 2 * 4 * 3 * 18,
        "norms": 38,
        "head": 60,
    }
    assert count.active_parts == {**count.parts, "experts": 2 * 2 * 3 * 18}
    assert count.total == 60 + 60 + 288 + 38 + 48 + 432
    assert count.active == count.total - 216


def test_a_shared_expert_by_hand() -> None:
    """Every token passes it: all its parameters are active and work. So does its own gate, one row."""
    assert parts_of(SMALL_SHARED) == {**parts_of(SMALL_MOE), "shared_expert": 2 * 3 * 5 * 6}
    assert more_than(SMALL_MOE, SMALL_SHARED) == (180, 180, 180)
    own_gate = replace(SMALL_SHARED, moe=replace(SMALL_SHARED.moe, shared_gate=True))
    assert parts_of(own_gate) == {**parts_of(SMALL_SHARED), "shared_expert": 180 + 2 * 6}
    assert more_than(SMALL_SHARED, own_gate) == (12, 12, 12)
    added = set(parameter_shapes(own_gate)) - set(parameter_shapes(SMALL_SHARED))
    assert added == {"layers.0.moe.shared_gate.weight", "layers.1.moe.shared_gate.weight"}
    assert parameter_shapes(own_gate)["layers.1.moe.shared_gate.weight"] == (1, 6)


def test_dense_first_layers_by_hand() -> None:
    """Of three blocks one is dense: an FFN of width 5 instead of a router and four experts of width 3."""
    mixture = replace(SMALL_MOE, num_layers=3)
    mixed = replace(mixture, moe=replace(mixture.moe, first_dense_layers=1))
    assert parts_of(mixed) == {**parts_of(mixture), "router": 2 * 24, "experts": 2 * 216, "ffn": 90}
    assert more_than(mixture, mixed) == (90 - 24 - 216, 90 - 24 - 108, 90 - 24 - 108)
    parts = parameter_parts(mixed)
    assert [parts.get(f"layers.{layer}.ffn.up.weight") for layer in range(3)] == ["ffn", None, None]
    assert [parts.get(f"layers.{layer}.moe.router.weight") for layer in range(3)] == [None, "router", "router"]
    assert [mixed.num_moe_layers, mixture.num_moe_layers, SMALL.num_moe_layers] == [2, 3, 0]


def test_tied_head_and_norms_by_hand() -> None:
    tied = replace(SMALL, tie_embeddings=True)
    assert count_parameters(tied).total == count_parameters(SMALL).total - 60
    assert "head.weight" not in parameter_shapes(tied)
    plain = replace(SMALL, attention=replace(SMALL.attention, qk_norm=False))
    assert count_parameters(plain).parts["norms"] == 2 * 12 + 6
    sandwich = replace(SMALL, sandwich_norm=True)
    assert parts_of(sandwich) == {**parts_of(SMALL), "norms": 38 + 2 * 12}
    assert more_than(SMALL, sandwich) == (24, 24, 0)
    added = set(parameter_shapes(sandwich)) - set(parameter_shapes(SMALL))
    assert added == {f"layers.{layer}.{name}_out_norm.weight" for layer in range(2) for name in ("attention", "ffn")}
    assert more_than(SMALL, replace(SMALL, residual_clip=100.0)) == (0, 0, 0)


GATES: list[tuple[str, dict[str, Any], tuple[int, int] | None, bool]] = [
    # 4 query heads of 2 channels, 2 key/value heads, hidden size 6; its shape, and whether tokens are multiplied by it
    ("none", {"granularity": "headwise", "score": "parameter"}, None, False),
    ("G1", {}, (8, 6), True),
    ("G2", {}, (4, 6), True),
    ("G3", {}, (4, 6), True),
    ("G4", {}, (8, 6), True),
    ("G5", {}, (6, 6), True),
    ("G1", {"granularity": "headwise"}, (4, 6), True),
    ("G2", {"granularity": "headwise"}, (2, 6), True),
    ("G3", {"granularity": "headwise"}, (2, 6), True),
    ("G4", {"granularity": "headwise"}, (4, 6), True),
    ("G1", {"head_shared": True}, (8, 6), True),
    ("G2", {"head_shared": True}, (4, 6), True),
    ("G1", {"activation": "ns_sigmoid", "combine": "add"}, (8, 6), True),
    ("G1", {"score": "parameter"}, (4, 2), False),
    ("G2", {"score": "parameter"}, (2, 2), False),
    ("G4", {"score": "parameter", "granularity": "headwise"}, (4, 1), False),
    ("G5", {"score": "parameter"}, (1, 6), False),
    ("G1", {"score": "constant"}, None, False),
    ("G5", {"score": "constant"}, None, False),
    ("G1", {"score": "self", "activation": "rmsnorm"}, None, False),
]


def test_what_a_gate_or_a_switch_belongs_to() -> None:
    """Every position and every choice of projections has an answer."""
    of_kv_heads = {position: GateConfig(position).of_kv_heads for position in typing.get_args(GatePosition)}
    assert {position for position, answer in of_kv_heads.items() if answer} == {"G2", "G3"}
    switched = {projections: SwitchConfig(projections).switched for projections in typing.get_args(SwitchProjections)}
    assert switched == {"none": (), "v": ("v",), "kv": ("k", "v")}


@pytest.mark.parametrize(("position", "values", "shape", "multiplied"), GATES)
def test_gates_by_hand(position: str, values: dict[str, Any], shape: tuple[int, int] | None, multiplied: bool) -> None:
    model = with_gate(SMALL_MOE, position, **values)
    size = 2 * math.prod(shape) if shape else 0
    assert parts_of(model) == parts_of(SMALL_MOE) | ({"gate": size} if size else {})
    assert more_than(SMALL_MOE, model) == (size, size, size if multiplied else 0)
    shapes = parameter_shapes(model)
    assert [shapes.get(f"layers.{layer}.attention.gate.weight") for layer in range(2)] == [shape, shape]


SWITCHES: list[tuple[str, int, int, int, int]] = [
    # a projection: 4 x 6 = 24; a router: 2 heads x n experts x 6. What two layers have, and what a token uses, beyond one projection each
    ("none", 4, 2, 0, 0),
    ("v", 1, 1, 2 * 12, 2 * 12),
    ("v", 4, 4, 2 * (48 + 3 * 24), 2 * (48 + 3 * 24)),
    ("v", 8, 2, 2 * (96 + 7 * 24), 2 * (96 + 24)),
    ("v", 5, 1, 2 * (60 + 4 * 24), 2 * 60),
    ("kv", 4, 4, 2 * 2 * (48 + 3 * 24), 2 * 2 * (48 + 3 * 24)),
    ("kv", 7, 3, 2 * 2 * (84 + 6 * 24), 2 * 2 * (84 + 2 * 24)),
]


@pytest.mark.parametrize(("projections", "experts", "top_k", "total", "active"), SWITCHES)
def test_switch_heads_by_hand(projections: str, experts: int, top_k: int, total: int, active: int) -> None:
    model = with_switch(SMALL, projections, experts, top_k)
    assert parts_of(model) == parts_of(SMALL) | ({"switch": total} if total else {})
    assert more_than(SMALL, model) == (total, active, active), "projections that are not chosen are no work"
    shapes = parameter_shapes(model)
    for kind in ("k", "v"):
        routed = kind in projections.replace("none", "")
        prefix = f"layers.1.attention.{kind}_switch."
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        expected = {f"experts.{expert}.weight": (4, 6) for expert in range(experts - 1)} | {"router.weight": (2 * experts, 6)}
        assert own == (expected if routed else {})
        assert shapes[f"layers.1.attention.{kind}.weight"] == (4, 6), "the first expert has the name that it has without switch heads"


def test_one_expert_is_the_headwise_value_gate() -> None:
    """Table 6's last row."""
    switch, gate = with_switch(SMALL_MOE, "v", 1, 1), with_gate(SMALL_MOE, "G2", granularity="headwise")
    assert more_than(gate, switch) == (0, 0, 0)
    assert parameter_shapes(switch)["layers.0.attention.v_switch.router.weight"] == (2, 6)


def test_active_parts_are_whole_numbers() -> None:
    """Nothing is cut off, whatever n is; a head dimension of 1 makes sizes that few numbers divide."""
    narrow = replace(SMALL_MOE, hidden_size=5, attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=1))
    for experts in range(1, 9):
        for top_k in range(1, experts + 1):
            model = with_switch(narrow, "kv", experts, top_k)
            exact = sum(parameter.size * parameter.share for parameter in parameters(model, padded=False))
            assert count_parameters(model).active == exact
            assert more_than(narrow, model)[1] == 2 * 2 * (5 * experts + 5 * (top_k - 1))


def test_padding_counts_only_on_request() -> None:
    padded = count_parameters(SMALL_MOE, padded=True)
    assert padded.total - count_parameters(SMALL_MOE).total == 2 * (128 - 10) * 6
    assert padded.total == sum(math.prod(shape) for shape in parameter_shapes(SMALL_MOE).values())


def test_names_shapes_and_parts() -> None:
    model = with_gate(SMALL_SHARED, "G1", granularity="headwise")
    expected = {
        "embedding.weight": ((128, 6), "embedding"),
        **{
            f"layers.{layer}.{name}": shape_and_part
            for layer in range(2)
            for name, shape_and_part in {
                "attention_norm.weight": ((6,), "norms"),
                "attention.q.weight": ((8, 6), "attention"),
                "attention.k.weight": ((4, 6), "attention"),
                "attention.v.weight": ((4, 6), "attention"),
                "attention.o.weight": ((6, 8), "attention"),
                "attention.q_norm.weight": ((2,), "norms"),
                "attention.k_norm.weight": ((2,), "norms"),
                "attention.gate.weight": ((4, 6), "gate"),
                "ffn_norm.weight": ((6,), "norms"),
                "moe.router.weight": ((4, 6), "router"),
                "moe.experts.gate_up": ((4, 6, 6), "experts"),
                "moe.experts.down": ((4, 6, 3), "experts"),
                "moe.shared_expert.gate.weight": ((5, 6), "shared_expert"),
                "moe.shared_expert.up.weight": ((5, 6), "shared_expert"),
                "moe.shared_expert.down.weight": ((6, 5), "shared_expert"),
            }.items()
        },
        "final_norm.weight": ((6,), "norms"),
        "head.weight": ((128, 6), "head"),
    }
    assert parameter_shapes(model) == {name: shape for name, (shape, _) in expected.items()}
    assert parameter_parts(model) == {name: part for name, (_, part) in expected.items()}
    dense, parts = parameter_shapes(SMALL), parameter_parts(SMALL)
    assert dense["layers.1.ffn.gate.weight"] == dense["layers.1.ffn.up.weight"] == (5, 6)
    assert dense["layers.1.ffn.down.weight"] == (6, 5)
    assert {parts[f"layers.1.ffn.{name}.weight"] for name in ("gate", "up", "down")} == {"ffn"}


def test_flops_by_hand() -> None:
    matrices = 288 + 48 + 216 + 60
    scores_and_values = 2 * 7 * 4 * 2
    assert flops_per_token(SMALL_MOE, 7) == 6 * matrices + 6 * scores_and_values
    tied = replace(SMALL_MOE, tie_embeddings=True)
    assert flops_per_token(tied, 7) == flops_per_token(SMALL_MOE, 7), "a tied head is a matrix product all the same"


def test_cache_by_hand() -> None:
    """Keys and values of two layers and two heads of two channels; what is gated or routed is kept once."""
    assert kv_cache_bytes_per_token(SMALL) == 2 * 2 * 2 * 2 * 2
    assert kv_cache_bytes_per_token(SMALL, element_bytes=4) == 64
    assert kv_cache_bytes_per_token(with_switch(with_gate(SMALL, "G1"), "kv", 8, 8)) == 32
    assert kv_cache_bytes_per_token(preset("paper/table1/row01").config.model) == 2 * 24 * 4 * 128 * 2
    assert kv_cache_bytes_per_token(preset("paper/table1/row02").config.model) == 2 * 24 * 8 * 128 * 2


# ---- the FFN that a gate narrows


WIDE = replace(SMALL, ffn_size=512)


@pytest.mark.parametrize("model", [WIDE, with_gate(WIDE, "G1"), with_gate(WIDE, "G5"), with_switch(WIDE, "kv", 80, 2)])
def test_a_narrowed_ffn_is_the_nearest_multiple_of_16(model: ModelConfig) -> None:
    width = narrowed_ffn_size(model, WIDE)
    off = {
        other: abs(count_parameters(replace(model, ffn_size=other)).total - count_parameters(WIDE).total) for other in range(16, 1024, 16)
    }
    assert width == min(off, key=off.__getitem__)
    assert off[width] <= 3 * 6 * 2 * 16 / 2
    assert narrowed_ffn_size(replace(model, ffn_size=7), WIDE) == width, "the model's own width does not matter"


def test_a_model_keeps_its_own_width() -> None:
    assert narrowed_ffn_size(WIDE, WIDE) == 512
    assert narrowed_ffn_size(SMALL, replace(SMALL, ffn_size=16)) == 16, "the least"
    assert narrowed_ffn_size(with_switch(WIDE, "kv", 80, 2), WIDE) < 512, "the tests above are not all of this"


def test_what_cannot_be_narrowed() -> None:
    for model, baseline in ((SMALL_MOE, SMALL), (SMALL, SMALL_MOE)):
        with pytest.raises(ValueError, match="only dense models are narrowed: a mixture's gate is added to it"):
            narrowed_ffn_size(model, baseline)
    heavy = with_switch(SMALL, "kv", 8, 8)
    baseline = count_parameters(SMALL).total
    # The second is not too large, but five columns are nearer to none than to 16.
    for model, rest in ((heavy, count_parameters(heavy).total - 180), (SMALL, baseline - 180)):
        with pytest.raises(ValueError, match=f"feed-forward: without it the model has {rest} parameters, its baseline {baseline} with it"):
            narrowed_ffn_size(model, SMALL)


# ---- the paper's models


def test_the_papers_moe() -> None:
    baseline = count_parameters(example("moe_15a2b", "gate_none"))
    assert baseline.total / 1e9 == pytest.approx(15.577, abs=5e-4)
    elementwise = count_parameters(example("moe_15a2b", "gate_elementwise"))
    headwise = count_parameters(example("moe_15a2b", "gate_headwise"))
    assert (elementwise.total - baseline.total) / 1e6 == pytest.approx(201, abs=0.5)
    assert (headwise.total - baseline.total) / 1e6 == pytest.approx(1.6, abs=0.05)
    assert count_parameters(example("moe_15a2b")) == elementwise, "the headline gate is the preset's"


@pytest.mark.parametrize(("name", "narrow", "row"), [("dense_1p7b_28l", 5456, "row02"), ("dense_1p7b_48l", 3920, "row08")])
def test_the_papers_dense_models(name: str, narrow: int, row: str) -> None:
    """The comment in the example names the width of the gated model."""
    baseline = count_parameters(example(name))
    assert baseline.total / 1e9 == pytest.approx(1.7, abs=0.05)
    words = f"--model.ffn_size {narrow}, as in --preset paper/table2/{row}."
    assert words in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    gated = example(name, "gate_elementwise", overrides=("--model.ffn_size", str(narrow)))
    assert narrowed_ffn_size(example(name, "gate_elementwise"), example(name)) == narrow
    assert preset(f"paper/table2/{row}").config.model == gated
    assert abs(count_parameters(gated).total - baseline.total) <= 1e-3 * baseline.total
    per_column = 3 * gated.hidden_size * gated.num_layers
    assert abs(count_parameters(gated).total - baseline.total) <= per_column * 16 / 2
