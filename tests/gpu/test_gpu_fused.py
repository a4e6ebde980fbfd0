"""What fused optimizers and norms compute on a GPU, where their kernels run for the first time. Skipped without one; the README says so."""

import pytest
import torch
from torch import nn

from megagate.backend import apex
from megagate.backend.native import rms_norm
from megagate.config.run import OptimConfig
from megagate.engine import zero
from megagate.engine.optim import build_implementation, fresh_state
from megagate.errors import MegagateError

pytestmark = pytest.mark.gpu
SIZES = [(1,), (31,), (64, 65), (3, 50_021)]
"""Of tensors smaller and larger than a kernel's chunk of 65,536 numbers, and of odd sizes."""
APPLIED = 7


def skip_where_refused(refusal: MegagateError) -> None:
    """A package is an option of the user's."""
    pytest.skip(f"needs what is not here: {refusal}")


@pytest.mark.parametrize("implementation", ["apex", "te", "deepspeed"])
def test_a_fused_optimizer_makes_the_steps_of_pytorch(implementation: str) -> None:
    """Resumed after seven steps, three more."""
    gpu, config = torch.device("cuda"), OptimConfig(implementation=implementation, lr=1e-2)
    try:
        zero.require_optimizer(config, gpu)
    except MegagateError as refusal:
        skip_where_refused(refusal)
    ends = []
    for one in (implementation, "torch"):
        config, draw, steps = OptimConfig(implementation=one, lr=1e-2), torch.Generator(device=gpu).manual_seed(5), [APPLIED]
        parameters = [nn.Parameter(torch.randn(size, device=gpu, generator=draw)) for size in SIZES]
        groups = [{"params": parameters[:2], "weight_decay": 0.0}, {"params": parameters[2:], "weight_decay": 0.1}]
        optimizer = build_implementation(groups, config, applied_steps=lambda steps=steps: steps[-1], deepspeed_adam=zero._fused_adam)
        for parameter in parameters:
            state = fresh_state(parameter, config, applied_steps=APPLIED)
            state["exp_avg"].normal_(generator=draw)
            state["exp_avg_sq"].normal_(generator=draw).square_()
            optimizer.state[parameter] = state
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, device=gpu, generator=draw)
            optimizer.step()
            steps.append(steps[-1] + 1)
        ends.append([parameter.detach() for parameter in parameters] + [optimizer.state[p]["exp_avg_sq"] for p in parameters])
    for found, wanted in zip(*ends, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 2048])
def test_norms_of_apex_are_ours(dtype: torch.dtype, width: int) -> None:
    try:
        apex.require("precision.norm", kernels=apex.NORM_KERNELS, otherwise="native")
    except MegagateError as refusal:
        skip_where_refused(refusal)
    draw = torch.Generator(device="cuda").manual_seed(3)
    x, grad = (torch.randn(2, 33, 4, width, device="cuda", generator=draw).to(dtype).transpose(0, 1) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(width, device="cuda", generator=draw)
    ends = []
    for norm in (apex.rms_norm, rms_norm):
        x_, weight_ = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = norm(x_, weight_, 1e-5)
        ends.append([out.detach(), *torch.autograd.grad(out, (x_, weight_), grad)])
    for found, wanted in zip(*ends, strict=True):
        assert found.dtype == wanted.dtype
        off = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert off <= (1e-5 if found.dtype == torch.float32 else 8e-3)
