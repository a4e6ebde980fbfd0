"""Every dense layer: against its formula on one rank, and under tp against the same class unsharded (fp32)."""

from collections.abc import Callable

import pytest
import ranks
import torch
from parity.sharded import BACKEND, assert_all_close, assert_close, fill, full_gradients, full_weights, random, take
from torch import Tensor, nn
from torch.nn import functional as F

from megagate.config.model import AttentionConfig, GateConfig, ModelConfig
from megagate.nn.attention import GatedAttention
from megagate.nn.embedding import Embedding
from megagate.nn.mlp import DenseFFN
from megagate.nn.norm import RMSNorm
from megagate.nn.rope import rope_table, rotate
from megagate.parallel.comm import gather
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.spawn import RankContext

BATCH, SEQUENCE, HIDDEN = 2, 16, 24
DENSE = {"dtype": torch.float32, "backend": BACKEND}
TIGHT = 5e-6
GATES = {
    "none": GateConfig("none"),
    "elementwise": GateConfig("G1", "elementwise"),
    "headwise": GateConfig("G1", "headwise"),
}


def attention_model(gate: str, qk_norm: bool) -> ModelConfig:
    """4 query heads on 2 kv heads: tp 4 replicates k and v."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=qk_norm, gate=GATES[gate])
    return ModelConfig(vocab_size=100, hidden_size=HIDDEN, num_layers=2, attention=attention)


def attention(gate: str, qk_norm: bool, tp: Axis) -> GatedAttention:
    return fill(GatedAttention(attention_model(gate, qk_norm), **DENSE, tp=tp))


def rope() -> Tensor:
    return rope_table(SEQUENCE, 8, base=100.0, device=torch.device("cpu"))


def attention_pair(gate: str, qk_norm: bool) -> tuple[Callable[[Axis], nn.Module], Callable[[nn.Module, Tensor], Tensor]]:
    return lambda tp: attention(gate, qk_norm, tp), lambda layer, x: layer(x, rope())


def ffn(tp: Axis) -> DenseFFN:
    return fill(DenseFFN(HIDDEN, 40, **DENSE, tp=tp))


def norm(tp: Axis) -> RMSNorm:
    return fill(RMSNorm(HIDDEN, eps=1e-2, **DENSE, tp=tp))


# ---- tensor parallelism


def against_unsharded(
    context: RankContext, build: Callable[[Axis], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[set[str], set[str]]:
    """Outputs and gradients under tp == world, from a sequence that is cut over tp. Returns the names of cut and of whole parameters."""
    mesh, alone = ParallelMesh.build(tp=context.world_size, ep=1), ParallelMesh.single()
    x, cotangent = random("x", BATCH, SEQUENCE, HIDDEN).requires_grad_(), random("cotangent", BATCH, SEQUENCE, HIDDEN)
    whole = build(alone.tp)
    out = call(whole, x)
    out.backward(cotangent)

    local_x = take(x, mesh.tp, 1).requires_grad_()
    layer = build(mesh.tp)
    local_out = call(layer, local_x)
    local_out.backward(take(cotangent, mesh.tp, 1))

    assert_all_close(full_weights(layer, mesh), full_weights(whole, alone), to=0)
    assert_close(local_out, take(out, mesh.tp, 1), to=TIGHT, what="output")
    assert_close(local_x.grad, take(x.grad, mesh.tp, 1), to=TIGHT, what="input gradient")
    assert_all_close(full_gradients(layer, mesh), full_gradients(whole, alone), to=TIGHT)
    sizes = {name: (p.numel(), q.numel()) for (name, p), (_, q) in zip(layer.named_parameters(), whole.named_parameters(), strict=True)}
    assert all(local * context.world_size == full or local == full for local, full in sizes.values())
    return {name for name, (a, b) in sizes.items() if a < b}, {name for name, (a, b) in sizes.items() if a == b}


def attention_under_tp(context: RankContext, gate: str, qk_norm: bool) -> tuple[set[str], set[str]]:
    return against_unsharded(context, *attention_pair(gate, qk_norm))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_attention_under_tp(world_size, gate, qk_norm):
    heads, kv = {"q.weight", "o.weight"}, {"k.weight", "v.weight"}
    heads |= {"gate.weight"} if gate != "none" else set()
    norms = {"q_norm.weight", "k_norm.weight"} if qk_norm else set()
    expected = (heads | kv, norms) if world_size == 2 else (heads, norms | kv)
    assert ranks.run_ranks(attention_under_tp, world_size, gate, qk_norm) == [expected] * world_size


def ffn_under_tp(context: RankContext) -> tuple[set[str], set[str]]:
    return against_unsharded(context, ffn, lambda layer, x: layer(x))


@pytest.mark.parametrize("world_size", [2, 4])
def test_dense_ffn_under_tp(world_size):
    expected = ({"gate.weight", "up.weight", "down.weight"}, set())
    assert ranks.run_ranks(ffn_under_tp, world_size) == [expected] * world_size


def norm_under_tp(context: RankContext) -> tuple[set[str], set[str]]:
    return against_unsharded(context, norm, lambda layer, x: layer(x))


@pytest.mark.parametrize("world_size", [2, 4])
def test_norm_under_tp(world_size):
    assert ranks.run_ranks(norm_under_tp, world_size) == [(set(), {"weight"})] * world_size


def embedding_under_tp(context: RankContext) -> bool:
    mesh, alone = ParallelMesh.build(tp=context.world_size, ep=1), ParallelMesh.single()
    ids = torch.randint(0, 64, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    ids[0, :4] = torch.tensor([0, 63, 31, 32])  # the borders of the ranks' rows
    cotangent = random("cotangent", BATCH, SEQUENCE, HIDDEN)
    whole = fill(Embedding(64, HIDDEN, dtype=torch.float32, tp=alone.tp))
    out = whole(ids)
    out.backward(cotangent)
    layer = fill(Embedding(64, HIDDEN, dtype=torch.float32, tp=mesh.tp))
    local = layer(ids)
    local.backward(take(cotangent, mesh.tp, 1))
    assert torch.equal(gather(local, mesh.tp, 1), out), "one rank has the row, the others add zeros"
    assert_all_close(full_gradients(layer, mesh), full_gradients(whole, alone), to=TIGHT)
    return layer.weight.shape[0] * context.world_size == 64


@pytest.mark.parametrize("world_size", [2, 4])
def test_embedding_under_tp(world_size):
    assert all(ranks.run_ranks(embedding_under_tp, world_size))


# ---- one rank, against the formulas


def explicit_attention(layer: GatedAttention, x: Tensor, gate: str, qk_norm: bool) -> Tensor:
    """Equations 1 to 5 of arXiv 2505.06708, head by head, with a softmax written out, in the dtype of x."""
    weights = {name: p.detach().to(x.dtype) for name, p in layer.named_parameters()}
    position = torch.arange(x.shape[1])
    masked = position[:, None] < position[None, :]
    heads = []
    for head in range(4):
        kv = head // 2
        q = x @ weights["q.weight"][head * 8 : head * 8 + 8].T
        k = x @ weights["k.weight"][kv * 8 : kv * 8 + 8].T
        v = x @ weights["v.weight"][kv * 8 : kv * 8 + 8].T
        if qk_norm:
            q = q / (q.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights["q_norm.weight"]
            k = k / (k.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights["k_norm.weight"]
        q, k = turn(q, base=100.0), turn(k, base=100.0)
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(masked, -torch.inf).exp()
        y = scores / scores.sum(-1, keepdim=True) @ v
        if gate == "elementwise":
            y = y * torch.sigmoid(x @ weights["gate.weight"][head * 8 : head * 8 + 8].T)
        if gate == "headwise":
            y = y * torch.sigmoid(x @ weights["gate.weight"][head : head + 1].T)
        heads.append(y)
    return torch.cat(heads, -1) @ weights["o.weight"].T


def turn(x: Tensor, *, base: float) -> Tensor:
    """RoPE as a product of complex numbers: channel i and i + d/2 are real and imaginary part. x [b, s, d]."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_attention_is_its_formula(gate, qk_norm):
    layer, x = attention(gate, qk_norm, ParallelMesh.single().tp), random("x", BATCH, SEQUENCE, HIDDEN).requires_grad_()
    cotangent = random("cotangent", BATCH, SEQUENCE, HIDDEN)
    out = layer(x, rope())
    (grad,) = torch.autograd.grad(out, x, cotangent)
    wide = x.detach().double().requires_grad_()
    expected = explicit_attention(layer, wide, gate, qk_norm)
    (expected_grad,) = torch.autograd.grad(expected, wide, cotangent.double())
    assert_close(out, expected, to=TIGHT, what="output")
    assert_close(grad, expected_grad, to=TIGHT, what="input gradient")


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_attention_is_causal(gate, qk_norm):
    layer, x = attention(gate, qk_norm, ParallelMesh.single().tp), random("x", BATCH, SEQUENCE, HIDDEN)
    changed = x.clone()
    changed[:, 7:] += 1
    before, after = layer(x, rope()), layer(changed, rope())
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


@pytest.mark.parametrize("base", [100.0, 10000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_is_a_complex_rotation(head_dim, base):
    x = random("x", BATCH, 64, 3, head_dim)
    turned = rotate(x, rope_table(64, head_dim, base=base, device=torch.device("cpu")))
    for head in range(3):
        assert_close(turned[:, :, head], turn(x[:, :, head], base=base), to=TIGHT)
    assert rotate(x.bfloat16(), rope_table(64, head_dim, base=base, device=torch.device("cpu"))).dtype == torch.bfloat16


def test_dense_ffn_is_its_formula():
    layer, x = ffn(ParallelMesh.single().tp), random("x", BATCH, SEQUENCE, HIDDEN)
    gate, up, down = (p.double() for p in (layer.gate.weight, layer.up.weight, layer.down.weight))
    wide = x.double()
    hidden = wide @ gate.T
    expected = hidden / (1 + torch.exp(-hidden)) * (wide @ up.T) @ down.T
    assert_close(layer(x), expected, to=TIGHT)


def test_norm_is_its_formula_with_statistics_in_fp32():
    layer, x = norm(ParallelMesh.single().tp), random("x", BATCH, SEQUENCE, HIDDEN)
    wide, weight = x.double(), layer.weight.double()
    assert_close(layer(x), wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * weight, to=TIGHT)
    narrow = (x * 300).bfloat16()  # a sum of squares in bf16 would keep 2 digits
    expected = narrow.double() / (narrow.double().pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    out = layer(narrow)
    assert out.dtype == torch.bfloat16
    assert (out == expected.bfloat16()).double().mean() > 0.995, "one rounding, at the end"


def test_embedding_is_a_look_up():
    layer = fill(Embedding(64, HIDDEN, dtype=torch.float32, tp=ParallelMesh.single().tp))
    ids = torch.randint(0, 64, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(ids), F.embedding(ids, layer.weight))
