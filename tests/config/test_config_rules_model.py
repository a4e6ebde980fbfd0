"""The rules between the values of a model's variants: gates, switch heads, and mixtures with dense layers and shared experts."""

from pathlib import Path
from typing import Any

import pytest

from megagate.config.cli import parse
from megagate.config.keys import flatten, from_dict
from megagate.config.rules import check
from megagate.errors import ConfigError

NANO = Path(__file__).parents[2] / "examples" / "configs" / "nano.yaml"
MOE = flatten(parse(["--config", str(NANO), "--model.attention.gate.position", "none"], prog="megagate"))
DENSE = {**MOE, "model.moe.num_experts": 0, "model.ffn_size": 96}


def violations(settings: dict[str, Any], *, world_size: int = 1, base: dict[str, Any] = MOE) -> list[str]:
    """The lines of the refusal of `base` with `settings` in place; empty where it is fine."""
    try:
        check(from_dict({**base, **settings}), world_size=world_size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


GATE, SWITCH, QK_NORM = "model.attention.gate", "model.attention.switch", "model.attention.qk_norm"


def gate(position: str, **values: Any) -> dict[str, Any]:
    return {f"{GATE}.{field}": value for field, value in {"position": position, **values}.items()}


def switch(projections: str, experts: int, top_k: int) -> dict[str, Any]:
    return {f"{SWITCH}.projections": projections, f"{SWITCH}.num_experts": experts, f"{SWITCH}.top_k": top_k}


SIGMOID = {"model.moe.score": "sigmoid", "model.moe.z_loss_coef": 0.0}
DIVIDED_OUT = f"with one factor per head learns nothing: {QK_NORM} (true) divides it out again, up to its sign; set"
OF_ITSELF = f"where {GATE}.score is self, an activation of the attention output without parameters"
TWO_GATES = "two gates on one position; set {switch}.projections or {gate}.position to none"
VARIANTS: list[tuple[dict[str, Any], str]] = [
    (
        gate("G1", head_shared=True, granularity="headwise"),
        f"{GATE}.head_shared (true) needs {GATE}.granularity elementwise, it is headwise: the mean over heads has no head left; "
        "set one of them",
    ),
    (
        gate("G1", head_shared=True, score="parameter"),
        f"{GATE}.head_shared (true) needs {GATE}.score input, it is parameter; set {GATE}.head_shared to false",
    ),
    (
        gate("G2", head_shared=True, score="constant"),
        f"{GATE}.head_shared (true) needs {GATE}.score input, it is constant; set {GATE}.head_shared to false",
    ),
    *(
        (
            gate("G5", **{field: value}),
            f"{GATE}.position (G5) is after the output projection, where there are no heads; set {GATE}.granularity to elementwise and "
            f"{GATE}.head_shared to false",
        )
        for field, value in (("granularity", "headwise"), ("head_shared", True))
    ),
    *(
        (
            gate(**{"position": "G1", "score": "self", "activation": "silu", field: value}),
            f"{GATE}.{field} ({value}) must be {allowed} {OF_ITSELF}; set {GATE}.{field}",
        )
        for field, value, allowed in (
            *(("position", position, "G1") for position in ("G2", "G3", "G4", "G5")),
            *(("activation", activation, "silu or rmsnorm") for activation in ("sigmoid", "identity", "ns_sigmoid")),
            ("combine", "add", "multiply"),
        )
    ),
    *(
        (
            gate("G1", score=score, activation=activation, granularity="headwise"),
            f"{GATE}.granularity (headwise) has no meaning where {GATE}.score is {score}; set it to elementwise",
        )
        for score, activation in (("self", "silu"), ("constant", "sigmoid"))
    ),
    *(
        (
            gate("G1", score="constant", activation=activation),
            f"{GATE}.activation ({activation}) has no meaning where {GATE}.score is constant, the factor itself; leave it out",
        )
        for activation in ("silu", "identity", "ns_sigmoid", "rmsnorm")
    ),
    *(
        (
            gate("G1", score=score, activation=activation, constant=0.3),
            f"{GATE}.constant (0.3) is read where {GATE}.score is constant, it is {score}; set {GATE}.score, or leave it out",
        )
        for score, activation in (("input", "sigmoid"), ("parameter", "sigmoid"), ("self", "silu"))
    ),
    *(
        (
            gate("G1", score="parameter", activation=activation),
            f"{GATE}.activation ({activation}) of a parameter that begins at 0 is 0, a factor that cuts off what it gates; set "
            f"{GATE}.activation to sigmoid or ns_sigmoid, or {GATE}.combine to add",
        )
        for activation in ("silu", "identity")
    ),
    *(
        (
            gate("G1", score=score, activation="rmsnorm"),
            f"{GATE}.activation (rmsnorm) is of the attention output itself; set {GATE}.score to self or choose another activation",
        )
        for score in ("input", "parameter")
    ),
    *(
        (gate(position, **values), f"{GATE}.position ({position}) {DIVIDED_OUT} {remedy} or qk_norm false")
        for position in ("G3", "G4")
        for values, remedy in (
            ({"granularity": "headwise"}, "granularity elementwise, combine add"),
            ({"granularity": "headwise", "score": "parameter"}, "granularity elementwise, combine add"),
            ({"score": "constant"}, "another position"),
        )
    ),
    (
        gate("G1", score="constant", combine="add"),
        f"{GATE}.score (constant) is a factor, but {GATE}.combine is add; set {GATE}.combine to multiply",
    ),
    *(
        (
            switch("none", experts, top_k),
            f"{SWITCH}.num_experts ({experts}) and {SWITCH}.top_k ({top_k}) are read where {SWITCH}.projections is v or kv; set "
            f"{SWITCH}.projections, or leave them out",
        )
        for experts, top_k in ((2, 1), (1, 2))
    ),
    (switch("v", 4, 5), f"{SWITCH}.top_k (5) must be at most {SWITCH}.num_experts (4); lower {SWITCH}.top_k"),
    *(
        (
            {**gate(position), **switch(projections, 4, 2)},
            f"{SWITCH}.projections ({projections}) gates what {GATE}.position ({position}) gates: "
            + TWO_GATES.format(switch=SWITCH, gate=GATE),
        )
        for position, projections in (("G2", "v"), ("G2", "kv"), ("G3", "kv"))
    ),
    *(
        (
            switch("kv", experts, 1),
            f"{SWITCH}.top_k (1) with {SWITCH}.projections kv gives each key one factor, which {QK_NORM} (true) divides out again, so that "
            f"its router learns nothing; set {SWITCH}.projections to v, or {SWITCH}.top_k to 2 or more",
        )
        for experts in (1, 2)
    ),
    *(
        (
            {"model.moe.first_dense_layers": layers, "model.ffn_size": 96},
            f"model.moe.first_dense_layers ({layers}) must be less than model.num_layers (2): a mixture has at least one; lower "
            "model.moe.first_dense_layers, or set model.moe.num_experts to 0 for a dense model",
        )
        for layers in (2, 3)
    ),
    (
        {"model.moe.score": "sigmoid"},
        "model.moe.z_loss_coef (0.01) must be 0 where model.moe.score is sigmoid: the square of logsumexp is least where every score is 0, "
        "and would draw all of them there; set model.moe.z_loss_coef to 0",
    ),
    (
        {"model.moe.shared_gate": True},
        "model.moe.shared_gate (true) needs a shared expert, but model.moe.shared_ffn_size is 0; set model.moe.shared_ffn_size or "
        "model.moe.shared_gate to false",
    ),
    (
        {"model.moe.first_dense_layers": 1},
        "model.ffn_size (0) must be at least 1 for the dense layers of a mixture (model.moe.first_dense_layers 1); give a base config "
        "first, e.g. --config examples/configs/tiny.yaml, or set model.ffn_size",
    ),
]


@pytest.mark.parametrize(("settings", "line"), VARIANTS)
def test_values_that_do_not_go_together(settings: dict[str, Any], line: str) -> None:
    assert violations(settings) == [line]


@pytest.mark.parametrize(
    "settings",
    [
        *(gate(position) for position in ("G1", "G2", "G3", "G4", "G5")),
        *(gate(position, score="parameter", combine="add") for position in ("G1", "G2", "G3", "G4", "G5")),
        *(gate(position, head_shared=True) for position in ("G1", "G2", "G3", "G4")),
        *(gate(position, granularity="headwise") for position in ("G1", "G2")),
        *(gate(position, granularity="headwise", combine="add") for position in ("G3", "G4")),
        *(gate(position, granularity="headwise") | {QK_NORM: False} for position in ("G3", "G4")),
        *(gate(position, score="constant", constant=0.3) for position in ("G1", "G2", "G5")),
        *(gate(position, score="constant") | {QK_NORM: False} for position in ("G3", "G4")),
        *(gate("G1", score="self", activation=activation) for activation in ("silu", "rmsnorm")),
        gate("none", head_shared=True, granularity="headwise", score="self", activation="rmsnorm", combine="add"),
        *(gate("G1", score="parameter", activation=activation, combine="add") for activation in ("silu", "identity")),
        gate("G1", score="parameter", activation="ns_sigmoid"),
        switch("v", 1, 1),
        switch("kv", 4, 4) | gate("G1"),
        switch("kv", 2, 2) | gate("G4"),
        switch("v", 4, 2) | gate("G3"),
        switch("kv", 1, 1) | {QK_NORM: False},
        {"model.moe.first_dense_layers": 1, "model.ffn_size": 95},
        {"model.moe.shared_gate": True, "model.moe.shared_ffn_size": 8},
        SIGMOID | {"model.moe.bias_update_rate": 1e-3, "model.moe.balance_scope": "sequence"},
        {"model.sandwich_norm": True, "model.residual_clip": 100.0},
    ],
)
def test_their_neighbours_go_together(settings: dict[str, Any]) -> None:
    assert violations(settings) == []


def test_keys_of_a_mixture_do_not_matter_to_a_dense_model() -> None:
    unused = {"model.moe.first_dense_layers": 5, "model.moe.shared_gate": True}
    assert violations(unused, base=DENSE) == []


def test_two_mistakes_are_two_lines() -> None:
    lines = violations(gate("G5", head_shared=True, granularity="headwise") | switch("v", 2, 3) | {"model.moe.shared_gate": True})
    assert [line.split()[0] for line in lines] == [f"{GATE}.head_shared", f"{GATE}.position", f"{SWITCH}.top_k", "model.moe.shared_gate"]


def test_dense_first_layers_are_cut_over_tp() -> None:
    mixed = {"model.moe.first_dense_layers": 1, "model.ffn_size": 95, "parallel.tp": 2}
    assert violations(mixed, world_size=2) == [
        "model.ffn_size (95) must be divisible by parallel.tp (2); lower parallel.tp or change ffn_size"
    ]
    assert violations({**mixed, "model.ffn_size": 96}, world_size=2) == []
    assert violations({**mixed, "model.moe.first_dense_layers": 0}, world_size=2) == [], "no layer has this width"
    shared = {**mixed, "model.moe.shared_ffn_size": 33}
    assert [line.split()[0] for line in violations(shared, world_size=2)] == ["model.moe.shared_ffn_size", "model.ffn_size"]


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("model.attention.switch.num_experts", 1),
        ("model.attention.switch.top_k", 1),
        ("model.moe.first_dense_layers", 0),
        ("model.moe.bias_update_rate", 0.0),
        ("model.residual_clip", 0.0),
    ],
)
def test_the_least_value_of_the_new_numbers(key: str, least: float) -> None:
    base = {**MOE, **switch("v", 1, 1)}
    assert violations({key: least}, base=base) == []
    line = violations({key: least - 1}, base=base)[0]
    assert line == f"{key} ({least - 1}) must be at least {least:g}; raise {key}"


def test_a_constant_is_positive() -> None:
    for value in (0.0, -0.5):
        lines = violations(gate("G1", score="constant", constant=value))
        assert lines == [f"{GATE}.constant ({value}) must be more than 0; raise {GATE}.constant"]
