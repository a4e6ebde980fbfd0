"""Router, dispatcher and the whole MoE block: against a loop over experts, and under ep and tp against one rank."""

from dataclasses import dataclass

import pytest
import ranks
import torch
from parity.sharded import (
    BACKEND,
    assert_all_close,
    assert_close,
    clear_routes,
    fill,
    full_gradients,
    full_weights,
    random,
    take,
)
from torch import Tensor
from torch.nn import functional as F

from megagate.backend.native import NativeBackend
from megagate.config.model import MoEConfig
from megagate.nn.moe.dispatch import Dispatcher
from megagate.nn.moe.layer import MoE
from megagate.nn.moe.router import Route, Router, RouterStats
from megagate.parallel.comm import total
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

BATCH, SEQUENCE, HIDDEN, EXPERTS, TOP_K = 4, 16, 20, 8, 3
TIGHT = 5e-6


@dataclass(frozen=True)
class Routing:
    """How the inputs are made to route.

    Args:
        dead: Experts that get no token at all.
        dead_on_first: Experts that get no token of the first rank, and some of the others.
        only: The only experts that get tokens; empty for all.
    """

    dead: tuple[int, ...] = ()
    dead_on_first: tuple[int, ...] = ()
    only: tuple[int, ...] = ()


ROUTINGS = {
    "free": Routing(),
    "dead experts": Routing(dead=(0, 5)),
    "dead on one rank": Routing(dead=(7,), dead_on_first=(2, 6)),
    "all on three": Routing(only=(0, 1, 7)),  # with ep 4 the second and third rank receive nothing; they send all the same
}


def config(renormalize: bool, shared: int = 0) -> MoEConfig:
    return MoEConfig(num_experts=EXPERTS, top_k=TOP_K, ffn_size=12, shared_ffn_size=shared, renormalize=renormalize)


PLAIN, RENORMALIZED, SHARED = config(False), config(True), config(True, shared=24)
# The shared expert sees every token alike, so that it has no part in how tokens are routed: one routing is enough.
BLOCKS = {f"{name}-{kind}": (name, moe) for name in ROUTINGS for kind, moe in (("renormalized", RENORMALIZED), ("plain", PLAIN))}
BLOCKS |= {"free-shared expert": ("free", SHARED)}


def make(mesh: ParallelMesh, routing: Routing, config: MoEConfig) -> MoE:
    """A block whose router avoids experts by channel 0 (always 1) and, for tokens of the first rank, by channel 1."""
    moe = fill(MoE(config, HIDDEN, dtype=torch.float32, backend=BACKEND, mesh=mesh))
    with torch.no_grad():
        moe.router.weight[:, :2] = 0
        moe.router.weight[list(routing.dead), 0] = -30
        moe.router.weight[list(routing.dead_on_first), 1] = -30
        if routing.only:
            moe.router.weight[list(routing.only), 0] = 30
    return moe


def tokens(mesh: ParallelMesh) -> Tensor:
    """[b, s, h] of the whole world: rows over dp, the sequence over tp, as the first rank of `mesh` has them."""
    x = random("tokens", BATCH, SEQUENCE, HIDDEN)
    x[..., 0] = 1
    x[..., 1] = 0
    x[: BATCH // mesh.dp.size, : SEQUENCE // mesh.tp.size, 1] = 1
    return x


def local(full: Tensor, mesh: ParallelMesh) -> Tensor:
    return take(take(full, mesh.dp, 0), mesh.tp, 1)


def objective(out: Tensor, stats: RouterStats, cotangent: Tensor, prob_weights: Tensor) -> Tensor:
    """Something that depends on all that a block returns, on each sequence in its own way."""
    return (out * cotangent).sum() + (stats.prob_sums * prob_weights).sum() + 0.01 * stats.z_sum


def assert_counts(counts: Tensor, on_first: Tensor, routing: Routing) -> None:
    """The inputs do what their name says."""
    alive = set(routing.only or range(EXPERTS)) - set(routing.dead)
    assert set(counts.nonzero().flatten().tolist()) == alive
    if routing.dead_on_first:
        assert not on_first[list(routing.dead_on_first)].any()
    assert counts.sum() == BATCH * SEQUENCE * TOP_K


# ---- the whole block


def against_one_rank(context: RankContext, tp: int, ep: int, name: str, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Outputs, statistics and gradients. Returns the tokens of each expert from this rank and from all."""
    mesh, alone, routing = ParallelMesh.build(tp=tp, ep=ep), ParallelMesh.single(), ROUTINGS[name]
    x, cotangent = tokens(mesh).requires_grad_(), random("cotangent", BATCH, SEQUENCE, HIDDEN)
    prob_weights = random("prob weights", BATCH, EXPERTS)
    whole = make(alone, routing, config)
    with clear_routes(whole):
        out, stats = whole(x)
    objective(out, stats, cotangent, prob_weights).backward()

    local_x, moe = local(x, mesh).requires_grad_(), make(mesh, routing, config)
    local_out, local_stats = moe(local_x)
    objective(local_out, local_stats, local(cotangent, mesh), take(prob_weights, mesh.dp, 0)).backward()

    assert_all_close(full_weights(moe, mesh), full_weights(whole, alone), to=0)
    assert_close(local_out, local(out, mesh), to=TIGHT, what="output")
    assert_close(local_x.grad, local(x.grad, mesh), to=TIGHT, what="input gradient")
    assert_all_close(full_gradients(moe, mesh), full_gradients(whole, alone), to=TIGHT)
    # Of each sequence: tp ranks have parts of the same ones, dp ranks have others.
    assert torch.equal(total(local_stats.counts, mesh.tp), take(stats.counts, mesh.dp, 0))
    assert not local_stats.counts.requires_grad
    assert_close(total(local_stats.prob_sums, mesh.tp), take(stats.prob_sums, mesh.dp, 0), to=TIGHT, what="sums of probabilities")
    assert_close(total(local_stats.z_sum, mesh.world), stats.z_sum, to=TIGHT, what="sum of squares")
    dead = [e for e in range(EXPERTS) if not stats.counts[:, e].any()]
    gradients = full_gradients(moe, mesh)
    assert not gradients["experts.gate_up"][dead].any() and not gradients["experts.down"][dead].any()
    return local_stats.counts.sum(0), stats.counts.sum(0)


@pytest.mark.parametrize(("name", "config"), BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(("world_size", "tp", "ep"), [(2, 1, 2), (2, 2, 2), (2, 2, 1), (4, 1, 4), (4, 1, 2), (4, 2, 4), (4, 4, 2)])
def test_the_block_on_many_ranks_equals_one(world_size, tp, ep, name, config):
    results = ranks.run_ranks(against_one_rank, world_size, tp, ep, name, config)
    assert_counts(results[0][1], results[0][0], ROUTINGS[name])
    for expert in ROUTINGS[name].dead_on_first:
        assert sum(counts[expert] for counts, _ in results[1:]) > 0
    assert torch.equal(sum(counts for counts, _ in results), results[0][1])


@pytest.mark.parametrize(("name", "config"), BLOCKS.values(), ids=BLOCKS)
def test_the_block_is_a_weighted_sum_over_experts(name, config):
    mesh = ParallelMesh.single()
    moe, x = make(mesh, ROUTINGS[name], config), tokens(mesh).requires_grad_()
    cotangent, prob_weights = random("cotangent", BATCH, SEQUENCE, HIDDEN), random("prob weights", BATCH, EXPERTS)
    with clear_routes(moe):
        out, stats = moe(x)
    objective(out, stats, cotangent, prob_weights).backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}

    wide = x.detach().double().requires_grad_()
    weights = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    expected, expected_stats = loop_over_experts(wide, weights, config.renormalize)
    objective(expected, expected_stats, cotangent.double(), prob_weights.double()).backward()
    assert_close(out, expected, to=TIGHT, what="output")
    assert_close(x.grad, wide.grad, to=TIGHT, what="input gradient")
    assert_all_close(gradients, {name: w.grad for name, w in weights.items()}, to=TIGHT)
    assert torch.equal(stats.counts.double(), expected_stats.counts)
    assert_close(stats.prob_sums, expected_stats.prob_sums, to=TIGHT)
    assert_close(stats.z_sum, expected_stats.z_sum, to=TIGHT)


def loop_over_experts(x: Tensor, weights: dict[str, Tensor], renormalize: bool) -> tuple[Tensor, RouterStats]:
    """Every token through every expert, weighted by zero where it was not chosen, and through the shared one, if there is one."""
    logits = x @ weights["router.weight"].T
    scores = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    chosen = scores >= scores.sort(-1, descending=True).values[..., TOP_K - 1 : TOP_K]
    probs = scores * chosen
    if renormalize:
        probs = probs / probs.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        gate, up = (x @ weights["experts.gate_up"][expert].T).chunk(2, -1)
        out = out + probs[..., expert, None] * (F.silu(gate) * up @ weights["experts.down"][expert].T)
    if "shared_expert.down.weight" in weights:
        gate, up, down = (weights[f"shared_expert.{one}.weight"] for one in ("gate", "up", "down"))
        out = out + F.silu(x @ gate.T) * (x @ up.T) @ down.T
    z = torch.log(torch.exp(logits).sum(-1)).pow(2).sum()
    return out, RouterStats(chosen.sum(1).double(), scores.sum(1), z)


# ---- the router


@pytest.mark.parametrize("renormalize", [True, False])
def test_router_probabilities(renormalize):
    router = fill(Router(config(renormalize), HIDDEN, dtype=torch.float32, backend=BACKEND, tp=ParallelMesh.single().tp))
    x = random("x", 50, HIDDEN)
    with clear_routes(router):
        route, stats = router(x.view(2, 25, HIDDEN))
    scores = (x @ router.weight.T).double().softmax(-1)
    best = scores.argsort(-1, descending=True)[:, :TOP_K]
    assert torch.equal(route.ids, best)
    expected = scores.gather(1, best)
    assert_close(route.probs, expected / expected.sum(-1, keepdim=True) if renormalize else expected, to=TIGHT)
    by_sequence = [torch.bincount(ids.flatten(), minlength=EXPERTS) for ids in best.split(25)]
    assert torch.equal(stats.counts, torch.stack(by_sequence).float())
    assert torch.equal(route.counts, sum(by_sequence))


def test_router_is_fp32_under_bf16():
    """Logits are products in fp32, not bf16 products cast afterwards: routes of near-ties would differ."""
    router = fill(Router(config(True), HIDDEN, dtype=torch.bfloat16, backend=BACKEND, tp=ParallelMesh.single().tp))
    x = random("x", 100, HIDDEN).bfloat16()
    with clear_routes(router):
        route, stats = router(x.view(4, 25, HIDDEN))
    assert route.probs.dtype == stats.counts.dtype == stats.prob_sums.dtype == stats.z_sum.dtype == torch.float32
    scores = (x.double() @ router.weight.double().T).softmax(-1)
    assert_close(stats.prob_sums, scores.view(4, 25, EXPERTS).sum(1), to=1e-6)
    top = scores.topk(TOP_K).values
    assert_close(route.probs, top / top.sum(-1, keepdim=True), to=1e-6)


# ---- the dispatcher


def send_and_return(context: RankContext, row_multiple: int) -> list[tuple[list[int], list[int]]]:
    """Rows carry their origin: what arrives, in which order, and that it comes home. Returns each expert's rows and padding."""
    mesh = ParallelMesh.build(tp=1, ep=context.world_size)
    generator = torch.Generator().manual_seed(100 + context.rank)
    count = 13 + 5 * context.rank  # ranks may own different numbers of tokens
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(count)])
    x = torch.stack([torch.full((count,), float(context.rank)), torch.arange(count).float()], 1)
    route = Route(ids, 1 + x[:, 1:] / 100 + torch.tensor([[0.0, 0.001]]), torch.bincount(ids.flatten(), minlength=EXPERTS))
    backend = NativeBackend(torch.device("cpu"))
    backend.row_multiple = row_multiple
    dispatcher = Dispatcher(backend=backend, ep=mesh.ep)
    rows, plan = dispatcher.dispatch(x, route)

    assert rows.ends.dtype == torch.int32 and rows.probs.dtype == torch.float32
    starts = [0, *rows.ends.tolist()]
    assert all(end % row_multiple == 0 for end in starts) and starts[-1] == rows.x.shape[0] == rows.probs.shape[0]
    found = []
    for start, end in zip(starts, rows.ends.tolist(), strict=False):
        block, probs = rows.x[start:end], rows.probs[start:end, 0]
        real = int((probs != 0).sum())
        assert (probs[:real] != 0).all(), "padding comes last"
        assert not block[real:].any() and 0 < end - start < max(1, real) + row_multiple, "an idle expert keeps a block"
        found.append([(int(r), int(t), round(float(p), 4)) for (r, t), p in zip(block[:real].tolist(), probs[:real], strict=True)])
    home = dispatcher.combine(rows.x, plan)
    assert torch.equal(home, 2 * x), "each token comes back once for each of its experts"
    return [(ids.tolist(), route.probs.tolist()), found]


@pytest.mark.parametrize("row_multiple", [1, 16])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dispatcher_delivers_every_row_once_and_in_order(world_size, row_multiple):
    results = ranks.run_ranks(send_and_return, world_size, row_multiple)
    arrived = [expert for _, found in results for expert in found]
    assert len(arrived) == EXPERTS
    for expert, rows in enumerate(arrived):
        expected = [
            (rank, token, round(prob, 4))
            for rank, ((ids, probs), _) in enumerate(results)
            for token, (chosen, weights) in enumerate(zip(ids, probs, strict=True))
            for one, prob in zip(chosen, weights, strict=True)
            if one == expert
        ]
        assert rows == expected, "by source rank, then by token"
