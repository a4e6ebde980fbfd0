"""The router's kinds: against Hugging Face's DeepSeek-V3 router, a formula, and itself over steps."""

from typing import get_args

import pytest
import torch
from parity.sharded import BACKEND, CPU, assert_close, fill, random
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megagate.config.model import AttentionConfig, ModelConfig, MoEConfig, RouterScore
from megagate.model.lm import LanguageModel
from megagate.nn.init import initialize
from megagate.nn.moe.layer import MoE, TokenGate
from megagate.nn.moe.router import Router
from megagate.parallel.mesh import ParallelMesh

HIDDEN, EXPERTS, TOP_K, RATE = 20, 8, 3, 0.05
FORMULAS = {
    "softmax": lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True),
    "sigmoid": lambda logits: 1 / (1 + (-logits).exp()),
}
SINGLE = ParallelMesh.single()
STEPS = torch.tensor([4, 0, -3, 9, -9, 0, 2, -6], dtype=torch.int32)


def router_of(**changes: object) -> Router:
    config = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, ffn_size=16, **changes)
    router = Router(config, HIDDEN, dtype=torch.float32, backend=BACKEND, tp=SINGLE.tp)
    initialize(router, seed=1, std=0.2, num_layers=1, device=CPU)
    return router


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_sigmoid_and_bias_are_deepseeks(renormalize, bias):
    router = router_of(score="sigmoid", renormalize=renormalize, bias_update_rate=RATE if bias else 0.0)
    peer = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=HIDDEN,
            num_local_experts=EXPERTS,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            n_group=1,
            topk_group=1,
            norm_topk_prob=renormalize,
            routed_scaling_factor=1.0,
        )
    )
    with torch.no_grad():
        peer.weight.copy_(router.weight)
        if bias:
            router.bias_steps.copy_(STEPS)
            peer.e_score_correction_bias.copy_(RATE * STEPS)
    x = random("x", 2, 16, HIDDEN)
    route, _ = router(x)
    _, weights, ids = peer(x)
    order = ids.argsort(-1)
    own = route.ids.argsort(-1)
    assert torch.equal(route.ids.gather(-1, own), ids.gather(-1, order))
    assert_close(route.probs.gather(-1, own), weights.gather(-1, order), to=1e-6)
    if bias:
        plain = router_of(score="sigmoid", renormalize=renormalize)
        assert not torch.equal(plain(x)[0].ids.sort(-1).values, route.ids.sort(-1).values), "the bias chooses otherwise"


@pytest.mark.parametrize("score", get_args(RouterScore))
def test_the_bias_chooses_and_does_not_weigh(score):
    router, unbiased = router_of(score=score, renormalize=False, bias_update_rate=RATE), router_of(score=score, renormalize=False)
    router.bias_steps[5], router.bias_steps[2] = 1000, -1000
    x = random("x", 2, 16, HIDDEN)
    route, stats = router(x)
    scores = FORMULAS[score](unbiased.logits(x).double()).float()
    assert (route.ids == 5).any(-1).all() and not (route.ids == 2).any()
    assert_close(route.probs, scores.flatten(0, 1).gather(-1, route.ids), to=1e-6)
    shares = scores / scores.sum(-1, keepdim=True)
    assert_close(stats.prob_sums, shares.sum(1), to=1e-6)
    assert_close(stats.prob_sums.sum(), torch.tensor(32.0), to=1e-6)


def test_the_bias_follows_the_load():
    router = router_of(score="sigmoid", bias_update_rate=RATE)
    assert router.bias_steps.dtype == torch.int32 and not router.bias_steps.any(), "it begins at 0"
    router.follow(torch.tensor([10.0, 2, 6, 6, 0, 12, 6, 6]))  # mean 6
    assert router.bias_steps.tolist() == [-1, 1, 0, 0, 1, -1, 0, 0]
    router.follow(torch.tensor([10.0, 2, 6, 6, 0, 12, 6, 6]))
    assert router.bias_steps.tolist() == [-2, 2, 0, 0, 2, -2, 0, 0]
    without = router_of()
    without.follow(torch.ones(EXPERTS))
    assert without.bias_steps is None


def test_it_balances():
    """A router that sends most tokens to three experts spreads them once the bias has followed the load for a while."""
    router = router_of(score="sigmoid", bias_update_rate=0.005)
    with torch.no_grad():
        router.weight[:3] += 0.1
    x = random("x", 8, 64, HIDDEN).abs()

    def excess() -> float:
        counts = router(x)[0].counts.float()
        router.follow(counts)
        return (counts.max() / counts.mean()).item()

    before = excess()
    for _ in range(200):
        after = excess()
    assert before > 2 > 1.3 > after


def test_the_largest_counts_keep_their_sign():
    """Half a billion rows: fp32 no longer holds every whole number, the mean is formed in fp64."""
    router = router_of(score="sigmoid", bias_update_rate=RATE)
    counts = torch.full((EXPERTS,), 2.0**26)
    counts[0] += 8
    router.follow(counts)
    assert router.bias_steps.tolist() == [-1] + [1] * (EXPERTS - 1)


def test_scores_that_all_round_to_nothing_are_finite():
    router = router_of(score="sigmoid")
    with torch.no_grad():
        router.weight.fill_(-30)
    x = torch.ones(1, 4, HIDDEN)
    route, stats = router(x)
    (route.probs.sum() + stats.prob_sums.sum()).backward()
    assert route.probs.isfinite().all() and stats.prob_sums.isfinite().all() and router.weight.grad.isfinite().all()


def test_biases_of_a_model_follow_their_own_layers():
    """Counts come for mixtures alone; the first layer is dense."""
    moe = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, ffn_size=16, first_dense_layers=1, score="sigmoid", bias_update_rate=RATE)
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)
    config = ModelConfig(vocab_size=64, hidden_size=HIDDEN, num_layers=3, ffn_size=16, moe=moe, attention=attention)
    model = LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=SINGLE).initialize(seed=1, device=CPU)
    model.follow_counts(torch.stack([torch.arange(8.0), torch.arange(8.0).flip(0)]))
    steps = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    rising = [1] * 4 + [-1] * 4
    assert steps == {"layers.1.moe.router.bias_steps": rising, "layers.2.moe.router.bias_steps": rising[::-1]}


def test_the_shared_experts_gate_is_its_formula():
    config = MoEConfig(num_experts=4, top_k=1, ffn_size=8, shared_ffn_size=12, shared_gate=True)
    moe = MoE(config, HIDDEN, dtype=torch.float32, backend=BACKEND, mesh=SINGLE)
    initialize(moe, seed=1, std=0.3, num_layers=1, device=CPU)
    x = random("x", 2, 5, HIDDEN)
    gated, shared, weight = moe(x)[0], moe.shared_expert(x), moe.shared_gate.weight.detach()
    moe.shared_gate = None
    scores = 1 / (1 + torch.exp(-(x @ weight.T)))  # [b, s, 1]
    assert_close(moe(x)[0] - gated, (1 - scores) * shared, to=1e-5)


def test_the_shared_experts_gate_is_rounded_once():
    """In bf16: logits, score and product are fp32."""
    gate = fill(TokenGate(HIDDEN, dtype=torch.bfloat16, tp=SINGLE.tp))
    x, y = (3 * random(name, 4, 16, HIDDEN).bfloat16() for name in ("x", "y"))
    exact = y.double() * (x.double() @ gate.weight.double().T).sigmoid()
    assert (gate(y, x) == exact.bfloat16()).double().mean() > 0.99
