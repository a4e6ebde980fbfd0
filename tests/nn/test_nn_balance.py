"""Balance losses: against formulas written by hand, and the same on any split of the tokens over ranks."""

from dataclasses import dataclass
from typing import NamedTuple, get_args

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

MICRO_STEPS, SEQUENCES, LENGTH, LAYERS, EXPERTS, TOP_K = 2, 4, 6, 3, 6, 2
BALANCE, Z = 0.3, 0.07
TOKENS = SEQUENCES * LENGTH
STEP_TOKENS = MICRO_STEPS * TOKENS
SCOPES: tuple[BalanceScope, ...] = get_args(BalanceScope)


class Result(NamedTuple):
    shares: list[float]  # of all ranks together, one for each micro-step
    gradient: Tensor  # of their sum, [micro-steps, sequences, length, layers, E]
    logged: AuxLosses
    counts: Tensor  # rows for each expert in the whole step, [layers, E]


@dataclass(frozen=True)
class Split:
    """How the tokens of a micro-step lie on ranks: its sequences in equal parts over dp, each sequence over tp.

    Args:
        dp: Ranks that own different sequences.
        cuts: The t-th rank of a tp group owns the tokens [cuts[t], cuts[t + 1]) of each of its sequences.
    """

    dp: int = 1
    cuts: tuple[int, ...] = (0, LENGTH)

    @property
    def tp(self) -> int:
        return len(self.cuts) - 1


def logits() -> Tensor:
    """Skewed differently in each micro-step, sequence and layer, so that every mean matters."""
    skew = random("skew", MICRO_STEPS, SEQUENCES, 1, LAYERS, EXPERTS)
    return random("logits", MICRO_STEPS, SEQUENCES, LENGTH, LAYERS, EXPERTS) + 1.5 * skew


def config(scope: BalanceScope, *, balance: float = BALANCE, z: float = Z) -> MoEConfig:
    return MoEConfig(num_experts=EXPERTS, top_k=TOP_K, ffn_size=4, balance_coef=balance, balance_scope=scope, z_loss_coef=z)


def statistics(logits: Tensor) -> RouterStats:
    """Of one layer's tokens, [b, s/tp, E]."""
    scores = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(-1, scores.topk(TOP_K).indices, 1.0)
    return RouterStats(chosen.sum(1), scores.sum(1), logits.logsumexp(-1).square().sum())


def one_step(context: RankContext, config: MoEConfig, split: Split) -> Result:
    """A step in which each rank owns its part of the sequences and of the length of every micro-step."""
    mesh = ParallelMesh.build(tp=split.tp, ep=1)
    share_of_sequences = SEQUENCES // split.dp
    rows = slice(mesh.dp.rank * share_of_sequences, (mesh.dp.rank + 1) * share_of_sequences)
    columns = slice(split.cuts[mesh.tp.rank], split.cuts[mesh.tp.rank + 1])
    leaf = logits().requires_grad_()
    loss = BalanceLoss(config, step_tokens=STEP_TOKENS, mesh=mesh)
    shares = [loss.share([statistics(leaf[k, rows, columns, layer]) for layer in range(LAYERS)]) for k in range(MICRO_STEPS)]
    assert all(share.dtype == torch.float32 and share.shape == () for share in shares)
    sum(shares).backward()
    kept = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    kept[rows, columns] = True
    assert not leaf.grad[:, ~kept].any()
    return Result([total(share, mesh.world).item() for share in shares], gather(leaf.grad[None], mesh.world, 0).sum(0), *loss.close())


def by_hand(scope: BalanceScope, balance_coef: float, z_coef: float) -> Result:
    """The same in fp64, sequence by sequence and token by token."""
    leaf = logits().double().requires_grad_()
    probs = leaf.softmax(-1)
    chosen = torch.zeros(leaf.shape, dtype=torch.float64)
    chosen.scatter_(-1, leaf.argsort(-1, descending=True)[..., :TOP_K], 1.0)
    shares, logged_balance, logged_z = [], 0.0, 0.0
    for k in range(MICRO_STEPS):
        share = torch.zeros((), dtype=torch.float64)
        for layer in range(LAYERS):
            for sequence in range(SEQUENCES):
                match scope:
                    case "global_batch":
                        seen = chosen[: k + 1, :, :, layer]
                    case "micro_batch":
                        seen = chosen[k, :, :, layer]
                    case "sequence":
                        seen = chosen[k, sequence, :, layer]
                seen = seen.flatten(0, -2)
                frequency, mean_probs = seen.sum(0) / (len(seen) * TOP_K), probs[k, sequence, :, layer].mean(0)
                share = share + balance_coef * EXPERTS * (frequency * mean_probs).sum() / (MICRO_STEPS * SEQUENCES)
                for token in range(LENGTH):
                    share = share + z_coef * torch.log(torch.exp(leaf[k, sequence, token, layer]).sum()) ** 2 / STEP_TOKENS
        shares.append(share)
    for layer in range(LAYERS):
        frequency = chosen[..., layer, :].sum((0, 1, 2)) / (STEP_TOKENS * TOP_K)
        logged_balance += EXPERTS * (frequency * probs[..., layer, :].mean((0, 1, 2))).sum().item() / LAYERS
        logged_z += leaf[..., layer, :].logsumexp(-1).square().mean().item() / LAYERS
    sum(shares).backward()
    return Result([share.item() for share in shares], leaf.grad, AuxLosses(logged_balance, logged_z), chosen.sum((0, 1, 2)))


SPLITS = {
    "one rank": Split(),
    "dp 2": Split(dp=2),
    "dp 4": Split(dp=4),
    "tp 2": Split(cuts=(0, 3, LENGTH)),
    "tp 2, unequal": Split(cuts=(0, 1, LENGTH)),
    "tp 2 dp 2": Split(dp=2, cuts=(0, 3, LENGTH)),
    "tp 4, one without tokens": Split(cuts=(0, 1, 1, 4, LENGTH)),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scope", SCOPES)
def test_is_its_formula_on_any_split_of_the_tokens(scope, split):
    expected, split = by_hand(scope, BALANCE, Z), SPLITS[split]
    for result in ranks.run_ranks(one_step, split.dp * split.tp, config(scope), split):
        assert result.shares == pytest.approx(expected.shares, rel=1e-5)
        assert torch.allclose(result.gradient.double(), expected.gradient, rtol=1e-4, atol=1e-8)
        assert result.logged == pytest.approx(expected.logged, rel=1e-5)
        assert torch.equal(result.counts.double(), expected.counts), "of all micro-steps and ranks, layer by layer, whatever the scope"


def test_the_scopes_differ():
    """On these tokens: `global_batch` from `micro_batch` from the second micro-step on, `sequence` from both at once."""
    whole, micro, sequence = (by_hand(scope, BALANCE, Z).shares for scope in ("global_batch", "micro_batch", "sequence"))
    assert whole[0] == micro[0] and abs(whole[1] - micro[1]) > 1e-3
    assert all(abs(sequence[k] - other[k]) > 1e-3 for k in range(MICRO_STEPS) for other in (whole, micro))


@pytest.mark.parametrize(("balance", "z"), [(BALANCE, 0.0), (0.0, Z), (0.0, 0.0)])
def test_each_coefficient_weighs_its_own_loss(balance, z):
    (result,) = ranks.run_ranks(one_step, 1, config("global_batch", balance=balance, z=z), Split())
    assert result.shares == pytest.approx(by_hand("global_batch", balance, z).shares, rel=1e-5)
    assert result.logged == pytest.approx(by_hand("global_batch", BALANCE, Z).logged, rel=1e-5), "logged without the coefficients"


@pytest.mark.parametrize("scope", SCOPES)
def test_perfect_balance_is_one(scope):
    counts, prob_sums = (torch.full((SEQUENCES, EXPERTS), LENGTH * each / EXPERTS) for each in (TOP_K, 1))
    even = RouterStats(counts, prob_sums, torch.tensor(0.0))
    loss = BalanceLoss(config(scope), step_tokens=TOKENS, mesh=ParallelMesh.single())
    share = loss.share([even] * LAYERS)
    assert share.item() == pytest.approx(BALANCE * LAYERS)
    assert loss.close()[0].balance == pytest.approx(1.0)
