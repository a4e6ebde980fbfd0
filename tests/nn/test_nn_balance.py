"""Balance losses: against formulas written by hand, and the same on any split of the tokens over ranks."""

from typing import NamedTuple

import pytest
import ranks
import torch
from parity.sharded import random
from torch import Tensor

from megagate.config.model import BalanceScope, MoEConfig
from megagate.nn.moe.balance import AuxLosses, BalanceLoss
from megagate.nn.moe.router import RouterStats
from megagate.parallel.comm import gather, total
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

MICRO_STEPS, TOKENS, LAYERS, EXPERTS, TOP_K = 2, 24, 3, 6, 2
BALANCE, Z = 0.3, 0.07
STEP_TOKENS = MICRO_STEPS * TOKENS
SCOPES: tuple[BalanceScope, ...] = ("global_batch", "micro_batch")


class Result(NamedTuple):
    shares: list[float]  # of all ranks together, one for each micro-step
    gradient: Tensor  # of their sum, [micro-steps, tokens, layers, E]
    logged: AuxLosses


def logits() -> Tensor:
    """Skewed differently in each micro-step, part of the tokens and layer, so that every mean matters."""
    skew = random("skew", MICRO_STEPS, 4, LAYERS, EXPERTS).repeat_interleave(TOKENS // 4, 1)
    return random("logits", MICRO_STEPS, TOKENS, LAYERS, EXPERTS) + 1.5 * skew


def config(scope: BalanceScope, *, balance: float = BALANCE, z: float = Z) -> MoEConfig:
    return MoEConfig(num_experts=EXPERTS, top_k=TOP_K, ffn_size=4, balance_coef=balance, balance_scope=scope, z_loss_coef=z)


def statistics(logits: Tensor) -> RouterStats:
    """Of one layer's tokens, [tokens, E]."""
    scores = logits.softmax(-1)
    counts = torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=EXPERTS).float()
    return RouterStats(counts, scores.sum(0), logits.logsumexp(-1).square().sum())


def one_step(context: RankContext, config: MoEConfig, cuts: list[int]) -> Result:
    """A step in which rank r owns the tokens [cuts[r], cuts[r + 1]) of every micro-step."""
    world = ParallelMesh.build(tp=1, ep=1).world
    mine = slice(cuts[context.rank], cuts[context.rank + 1])
    leaf = logits().requires_grad_()
    loss = BalanceLoss(config, step_tokens=STEP_TOKENS, world=world)
    shares = [loss.share([statistics(leaf[k, mine, layer]) for layer in range(LAYERS)]) for k in range(MICRO_STEPS)]
    assert all(share.dtype == torch.float32 and share.shape == () for share in shares)
    sum(shares).backward()
    kept = torch.zeros(TOKENS, dtype=torch.bool)
    kept[mine] = True
    assert not leaf.grad[:, ~kept].any()
    return Result([total(share, world).item() for share in shares], gather(leaf.grad[None], world, 0).sum(0), loss.logged())


def by_hand(scope: BalanceScope, balance_coef: float, z_coef: float) -> Result:
    """The same in fp64, token by token."""
    leaf = logits().double().requires_grad_()
    probs = leaf.softmax(-1)
    chosen = torch.zeros(leaf.shape, dtype=torch.float64)
    chosen.scatter_(-1, leaf.argsort(-1, descending=True)[..., :TOP_K], 1.0)
    shares, logged_balance, logged_z = [], 0.0, 0.0
    for k in range(MICRO_STEPS):
        share = torch.zeros((), dtype=torch.float64)
        for layer in range(LAYERS):
            seen = chosen[: k + 1, :, layer] if scope == "global_batch" else chosen[k : k + 1, :, layer]
            frequency = seen.sum((0, 1)) / seen.sum()
            mean_probs = probs[k, :, layer].sum(0) / STEP_TOKENS
            share = share + balance_coef * EXPERTS * (frequency * mean_probs).sum()
            for token in range(TOKENS):
                share = share + z_coef * torch.log(torch.exp(leaf[k, token, layer]).sum()) ** 2 / STEP_TOKENS
        shares.append(share)
    for layer in range(LAYERS):
        frequency = chosen[:, :, layer].sum((0, 1)) / (STEP_TOKENS * TOP_K)
        logged_balance += EXPERTS * (frequency * probs[:, :, layer].mean((0, 1))).sum().item() / LAYERS
        logged_z += leaf[:, :, layer].logsumexp(-1).square().mean().item() / LAYERS
    sum(shares).backward()
    return Result([share.item() for share in shares], leaf.grad, AuxLosses(logged_balance, logged_z))


CUTS = {
    "one rank": [0, TOKENS],
    "two": [0, 12, TOKENS],
    "two, unequal": [0, 5, TOKENS],
    "four": [0, 6, 12, 18, TOKENS],
    "four, one without tokens": [0, 1, 1, 17, TOKENS],
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_is_its_formula_on_any_split_of_the_tokens(scope, cuts):
    expected = by_hand(scope, BALANCE, Z)
    for result in ranks.run_ranks(one_step, len(CUTS[cuts]) - 1, config(scope), CUTS[cuts]):
        assert result.shares == pytest.approx(expected.shares, rel=1e-5)
        assert torch.allclose(result.gradient.double(), expected.gradient, rtol=1e-4, atol=1e-8)
        assert result.logged == pytest.approx(expected.logged, rel=1e-5)


def test_the_scopes_differ_from_the_second_micro_step_on():
    first, second = (by_hand(scope, BALANCE, Z).shares for scope in SCOPES)
    assert first[0] == second[0] and abs(first[1] - second[1]) > 1e-3


@pytest.mark.parametrize(("balance", "z"), [(BALANCE, 0.0), (0.0, Z), (0.0, 0.0)])
def test_each_coefficient_weighs_its_own_loss(balance, z):
    (result,) = ranks.run_ranks(one_step, 1, config("global_batch", balance=balance, z=z), [0, TOKENS])
    assert result.shares == pytest.approx(by_hand("global_batch", balance, z).shares, rel=1e-5)
    assert result.logged == pytest.approx(by_hand("global_batch", BALANCE, Z).logged, rel=1e-5), "logged without the coefficients"


def test_perfect_balance_is_one():
    even = RouterStats(torch.full((EXPERTS,), 8.0), torch.full((EXPERTS,), TOKENS / EXPERTS), torch.tensor(0.0))
    loss = BalanceLoss(config("global_batch"), step_tokens=TOKENS, world=ParallelMesh.single().world)
    share = loss.share([even] * LAYERS)
    assert share.item() == pytest.approx(BALANCE * LAYERS)
    assert loss.logged().balance == pytest.approx(1.0)
