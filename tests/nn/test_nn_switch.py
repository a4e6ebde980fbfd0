"""Switch heads: against their formula head by head in fp64, against the gate that they contain, and under tp."""

from dataclasses import replace
from typing import get_args

import pytest
import ranks
import torch
from parity.sharded import BACKEND, CPU, assert_all_close, assert_close, fill, full_gradients, full_weights, random, take
from torch import Tensor

from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, SwitchConfig, SwitchProjections
from megagate.nn.attention import GatedAttention
from megagate.nn.rope import rope_table, rotate
from megagate.nn.routes import SMALLEST_GAP
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.routes import watched_routes

BATCH, SEQUENCE, HIDDEN, HEADS, KV_HEADS, WIDTH = 2, 8, 24, 4, 2, 8
TIGHT = 5e-6
SWITCHES = {
    "v 1 of 1": SwitchConfig("v", 1, 1),
    "v 2 of 2": SwitchConfig("v", 2, 2),
    "v 2 of 4": SwitchConfig("v", 4, 2),
    "kv 3 of 3": SwitchConfig("kv", 3, 3),
    "kv 2 of 3": SwitchConfig("kv", 3, 2),
}
SINGLE = ParallelMesh.single()


def attention_of(switch: SwitchConfig, gate: GateConfig = GateConfig(), *, tp: Axis = SINGLE.tp) -> GatedAttention:  # noqa: B008 (frozen)
    attention = AttentionConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH, switch=switch, gate=gate)
    model = ModelConfig(vocab_size=100, hidden_size=HIDDEN, num_layers=2, ffn_size=32, attention=attention)
    return fill(GatedAttention(model, dtype=torch.float32, backend=BACKEND, tp=tp))


def rope() -> Tensor:
    return rope_table(SEQUENCE, WIDTH, base=100.0, device=CPU)


def explicit_projection(x: Tensor, weights: dict[str, Tensor], kind: str, head: int, switch: SwitchConfig) -> Tensor:
    """One key/value head [b, s, d]: token by token the k projections with the largest scores, times the scores' sigmoids."""
    names = [f"{kind}.weight", *(f"{kind}_switch.experts.{e}.weight" for e in range(switch.num_experts - 1))]
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    if f"{kind}_switch.router.weight" not in weights:
        return x @ weights[names[0]][rows].T
    scores = x @ weights[f"{kind}_switch.router.weight"].view(KV_HEADS, switch.num_experts, -1)[head].T  # [b, s, n]
    out = []
    for token, score in zip(x.flatten(0, 1), scores.flatten(0, 1), strict=True):
        best = sorted(range(switch.num_experts), key=lambda e: -score[e].item())[: switch.top_k]  # noqa: B023
        out.append(sum(1 / (1 + torch.exp(-score[e])) * (weights[names[e]][rows] @ token) for e in best))
    return torch.stack(out).view(*x.shape[:2], -1)


def explicit(layer: GatedAttention, x: Tensor) -> Tensor:
    weights = {name: p.detach().to(x.dtype) for name, p in layer.named_parameters()}
    norm = lambda y, name: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]  # noqa: E731
    turn = lambda y: rotate(y.unsqueeze(2), rope().to(x.dtype)).squeeze(2)  # noqa: E731
    outputs = []
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        q = x @ weights["q.weight"][head * WIDTH : (head + 1) * WIDTH].T
        k, v = (explicit_projection(x, weights, kind, kv, layer.config.switch) for kind in ("k", "v"))
        q, k = turn(norm(q, "q_norm.weight")), turn(norm(k, "k_norm.weight"))
        later = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        outputs.append((q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, -1) @ weights["o.weight"].T


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_is_its_formula(switch):
    layer, x, cotangent = attention_of(switch), random("x", BATCH, SEQUENCE, HIDDEN).requires_grad_(), random("c", BATCH, SEQUENCE, HIDDEN)
    with watched_routes(layer) as gaps:
        out = layer(x, rope())
    assert len(gaps) == len(switch.projections) and min(gaps) > SMALLEST_GAP
    wide = x.detach().double().requires_grad_()
    expected = explicit(layer, wide)
    assert_close(out, expected, to=TIGHT, what="output")
    (grad,), (expected_grad,) = torch.autograd.grad(out, x, cotangent), torch.autograd.grad(expected, wide, cotangent.double())
    assert_close(grad, expected_grad, to=TIGHT, what="input gradient")


def test_one_of_one_is_the_headwise_gate_on_the_value():
    """Table 6, "v 1-of-1": the same numbers, forward and backward, from the same weights."""
    switched, gated = attention_of(SWITCHES["v 1 of 1"]), attention_of(SwitchConfig(), GateConfig("G2", "headwise"))
    own = dict(switched.named_parameters())
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            parameter.copy_(own["v_switch.router.weight" if name == "gate.weight" else name])
    x, cotangent = random("x", BATCH, SEQUENCE, HIDDEN), random("c", BATCH, SEQUENCE, HIDDEN)
    outputs = [layer(x, rope()) for layer in (switched, gated)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.backward(cotangent)
    for name, parameter in gated.named_parameters():
        assert_close(own["v_switch.router.weight" if name == "gate.weight" else name].grad, parameter.grad, to=1e-6, what=name)


def test_what_is_not_chosen_gets_no_gradient():
    layer = attention_of(SwitchConfig("v", 3, 1))
    with torch.no_grad():
        layer.v_switch.router.weight.view(KV_HEADS, 3, -1)[:, 2] = 0
    x = random("x", BATCH, SEQUENCE, HIDDEN).abs()
    with torch.no_grad():  # expert 1 always wins, expert 2 never
        layer.v_switch.router.weight.view(KV_HEADS, 3, -1)[:, 0] = -1
        layer.v_switch.router.weight.view(KV_HEADS, 3, -1)[:, 1] = 1
    layer(x, rope()).square().sum().backward()
    assert layer.v_switch.experts[0].weight.grad.abs().sum() > 0
    assert not layer.v.weight.grad.any() and not layer.v_switch.experts[1].weight.grad.any()


def under_tp(context: RankContext, switch: SwitchConfig) -> None:
    """4 ranks are more than key/value heads."""
    mesh = ParallelMesh.build(tp=context.world_size, ep=1)
    x, cotangent = random("x", BATCH, SEQUENCE, HIDDEN), random("cotangent", BATCH, SEQUENCE, HIDDEN)
    whole, full_x = attention_of(switch), x.clone().requires_grad_()
    out = whole(full_x, rope())
    out.backward(cotangent)
    layer, local_x = attention_of(switch, tp=mesh.tp), take(x, mesh.tp, 1).requires_grad_()
    local = layer(local_x, rope())
    local.backward(take(cotangent, mesh.tp, 1))
    assert_all_close(full_weights(layer, mesh), full_weights(whole, SINGLE), to=0)
    assert_close(local, take(out, mesh.tp, 1), to=TIGHT, what="output")
    assert_close(local_x.grad, take(full_x.grad, mesh.tp, 1), to=TIGHT, what="input gradient")
    assert_all_close(full_gradients(layer, mesh), full_gradients(whole, SINGLE), to=TIGHT)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_under_tp(world_size, switch):
    ranks.run_ranks(under_tp, world_size, switch)


def test_gates_elsewhere_go_with_switch_heads():
    plain, gated = attention_of(SWITCHES["v 2 of 2"]), attention_of(SWITCHES["v 2 of 2"], GateConfig("G1"))
    x = random("x", BATCH, SEQUENCE, HIDDEN)
    with torch.no_grad():
        gated.gate.weight.zero_()
        assert_close(gated(x, rope()), plain(x, rope()) / 2, to=1e-6)
    assert replace(plain.config, gate=GateConfig("G1")) == gated.config


def test_every_kind_is_among_them():
    assert {switch.projections for switch in SWITCHES.values()} == set(get_args(SwitchProjections)) - {"none"}


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_sum_is_rounded_once(top_k):
    """In bf16: scores and sum are fp32."""
    switch = attention_of(SwitchConfig("v", 3, top_k)).v_switch
    projections = [random(f"v{e}", BATCH, SEQUENCE, KV_HEADS, WIDTH).bfloat16() for e in range(3)]
    logits = 3 * random("logits", BATCH, SEQUENCE, KV_HEADS, 3).bfloat16()
    out = switch(projections[0], logits.flatten(2), *(p.flatten(2) for p in projections[1:]))
    chosen = torch.zeros(logits.shape).scatter(-1, logits.float().topk(top_k).indices, 1.0)
    exact = sum(p.double() * (logits.double().sigmoid() * chosen)[..., e, None] for e, p in enumerate(projections))
    assert out.dtype == torch.bfloat16 and (out == exact.bfloat16()).double().mean() > 0.99
