"""Every variant of the gate that the rules allow: against its formula head by head in fp64, and under tp against the unsharded layer.

The variants come from the `Literal`s of `GateConfig`, so that a new value fails here until formula and layer know it.
"""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import ranks
import torch
from parity.sharded import BACKEND, CPU, assert_all_close, assert_close, difference, fill, full_gradients, full_weights, random, take
from torch import Tensor

from megagate.config.model import (
    AttentionConfig,
    GateActivation,
    GateCombine,
    GateConfig,
    GateGranularity,
    GatePosition,
    GateScore,
    ModelConfig,
)
from megagate.config.rules import check
from megagate.config.run import RunConfig, TrainConfig
from megagate.errors import ConfigError
from megagate.nn.attention import GatedAttention
from megagate.nn.rope import rope_table, rotate
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.spawn import RankContext

BATCH, SEQUENCE, HIDDEN, HEADS, KV_HEADS, WIDTH = 2, 8, 24, 4, 2, 8
TIGHT, EPS = 5e-6, 1e-3
BASE = ModelConfig(
    vocab_size=100,
    hidden_size=HIDDEN,
    num_layers=2,
    ffn_size=32,
    norm_eps=EPS,
    attention=AttentionConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH),
)
ACTIVATIONS = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 / (1 + torch.exp(-x)),
    "rmsnorm": lambda y: y / (y.square().mean(-1, keepdim=True) + EPS).sqrt(),
}


def model_of(gate: GateConfig, *, qk_norm: bool = True) -> ModelConfig:
    return replace(BASE, attention=replace(BASE.attention, gate=gate, qk_norm=qk_norm))


def allowed(gate: GateConfig, *, qk_norm: bool) -> bool:
    try:
        check(RunConfig(model=model_of(gate, qk_norm=qk_norm), train=TrainConfig(seq_len=SEQUENCE)), world_size=1)
    except ConfigError:
        return False
    return True


def variants(*, qk_norm: bool) -> list[GateConfig]:
    kinds = [get_args(kind) for kind in (GatePosition, GateGranularity, GateScore, GateActivation, GateCombine)]
    kinds.insert(2, (False, True))  # head_shared
    gates = itertools.starmap(GateConfig, itertools.product(*kinds))
    return [gate for gate in gates if gate.position != "none" and allowed(gate, qk_norm=qk_norm)]


def title(gate: GateConfig) -> str:
    words = (gate.position, gate.granularity, "shared" * gate.head_shared, gate.score, gate.activation, gate.combine)
    return " ".join(word for word in words if word)


def build(gate: GateConfig, tp: Axis, *, qk_norm: bool) -> GatedAttention:
    return fill(GatedAttention(model_of(gate, qk_norm=qk_norm), dtype=torch.float32, backend=BACKEND, tp=tp))


def rope() -> Tensor:
    return rope_table(SEQUENCE, WIDTH, base=100.0, device=CPU)


# ---- the formula


def score_of(gate: GateConfig, x: Tensor, weight: Tensor | None, head: int, heads: int, width: int) -> Tensor:
    """act(S) of one head."""

    def logits(one: int) -> Tensor:
        rows = width if gate.granularity == "elementwise" else 1
        return x @ weight[one * rows : (one + 1) * rows].T if gate.score == "input" else weight[one]

    act = ACTIVATIONS[gate.activation]
    if gate.head_shared:
        return sum(act(logits(one)) for one in range(heads)) / heads
    return act(logits(head))


def gated(gate: GateConfig, y: Tensor, x: Tensor, weight: Tensor | None, head: int, heads: int) -> Tensor:
    """Y' of one head; at G5 of the whole output, as if it were one head."""
    if gate.score == "constant":
        return gate.constant * y
    if gate.score == "self":
        return ACTIVATIONS[gate.activation](y)
    scores = score_of(gate, x, weight, head, heads, y.shape[-1])
    return y * scores if gate.combine == "multiply" else y + scores


def explicit(layer: GatedAttention, x: Tensor, *, qk_norm: bool) -> Tensor:
    """Equations 1 to 5 of arXiv 2505.06708, head by head."""
    weights = {name: p.detach().to(x.dtype) for name, p in layer.named_parameters()}
    gate, weight = layer.config.gate, weights.get("gate.weight")

    def project(name: str, head: int, position: str, heads: int) -> Tensor:
        y = x @ weights[f"{name}.weight"][head * WIDTH : (head + 1) * WIDTH].T
        return gated(gate, y, x, weight, head, heads) if gate.position == position else y

    outputs = []
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        q, k, v = project("q", head, "G4", HEADS), project("k", kv, "G3", KV_HEADS), project("v", kv, "G2", KV_HEADS)
        if qk_norm:
            q = q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["q_norm.weight"]
            k = k / (k.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["k_norm.weight"]
        q, k = (rotate(t.unsqueeze(2), rope().to(x.dtype)).squeeze(2) for t in (q, k))
        later = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(later, -torch.inf).softmax(-1)
        y = scores @ v
        outputs.append(gated(gate, y, x, weight, head, HEADS) if gate.position == "G1" else y)
    out = torch.cat(outputs, -1) @ weights["o.weight"].T
    return gated(gate, out, x, weight, 0, 1) if gate.position == "G5" else out


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_variant_is_its_formula(qk_norm):
    cotangent = random("cotangent", BATCH, SEQUENCE, HIDDEN)
    for gate in variants(qk_norm=qk_norm):
        layer, x = build(gate, ParallelMesh.single().tp, qk_norm=qk_norm), random("x", BATCH, SEQUENCE, HIDDEN).requires_grad_()
        out = layer(x, rope())
        (grad,) = torch.autograd.grad(out, x, cotangent)
        wide = x.detach().double().requires_grad_()
        expected = explicit(layer, wide, qk_norm=qk_norm)
        (expected_grad,) = torch.autograd.grad(expected, wide, cotangent.double())
        assert_close(out, expected, to=TIGHT, what=f"{title(gate)}: output")
        assert_close(grad, expected_grad, to=TIGHT, what=f"{title(gate)}: input gradient")


def test_every_value_is_in_some_variant_and_all_variants_differ():
    gates = variants(qk_norm=False)
    for name, kind in (("position", GatePosition), ("granularity", GateGranularity), ("score", GateScore), ("combine", GateCombine)):
        assert {getattr(gate, name) for gate in gates} >= set(get_args(kind)) - {"none"}
    assert {gate.activation for gate in gates} == set(get_args(GateActivation)) == set(ACTIVATIONS)
    x = random("x", BATCH, SEQUENCE, HIDDEN)
    outputs = {title(gate): build(gate, ParallelMesh.single().tp, qk_norm=False)(x, rope()) for gate in gates if gate.score != "constant"}
    for (one, out), (other, expected) in itertools.combinations(outputs.items(), 2):
        assert difference(out, expected) > 1e-3, f"{one} is {other}"


# ---- tensor parallelism


def under_tp(context: RankContext, qk_norm: bool) -> int:
    """All variants; 4 ranks are more than key/value heads. Returns how many."""
    mesh, alone = ParallelMesh.build(tp=context.world_size, ep=1), ParallelMesh.single()
    x, cotangent = random("x", BATCH, SEQUENCE, HIDDEN), random("cotangent", BATCH, SEQUENCE, HIDDEN)
    gates = variants(qk_norm=qk_norm)
    for gate in gates:
        whole, full_x = build(gate, alone.tp, qk_norm=qk_norm), x.clone().requires_grad_()
        out = whole(full_x, rope())
        out.backward(cotangent)
        layer, local_x = build(gate, mesh.tp, qk_norm=qk_norm), take(x, mesh.tp, 1).requires_grad_()
        local = layer(local_x, rope())
        local.backward(take(cotangent, mesh.tp, 1))
        assert_all_close(full_weights(layer, mesh), full_weights(whole, alone), to=0)
        assert_close(local, take(out, mesh.tp, 1), to=TIGHT, what=f"{title(gate)}: output")
        assert_close(local_x.grad, take(full_x.grad, mesh.tp, 1), to=TIGHT, what=f"{title(gate)}: input gradient")
        expected = full_gradients(whole, alone)
        for name, gradient in full_gradients(layer, mesh).items():
            assert_close(gradient, expected[name], to=TIGHT, what=f"{title(gate)}: gradient of {name}")
    return len(gates)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_variant_under_tp(world_size, qk_norm):
    assert set(ranks.run_ranks(under_tp, world_size, qk_norm, timeout=180)) == {len(variants(qk_norm=qk_norm))}


# ---- numerics


def test_what_is_gated_keeps_its_dtype_and_is_rounded_once():
    """Scores and the product are fp32."""
    for gate in variants(qk_norm=True):
        if gate.position != "G1" or gate.score != "input":
            continue
        layer = fill(GatedAttention(model_of(gate), dtype=torch.bfloat16, backend=BACKEND, tp=ParallelMesh.single().tp)).gate
        y = random("y", BATCH, SEQUENCE, HEADS, WIDTH).bfloat16()
        logits = 3 * random("logits", BATCH, SEQUENCE, HEADS * layer.width).bfloat16()
        out = layer(y, logits)
        shaped = logits.double().view(BATCH, SEQUENCE, HEADS, -1)
        act = ACTIVATIONS[gate.activation](shaped)
        act = act.mean(-2, keepdim=True) if gate.head_shared else act
        exact = (y.double() * act if gate.combine == "multiply" else y.double() + act).bfloat16()
        assert out.dtype == torch.bfloat16
        assert (out == exact).double().mean() > 0.99, title(gate)


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_gradients_of_the_gate_are_rounded_once(granularity):
    """bf16 in and out, fp32 between: all but ties are the exact gradient's nearest bf16."""
    layer = bf16_layer(GateConfig("G1", granularity)).gate
    y, cotangent = (random(name, BATCH, SEQUENCE, HEADS, WIDTH).bfloat16() for name in ("y", "cotangent"))
    logits = 3 * random("logits", BATCH, SEQUENCE, HEADS * layer.width).bfloat16()
    gradients = torch.autograd.grad(layer(*(inputs := [t.requires_grad_() for t in (y, logits)])), inputs, cotangent)
    wide_y, wide_logits = (t.detach().double().requires_grad_() for t in (y, logits))
    exact = wide_y * wide_logits.view(BATCH, SEQUENCE, HEADS, -1).sigmoid()
    for what, gradient, expected in zip(
        ("y", "logits"), gradients, torch.autograd.grad(exact, (wide_y, wide_logits), cotangent.double()), strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        assert (gradient == expected.bfloat16()).double().mean() > 0.99, what


def bf16_layer(gate: GateConfig) -> GatedAttention:
    return fill(GatedAttention(model_of(gate), dtype=torch.bfloat16, backend=BACKEND, tp=ParallelMesh.single().tp))


class Kept:
    """Storages that a forward pass keeps for its backward pass, parameters left out."""

    def __init__(self, parameters=()):
        self.known = {p.untyped_storage().data_ptr() for p in parameters}
        self.tensors: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.tensors[pointer] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


def kept_by(gate: GateConfig) -> int:
    layer, x = bf16_layer(gate), random("x", BATCH, SEQUENCE, HIDDEN).bfloat16()
    table = rope()
    with Kept([*layer.parameters(), x, table]) as kept:
        out = layer(x.requires_grad_(), table)
    assert out.requires_grad
    return kept.bytes


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_sigmoid_and_multiply_keep_one_tensor_more_the_logits(granularity):
    """No score, no fp32 copy: what is gated is kept without a gate too, by the output projection."""
    layer = bf16_layer(GateConfig("G1", granularity)).gate
    y = random("y", BATCH, SEQUENCE, HEADS, WIDTH).bfloat16().requires_grad_()
    logits = random("logits", BATCH, SEQUENCE, HEADS * layer.width).bfloat16().requires_grad_()
    with Kept() as kept:
        layer(y, logits)
    assert kept.tensors.keys() == {t.untyped_storage().data_ptr() for t in (y, logits)}


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_a_gated_layer_keeps_the_logits_and_the_product(granularity):
    """Beside the gate's part of the joined weight: the product is the output projection's input, y the gate's, in place of one for both."""
    layer = bf16_layer(GateConfig("G1", granularity))
    tokens, element = BATCH * SEQUENCE, 2
    logits, product = tokens * layer.gate.weight.shape[0] * element, tokens * HEADS * WIDTH * element
    assert kept_by(layer.gate.config) - kept_by(GateConfig()) == logits + product + layer.gate.weight.numel() * element


def test_the_parameter_begins_neutral():
    """An input-independent gate begins at sigmoid(0) = 1/2, whatever the seed."""
    from megagate.nn.init import initialize

    gate = GateConfig("G1", score="parameter")
    layer = GatedAttention(model_of(gate), dtype=torch.float32, backend=BACKEND, tp=ParallelMesh.single().tp)
    initialize(layer, seed=3, std=0.02, num_layers=2, device=CPU)
    assert not layer.gate.weight.any() and layer.gate.weight.shape == (HEADS, WIDTH)
    y = random("y", BATCH, SEQUENCE, HEADS, WIDTH)
    assert torch.equal(layer.gate(y), y / 2)
    assert torch.equal(layer.gate(y), build(GateConfig("G1", score="constant"), ParallelMesh.single().tp, qk_norm=True).gate(y))
