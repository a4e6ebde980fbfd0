"""What only a GPU with Transformer Engine can show: that its kernels compute what the backend takes them for. None of this has run yet."""

from dataclasses import replace

import pytest
import torch
from parity.sharded import assert_close, random
from torch import Tensor

from megagate.backend.base import Backend, KeepsState
from megagate.backend.build import build_backend
from megagate.config.hardware import hardware_rules
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import Fp8Config, PrecisionConfig, RunConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.init import read_hardware
from megagate.parallel.mesh import ParallelMesh
from megagate.verify.routes import pin_routes

pytestmark = pytest.mark.gpu
MODEL = ModelConfig(
    vocab_size=500,
    hidden_size=256,
    num_layers=2,
    ffn_size=256,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, gate=GateConfig("G1")),
    moe=MoEConfig(num_experts=40, top_k=2, ffn_size=128, first_dense_layers=1),
)
DENSE = replace(MODEL, moe=MoEConfig())
EOD, BATCH, LENGTH, REACHED = 7, 2, 32, 36
"""Pinned, the tokens of a micro-batch reach the first so many experts (`verify/routes.py`); the others are idle."""
STEPS = 3
SCALES_NEAR = 1.25
"""Of a product's scales under TE and emulated: their amaxes are of numbers that other products have rounded."""


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def backend(name: str, **fp8) -> Backend:
    """Skipped where the GPU, its CUDA or the package do not do."""
    precision = PrecisionConfig(dtype="bf16", backend=name, fp8=Fp8Config(**fp8))
    if lacks := list(hardware_rules(RunConfig(model=MODEL, precision=precision), read_hardware(gpu()))):
        pytest.skip(f"needs what is not here: {lacks[0]}")
    return build_backend(precision, device=gpu(), mesh=ParallelMesh.single())


def trained(
    kernels: Backend, config: ModelConfig, *, dtype=torch.bfloat16, eod_id=None, length: int = 128, steps: int = 1, **options
) -> LanguageModel:
    """With the gradients of the last of some micro-steps; delayed scaling's first scales are 1. Routes are pinned: rounding flips none."""
    mesh = ParallelMesh.single()
    model = LanguageModel(config, dtype=dtype, backend=kernels, mesh=mesh, eod_id=eod_id, **options)
    model.initialize(seed=1, device=gpu())
    pin_routes(model, mesh)
    tokens = torch.randint(0, 500, (BATCH, length + 1), generator=torch.Generator().manual_seed(7)).to(gpu())
    tokens[:, ::50] = EOD
    for _ in range(steps):
        model.zero_grad()
        (model(tokens[:, :-1], tokens[:, 1:]).ce_sum / (BATCH * length)).backward()
        kernels.after_backward(model)
    return model


def gradients(*args, **kwargs) -> dict[str, Tensor]:
    """Of `trained`; those of experts one by one."""
    found = {}
    for name, parameter in trained(*args, **kwargs).named_parameters():
        of_experts = parameter.dim() == 3
        parts = parameter.grad.float().unbind(0) if of_experts else [parameter.grad.float()]
        found |= {f"{name}[{i}]" if of_experts else name: part for i, part in enumerate(parts)}
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Relative; of what is zero in both, zero."""
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) if a[name].any() or b[name].any() else 0.0 for name in b}


@pytest.mark.parametrize("eod_id", [None, EOD])
def test_bf16_differs_from_native_by_its_rounding(eod_id):
    ours, native = (gradients(backend(name), DENSE, eod_id=eod_id) for name in ("te", "native"))
    own = distance(native, gradients(backend("native"), DENSE, eod_id=eod_id, dtype=torch.float32))
    for name, found in distance(ours, native).items():
        assert found < 2 * own[name], name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
def test_fp8_is_as_far_from_bf16_as_its_emulation(recipe, recompute):
    kernels = backend("te", recipe=recipe), backend("native", recipe=recipe, emulate=True)
    exact = gradients(backend("native"), DENSE, recompute=recompute)
    real, emulated = (distance(gradients(one, DENSE, recompute=recompute, steps=STEPS), exact) for one in kernels)
    for name, found in real.items():
        assert 0.5 * emulated[name] < found < 2 * emulated[name], name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
def test_experts_in_fp8_are_as_far_from_bf16_as_their_emulation(recipe, recompute):
    """Each expert on its own: few rows, padded, with a scale of its own, and none at all for the last ones, whose gradient is zero."""
    kernels = backend("te", recipe=recipe), backend("native", recipe=recipe, emulate=True)
    how = {"length": LENGTH, "recompute": recompute}
    exact = gradients(backend("native"), MODEL, **how)
    real, emulated = (gradients(one, MODEL, steps=STEPS, **how) for one in kernels)
    idle = {name for name, gradient in exact.items() if not gradient.any()}
    assert idle == {name for name in exact if name.endswith("]") and int(name[:-1].rpartition("[")[2]) >= REACHED}
    assert all(not real[name].any() for name in idle), "an expert without rows has a gradient"
    real, emulated = distance(real, exact), distance(emulated, exact)
    for name in set(exact) - idle:
        assert 0.5 * emulated[name] < real[name] < 2 * emulated[name], name


def test_scales_of_delayed_scaling_are_those_of_the_emulation():
    """Of weights but for the last bit, of each expert; of inputs and gradients nearly, and at their start where an expert got nothing."""
    kernels = backend("te", recipe="delayed"), backend("native", recipe="delayed", emulate=True)
    real, emulated = (scales(trained(one, MODEL, length=LENGTH, steps=STEPS)) for one in kernels)
    assert list(real) == list(emulated)
    for name, scale in real.items():
        near = 1 + 2**-22 if name.endswith("weight.scale") else SCALES_NEAR
        ratio = scale / emulated[name]
        assert ((1 / near <= ratio) & (ratio <= near)).all(), name
        if len(scale) > 1 and not name.endswith("weight.scale"):
            assert (scale[REACHED:] == 1).all() and (scale[:REACHED] != 1).all(), name


def scales(model: LanguageModel) -> dict[str, Tensor]:
    """By site and tensor: one, or one for each expert."""
    sites = [(name, site) for name, site in model.named_modules() if isinstance(site, KeepsState)]
    return {f"{name}.{one.name}": one.tensor.clone() for name, site in sites for one in site.kept_state() if one.name.endswith("scale")}


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
