"""Transformer Engine's own Python layer on the CPU computes what plain PyTorch does: what the tests of the backend through it stand on."""

import pytest
import torch
from te.te_ranks import needs_te, run
from torch.nn import functional as F

from megagate.parallel.spawn import RankContext

pytestmark = needs_te
BF16 = torch.bfloat16
FP8_ERROR = 0.06
"""Of e4m3 x e4m3 products of normal numbers about 0.04, of e5m2 x e4m3 about 0.06."""


def test_products_are_pytorchs_bit_for_bit():
    (errors,) = run(products, 1)
    assert errors == {"out": 0.0, "grad_x": 0.0, "grad_w": 0.0}


def products(_context: RankContext) -> dict[str, float]:
    import transformer_engine.pytorch as te

    layer = te.Linear(64, 96, bias=False, params_dtype=BF16, device="meta")
    weight, x, grad = random(96, 64, grad=True), random(2, 32, 64, grad=True), random(2, 32, 96)
    layer._parameters["weight"] = weight
    return errors(layer(x), F.linear(x, weight), grad, x, weight)


def random(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape).to(BF16).requires_grad_(grad)


def errors(ours, expected, grad, x, weight) -> dict[str, float]:
    found, wanted = (torch.autograd.grad(out, (x, weight), grad) for out in (ours, expected))
    pairs = {"out": (ours, expected), "grad_x": (found[0], wanted[0]), "grad_w": (found[1], wanted[1])}
    return {name: relative(a, b) for name, (a, b) in pairs.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling"])
def test_fp8_products_have_the_error_of_fp8(recipe):
    (found,) = run(fp8_products, 1, recipe)
    for name, error in found.items():
        assert 0.02 < error < FP8_ERROR + 0.005, (name, error)


def fp8_products(_context: RankContext, recipe: str) -> dict[str, float]:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    layer = te.Linear(64, 96, bias=False, params_dtype=BF16, device="meta")
    weight, x, grad = random(96, 64, grad=True), random(2, 32, 64, grad=True), random(2, 32, 96)
    layer._parameters["weight"] = weight
    for _ in range(3):  # delayed scaling's first scales are 1
        with te.autocast(recipe=getattr(recipes, recipe)()):
            out = layer(x)
        found = errors(out, F.linear(x, weight), grad, x, weight)
    return found


def test_delayed_scaling_takes_the_largest_value_of_all_ranks():
    first, second = run(histories, 2)
    for name, of_first in first.items():
        assert torch.equal(of_first, second[name]), name
    # Rank 1 has what is twice as large. The history's first place is for the next step; the oldest comes next.
    assert first["forward"][:, 0].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert first["scale"][0].item() == pytest.approx(448 / 6)


def histories(context: RankContext) -> dict[str, torch.Tensor]:
    import torch.distributed as dist
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    layer = te.Linear(32, 32, bias=False, params_dtype=BF16, device="meta")
    layer._parameters["weight"] = torch.eye(32).to(BF16).requires_grad_()
    for step in range(1, 4):
        x = torch.full((16, 32), step * (1.0 + context.rank)).to(BF16).requires_grad_()
        with te.autocast(recipe=DelayedScaling(amax_history_len=4), amax_reduction_group=dist.group.WORLD):
            out = layer(x)
        out.sum().backward()
    forward, backward = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
    return {"forward": forward.amax_history, "backward": backward.amax_history, "scale": forward.scale}


def test_permutation_is_tes_own_kernels_in_numpy():
    (found,) = run(permuted, 1)
    for name, (ours, expected) in found.items():
        assert torch.equal(ours, expected), name


def permuted(_context: RankContext) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    import transformer_engine.pytorch as te

    tokens, experts, top_k = 24, 6, 2
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    chosen = torch.zeros(tokens, experts, dtype=torch.int32).scatter_(1, ids, 1)
    x, probs = random(tokens, 16, grad=True), (torch.rand(tokens, experts) * chosen).requires_grad_()
    rows, row_probs, order = te.moe_permute_with_probs(x, probs, chosen, num_out_tokens=tokens * top_k)[:3]
    back = te.moe_unpermute(rows, order, restore_shape=x.shape)
    expert, token = chosen.t().nonzero(as_tuple=True)  # by expert, and by token within each
    weights = torch.arange(1.0, tokens * top_k + 1)
    grad_x, grad_probs = torch.autograd.grad(back.float().sum() + (row_probs * weights).sum(), (x, probs))
    return {
        "rows": (rows, x[token]),
        "probs": (row_probs, probs[token, expert]),
        "back": (back, 2 * x),
        "grad_x": (grad_x, torch.full_like(x, 2.0)),
        "grad_probs": (grad_probs, torch.zeros_like(probs).index_put((token, expert), weights)),
    }
