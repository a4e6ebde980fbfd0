"""Transformer Engine's own FP8 plumbing (scales, histories, reductions over ranks, recomputation) does what emulated FP8 does, bit for bit.

Both are asked to quantise and to multiply alike: `stub_extension.py` and `megagate/backend/fp8/` were written apart. So it is the state of
the recipes that is compared, when it changes and over which ranks: where they differ, one of them trains otherwise than TE.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from parity.routing import routers, steer
from parity.sharded import BACKEND, fill, random
from parity.variants import DENSE, MOE
from te.te_backends import emulated_backend, te_backend
from te.te_ranks import needs_te, run
from torch import Tensor

from megagate.backend.base import Backend, KeepsState, Part
from megagate.config.model import ModelConfig
from megagate.config.run import Fp8Config
from megagate.model.lm import LanguageModel
from megagate.nn.norm import RMSNorm
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

pytestmark = needs_te
BATCH, LENGTH, STEPS, HISTORY = 2, 32, 4, 3
FP8_MOE = replace(MOE, moe=replace(MOE.moe, ffn_size=32, shared_ffn_size=32))
FP8_DENSE = replace(DENSE, ffn_size=64)
LAYOUTS = {"1 rank": (1, 1, 1), "tp 2, ep 2": (2, 2, 2), "dp 2": (2, 1, 1)}
"""World size, tp, ep."""
RESTING = (1, 4, 5)
"""Experts that get nothing in a micro-step, one after the other, beside those that never do."""


def build(model: ModelConfig, backend: Backend, mesh: ParallelMesh, *, recompute: bool = False) -> LanguageModel:
    made = fill(LanguageModel(model, dtype=torch.bfloat16, backend=backend, mesh=mesh, recompute=recompute))
    steer(made, mesh, "idle")
    for router in routers(made):
        router.logits = Rests(router.logits)
    return made


class Rests:
    """Logits of a router that keep from one more expert, another one in each micro-step."""

    def __init__(self, logits: Callable[[Tensor], Tensor]):
        self.logits, self.expert = logits, 0

    def __call__(self, x: Tensor) -> Tensor:
        values = self.logits(x)
        return values.index_fill(-1, torch.tensor(self.expert), -2e4)


def step(model: LanguageModel, number: int) -> dict[str, Tensor]:
    """Loss and gradients of one micro-step."""
    seed = 10 * number + model.mesh.dp.rank
    for router in routers(model):
        router.logits.expert = RESTING[number % len(RESTING)]
    text = torch.randint(0, 250, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    parts = model(text[:, :-1], text[:, 1:])
    (parts.ce_sum * 2.0**number + sum(stats.z_sum for stats in parts.stats)).backward()
    model.backend.after_backward(model)
    return {"loss": parts.ce_sum.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def state(model: LanguageModel) -> dict[str, Tensor]:
    """Histories and scales, as checkpoints hold them."""
    named = [(name, site) for name, site in model.named_modules() if isinstance(site, KeepsState)]
    return {f"{name}.{one.name}": one.tensor / one.unit for name, site in named for one in site.kept_state()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_is_emulated_fp8(recipe, layout):
    world_size, tp, ep = LAYOUTS[layout]
    for found in run(compared, world_size, recipe, tp, ep, timeout=240):
        assert found == {"moe": [], "dense": []}


def compared(_context: RankContext, recipe: str, tp: int, ep: int) -> dict[str, list[str]]:
    """Of each model, what differs after some micro-steps; idle experts, and another scale of the loss in each step."""
    mesh, fp8 = ParallelMesh.build(tp=tp, ep=ep), Fp8Config(recipe=recipe, amax_history=HISTORY)
    found = {}
    for name, model in {"moe": FP8_MOE, "dense": FP8_DENSE}.items():
        ours, theirs = (build(model, backend, mesh) for backend in (emulated_backend(mesh, fp8), te_backend(mesh, fp8, gives_normed=True)))
        different = []
        for number in range(STEPS):
            expected, actual = step(ours, number), step(theirs, number)
            different += [f"step {number}: {key}" for key in expected if not torch.equal(expected[key], actual[key])]
            expected, actual = state(ours), state(theirs)
            assert list(expected) == list(actual)
            assert bool(expected) == (recipe == "delayed")
            different += [f"after step {number}: {key}" for key in expected if not torch.equal(expected[key], actual[key])]
        found[name] = different
    return found


def test_a_norm_inside_a_product_rounds_once():
    """TE's norm casts its fp32 to FP8 where nobody else reads it, the emulation by way of bf16.

    At scale 1 that moves what rounds to a tie in bf16 and lies on the other side of it: half of one in 16 numbers, each to the neighbour.
    """
    assert run(rounded_once, 1) == [{"farthest": 1, "amax is near": True, "some": True, "few": True}]


def rounded_once(_context: RankContext) -> dict[str, object]:
    mesh, fp8, width = ParallelMesh.single(), Fp8Config(recipe="delayed", amax_history=HISTORY), 256
    norm = fill(RMSNorm(width, eps=1e-6, dtype=torch.bfloat16, backend=BACKEND, tp=mesh.tp))
    x = random("x", BATCH, LENGTH, width).bfloat16()
    rounded, amaxes = [], []
    for backend in (te_backend(mesh, fp8), emulated_backend(mesh, fp8)):
        site = backend.column_linears(width, [Part("q", width, "projection")], tp=mesh.tp, eps=1e-6, gives_normed=False)
        with backend.running():
            [y], _ = site(x, [torch.eye(width, dtype=torch.bfloat16, requires_grad=True)], norm)
        y.sum().backward()
        backend.after_backward(torch.nn.Sequential(site))
        assert torch.equal(y, y.to(torch.float8_e4m3fn).bfloat16()), "a product with 1 is the number in FP8"
        rounded.append(y.detach().to(torch.float8_e4m3fn).view(torch.uint8).int())
        amaxes.append(next(one.tensor.max() for one in site.kept_state() if one.name == "input.history"))
    steps = (rounded[0] - rounded[1]).abs()
    share = float((steps > 0).float().mean())
    near = abs(float(amaxes[0] / amaxes[1]) - 1) <= 2**-8
    return {"farthest": int(steps.max()), "amax is near": near, "some": share > 0, "few": share < 1.2 / 32}


def test_recomputed_blocks_keep_the_same_numbers_and_histories():
    assert run(recomputed, 2) == [[], []]


def recomputed(_context: RankContext) -> list[str]:
    """TE runs a block a second time with the scales of the first, and no amax counts twice."""
    mesh, fp8 = ParallelMesh.build(tp=1, ep=2), Fp8Config(recipe="delayed", amax_history=HISTORY)
    plain, again = (build(FP8_MOE, te_backend(mesh, fp8), mesh, recompute=recompute) for recompute in (False, True))
    different = []
    for number in range(STEPS):
        expected, actual = step(plain, number) | state(plain), step(again, number) | state(again)
        different += [f"step {number}: {key}" for key in expected if not torch.equal(expected[key], actual[key])]
    return different


def test_kept_state_is_all_that_a_resumed_run_needs():
    assert run(resumed, 1) == [{"with": [], "without": True}]


def resumed(_context: RankContext) -> dict[str, object]:
    mesh, fp8 = ParallelMesh.single(), Fp8Config(recipe="delayed", amax_history=HISTORY)
    first, second, fresh = (build(FP8_MOE, te_backend(mesh, fp8), mesh) for _ in range(3))
    for number in range(STEPS):
        step(first, number)
    first(torch.zeros(1, LENGTH, dtype=torch.int64), None)  # with gradients on: then amaxes count
    for site, other in zip(sites(first), sites(second), strict=True):
        for one, target in zip(site.kept_state(), other.kept_state(), strict=True):
            target.tensor.copy_(one.tensor)
    expected, actual, lost = (step(model, STEPS) for model in (first, second, fresh))
    different = [key for key in expected if not torch.equal(expected[key], actual[key])]
    return {"with": different, "without": any(not torch.equal(expected[key], lost[key]) for key in expected)}


def sites(model: LanguageModel) -> list[KeepsState]:
    return [module for module in model.modules() if isinstance(module, KeepsState)]
