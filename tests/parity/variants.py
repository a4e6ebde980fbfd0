"""One small model for every value that a variant of attention or router can take, from the config's own `Literal`s.

A value that is added to a `Literal` is a variant at once, and fails the tests until layer, engine and formulas know it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from megagate.config.model import (
    AttentionConfig,
    GateActivation,
    GateCombine,
    GateConfig,
    GateGranularity,
    GatePosition,
    GateScore,
    ModelConfig,
    MoEConfig,
    RouterScore,
    SwitchConfig,
    SwitchProjections,
)
from megagate.config.rules import check
from megagate.config.run import RunConfig, TrainConfig
from megagate.errors import ConfigError

MOE = ModelConfig(
    vocab_size=250,  # padded to 256
    hidden_size=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, gate=GateConfig("G1", "elementwise")),
    moe=MoEConfig(num_experts=8, top_k=3, ffn_size=16, shared_ffn_size=24, balance_coef=0.1, z_loss_coef=0.01),
)
DENSE = replace(MOE, moe=MoEConfig(), ffn_size=48)
GATES = {
    "position": GatePosition,
    "granularity": GateGranularity,
    "score": GateScore,
    "activation": GateActivation,
    "combine": GateCombine,
}
FURTHER_GATES = {
    "G1 head-shared": GateConfig("G1", head_shared=True),
    "G2 head-shared": GateConfig("G2", head_shared=True),
    "G2 headwise": GateConfig("G2", "headwise"),
    "G4 headwise add": GateConfig("G4", "headwise", combine="add"),
    "G3 parameter": GateConfig("G3", score="parameter"),
    "G5 parameter": GateConfig("G5", score="parameter"),
}


def with_gate(gate: GateConfig) -> ModelConfig:
    return replace(DENSE, attention=replace(DENSE.attention, gate=gate))


def with_switch(projections: SwitchProjections, num_experts: int, top_k: int) -> ModelConfig:
    switch = SwitchConfig(projections, num_experts, top_k)
    return replace(DENSE, attention=replace(DENSE.attention, gate=GateConfig("none"), switch=switch))


def with_moe(**changes: object) -> ModelConfig:
    return replace(MOE, moe=replace(MOE.moe, **changes))


def is_allowed(model: ModelConfig) -> bool:
    try:
        check(RunConfig(model=model, train=TrainConfig(seq_len=8)), world_size=1)
    except ConfigError:
        return False
    return True


def gate_with(field: str, value: str) -> GateConfig:
    """A gate with that value, and what else it needs to be allowed."""
    start = replace(GateConfig("G1"), **{field: value})
    changes = ((other, choice) for other, kind in GATES.items() if other not in (field, "position") for choice in get_args(kind))
    return next(gate for gate in (start, *(replace(start, **{other: choice}) for other, choice in changes)) if is_allowed(with_gate(gate)))


def _variants() -> Iterator[tuple[str, ModelConfig]]:
    for field, kind in GATES.items():
        for value in get_args(kind):
            yield f"gate {field} {value}", with_gate(gate_with(field, value))
    for name, gate in FURTHER_GATES.items():
        yield f"gate {name}", with_gate(gate)
    for projections in get_args(SwitchProjections):
        if projections != "none":
            yield f"switch {projections} 2 of 2", with_switch(projections, 2, 2)
    yield "switch v 2 of 3", with_switch("v", 3, 2)
    yield "switch v 1 of 1", with_switch("v", 1, 1)
    yield "sandwich norm", replace(DENSE, sandwich_norm=True)
    yield "residual clip", replace(DENSE, residual_clip=0.02)
    yield "sandwich norm, mixture", replace(MOE, sandwich_norm=True)
    for score in get_args(RouterScore):
        z_loss = {"z_loss_coef": 0.01 if score == "softmax" else 0.0}
        yield f"router {score}", with_moe(score=score, **z_loss)
        yield f"router {score}, not renormalised", with_moe(score=score, renormalize=False, **z_loss)
        yield f"router {score} with bias", with_moe(score=score, bias_update_rate=0.02, **z_loss)
    yield "router with bias, balance of sequences", with_moe(bias_update_rate=0.02, balance_scope="sequence")
    yield "shared expert's gate", with_moe(shared_gate=True)
    yield "dense first layer", replace(with_moe(first_dense_layers=1), ffn_size=48)


def _each_once(variants: Iterator[tuple[str, ModelConfig]]) -> dict[str, ModelConfig]:
    names: dict[ModelConfig, str] = {}
    for name, model in variants:
        names.setdefault(model, name)
    return {name: model for model, name in names.items()}


VARIANTS = _each_once(_variants())
