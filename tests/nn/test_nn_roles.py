"""What each weight that rides with q, k and v is for: it decides what may be in FP8, and no output shows it in high precision."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from parity.sharded import CPU

from megagate.backend.base import ColumnLinears, Part
from megagate.backend.native import NativeBackend
from megagate.config.model import AttentionConfig, GateConfig, GateGranularity, GatePosition, ModelConfig, SwitchConfig
from megagate.config.precision_rules import fp8_heads
from megagate.config.run import Fp8Config, ParallelConfig, PrecisionConfig, RunConfig
from megagate.nn.attention import GatedAttention
from megagate.parallel.mesh import Axis

HEADS, KV_HEADS, WIDTH = 4, 2, 8
QKV = {"q": "projection", "k": "projection", "v": "projection"}
RIDING = ("G1", "G2", "G3", "G4")
GATES = tuple(itertools.product(get_args(GatePosition), get_args(GateGranularity)))
SWITCHES = {
    "one": (SwitchConfig("v", 1, 1), {"v_router": "logits"}),
    "v": (SwitchConfig("v", 3, 2), {"v_router": "logits", "v1": "projection", "v2": "projection"}),
    "kv": (SwitchConfig("kv", 2, 2), {"k_router": "logits", "k1": "projection", "v_router": "logits", "v1": "projection"}),
}
"""With what rides on top of q, k and v."""


class Recorder(NativeBackend):
    """PyTorch's kernels, which remember what they were asked for."""

    parts: Sequence[Part] = ()

    def column_linears(self, width: int, parts: Sequence[Part], **how: Any) -> ColumnLinears:
        self.parts = parts
        return super().column_linears(width, parts, **how)


def parts_of(attention: AttentionConfig, *, tp: int = 1) -> Sequence[Part]:
    """Of one layer, held to what the rules of sizes count (`fp8_heads`)."""
    backend, model = Recorder(CPU), ModelConfig(100, 64, 2, 32, attention=attention)
    GatedAttention(model, dtype=torch.float32, backend=backend, tp=Axis("tp", tuple(range(tp)), 0, None))
    for keep, rounded in ((("gate",), {"projection"}), ((), {"projection", "gate"})):
        fp8 = Fp8Config("current", emulate=True, keep_high_precision=("embedding", "head", "router", *keep))
        config = RunConfig(model, parallel=ParallelConfig(tp=tp), precision=PrecisionConfig(fp8=fp8))
        assert sum(part.rows for part in backend.parts if part.role in rounded) == WIDTH * sum(fp8_heads(config).values())
    return backend.parts


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("position", "granularity"), GATES)
def test_roles_of_gates(position: Any, granularity: Any, tp: int) -> None:
    """Of an elementwise gate, whose rows are as many as a projection's, the user chooses; a headwise one is never in FP8."""
    gate = GateConfig(position=position, granularity=granularity)
    parts = parts_of(AttentionConfig(HEADS, KV_HEADS, WIDTH, gate=gate), tp=tp)
    role = "gate" if granularity == "elementwise" else "logits"
    assert {part.name: part.role for part in parts} == QKV | ({"gate": role} if position in RIDING else {})
    for score in ("parameter", "self"):
        others = parts_of(AttentionConfig(HEADS, KV_HEADS, WIDTH, gate=replace(gate, score=score)), tp=tp)
        assert {part.name: part.role for part in others} == QKV, "a gate without a product does not ride"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("gate", [GateConfig(), GateConfig(position="G1"), GateConfig(position="G4", granularity="headwise")])
@pytest.mark.parametrize(("switch", "riding"), SWITCHES.values(), ids=SWITCHES)
def test_roles_of_switch_heads(switch: SwitchConfig, riding: dict[str, str], gate: GateConfig, tp: int) -> None:
    """Rounding chooses no projection."""
    parts = parts_of(AttentionConfig(HEADS, KV_HEADS, WIDTH, gate=gate, switch=switch), tp=tp)
    role = {"none": {}, "G1": {"gate": "gate"}, "G4": {"gate": "logits"}}[gate.position]
    assert {part.name: part.role for part in parts} == QKV | riding | role
    kv = max(1, KV_HEADS // tp)
    rows = {part.name: part.rows for part in parts}
    assert {rows[name] for name in riding if name.endswith("router")} == {switch.num_experts * kv}
    assert {rows[name] for name in riding if not name.endswith("router")} <= {WIDTH * kv}
