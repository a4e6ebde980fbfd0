"""What only a GPU with Transformer Engine can show: that its kernels compute what the backend takes them for. None of this has run yet."""

from dataclasses import replace

import pytest
import torch
from parity.sharded import assert_close, random
from te.te_ranks import needs_te
from torch import Tensor

from megagate.backend.base import Backend
from megagate.backend.build import build_backend
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import Fp8Config, PrecisionConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

pytestmark = [pytest.mark.gpu, needs_te]
MODEL = ModelConfig(
    vocab_size=500,
    hidden_size=256,
    num_layers=2,
    ffn_size=256,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, gate=GateConfig("G1")),
    moe=MoEConfig(num_experts=8, top_k=2, ffn_size=128, first_dense_layers=1),
)
DENSE = replace(MODEL, moe=MoEConfig())  # no routes that a rounding flips
EOD = 7


def backend(name: str, **fp8) -> Backend:
    precision = PrecisionConfig(dtype="bf16", backend=name, fp8=Fp8Config(**fp8))
    return build_backend(precision, device=torch.device("cuda"), mesh=ParallelMesh.single())


def gradients(kernels: Backend, config: ModelConfig, *, dtype=torch.bfloat16, eod_id=None, steps: int = 1, **options) -> dict[str, Tensor]:
    """Of the last of some micro-steps; delayed scaling's first scales are 1."""
    model = LanguageModel(config, dtype=dtype, backend=kernels, mesh=ParallelMesh.single(), eod_id=eod_id, **options)
    model.initialize(seed=1, device=torch.device("cuda"))
    tokens = torch.randint(0, 500, (2, 129), generator=torch.Generator().manual_seed(7)).cuda()
    tokens[:, ::50] = EOD
    for _ in range(steps):
        model.zero_grad()
        (model(tokens[:, :-1], tokens[:, 1:]).ce_sum / 256).backward()
        kernels.after_backward(model)
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in b}


@pytest.mark.parametrize("eod_id", [None, EOD])
def test_bf16_differs_from_native_by_its_rounding(eod_id):
    ours, native = (gradients(backend(name), DENSE, eod_id=eod_id) for name in ("te", "native"))
    own = distance(native, gradients(backend("native"), DENSE, eod_id=eod_id, dtype=torch.float32))
    for name, found in distance(ours, native).items():
        assert found < 2 * own[name], name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_fp8_is_as_far_from_bf16_as_its_emulation(recipe, recompute):
    exact = gradients(backend("native"), DENSE, recompute=recompute)
    real = distance(gradients(backend("te", recipe=recipe), DENSE, recompute=recompute, steps=3), exact)
    emulated = distance(gradients(backend("native", recipe=recipe, emulate=True), DENSE, recompute=recompute, steps=3), exact)
    for name, found in real.items():
        assert 0.5 * emulated[name] < found < 2 * emulated[name], name


def test_a_mixture_runs_in_fp8():
    assert all(grad.isfinite().all() for grad in gradients(backend("te", recipe="delayed"), MODEL, steps=3).values())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_is_the_native_one(score, renormalize):
    config = MoEConfig(num_experts=8, top_k=3, score=score, renormalize=renormalize)
    found = []
    for kernels in (backend("te"), backend("native")):
        logits, x = random("logits", 2, 64, 8).cuda().requires_grad_(), random("x", 128, 64).cuda().requires_grad_()
        chosen = kernels.choose(logits, config, bias=None)
        rows = kernels.permute(x, chosen.probs.flatten(0, 1), chosen.ids.flatten(0, 1), num_experts=8)
        back = kernels.unpermute(rows.x * rows.probs, rows.restore)
        (back.square().sum() + (chosen.shares * random("weights", 2, 64, 8).cuda()).sum()).backward()
        found.append({"rows": rows.x.detach(), "back": back.detach(), "logits": logits.grad, "x": x.grad})
    for name, ours in found[0].items():
        assert_close(ours, found[1][name], to=1e-5, what=name)
