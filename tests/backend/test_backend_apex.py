"""apex without a GPU: every call fits its signatures, and its real Python, where PYTHONPATH has a checkout, does what we take it to do."""

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest
import torch
from backend.make_apex_signatures import OUT
from engine.fused import GroupCounted, books, multi_tensor_adam, packages, replaced
from parity.sharded import assert_close
from signatures import Misfit, bind_calls, signature
from torch import Tensor, nn
from torch.nn import functional as F

from megagate.backend import apex
from megagate.backend.build import build_backend
from megagate.backend.native import NativeBackend, rms_norm
from megagate.config.run import OptimConfig, PrecisionConfig
from megagate.engine import zero
from megagate.engine.optim import build_implementation
from megagate.errors import ConfigError
from megagate.parallel.mesh import ParallelMesh

ENTRIES = json.loads(OUT.read_text(encoding="utf-8"))["entries"]
SIGNATURES = {name: signature(entry["call"]) for name, entry in ENTRIES.items()}


def test_every_call_fits():
    found = bind_calls(inspect.getsource(apex), package="apex", signatures=SIGNATURES)
    assert sorted(found) == sorted(SIGNATURES), "a signature that nobody needs, or a call that is made twice"
    adam = ENTRIES["apex.optimizers.FusedAdam"]
    assert adam["bases"] == ["torch.optim.Optimizer"], "whose hooks tell it how many steps there were"
    for method in ("step", "zero_grad"):  # what engines call without arguments
        signature(adam["methods"][method]).bind()


def test_deepspeeds_fits():
    """Its own class, which is installed."""
    from deepspeed.ops.adam import FusedAdam

    names = {"deepspeed.ops.adam.FusedAdam": inspect.signature(FusedAdam)}
    source = "from deepspeed.ops.adam import FusedAdam\n" + inspect.getsource(zero._fused_adam)
    assert bind_calls(source, package="deepspeed", signatures=names) == list(names)
    assert issubclass(FusedAdam, torch.optim.Optimizer)


BAD = {
    "from apex.optimizers import FusedAdam\nFusedAdam(p, learning_rate=1)": "line 2: apex.optimizers.FusedAdam: got an unexpected keyword",
    "from apex.optimizers import FusedAdam\nFusedAdam(lr=1)": "missing a required argument: 'params'",
    "from apex.optimizers import FusedAdam as A\nA(*args)": "stars hide",
    "from apex.optimizers import FusedAdam\nf(FusedAdam)": "line 2: FusedAdam is used without being called",
    "from apex.optimizers import FusedSGD\nFusedSGD(p)": "apex.optimizers.FusedSGD is not among the signatures",
    "import apex.optimizers": "import names of apex by `from`",
}


@pytest.mark.parametrize("source", BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_refused(source):
    with pytest.raises(Misfit) as caught:
        bind_calls(source, package="apex", signatures=SIGNATURES)
    assert BAD[source] in str(caught.value)


def test_norms_without_a_gpu_are_refused():
    message = r"precision.norm \(apex\) needs a CUDA GPU, and PyTorch finds none here; set precision.norm to native"
    with pytest.raises(ConfigError, match=message):
        build_backend(PrecisionConfig(norm="apex"), device=torch.device("cpu"), mesh=ParallelMesh.single())


# ---- its real Python around kernels in PyTorch


class CpuTorch(ModuleType):
    """torch for one module of apex, whose flag on the GPU lies on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, data: Any, *, device: str, **how: Any) -> Tensor:
        assert device == "cuda"
        return torch.tensor(data, **how)


def rms_forward_affine_mixed_dtypes(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As csrc/layer_norm_cuda.cpp has it: the result in the weight's dtype, 1 / rms of each row in fp32."""
    assert x.is_contiguous() and tuple(shape) == x.shape[-1:]
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return weight * (x.float() * scale).to(weight.dtype), scale.flatten()


def rms_backward_affine(
    grad: Tensor, scale: Tensor, x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float, memory_efficient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients in the dtypes of x and weight; its kernel reads `grad` in that of the weight."""
    assert grad.dtype == weight.dtype and grad.is_contiguous() and x.is_contiguous() and weight.is_contiguous() and not memory_efficient
    scale = scale.view(*x.shape[:-1], 1)
    normed, along = x.float() * scale, grad.float() * weight
    grad_x = scale * (along - normed * (along * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)


@pytest.fixture
def real_apex() -> Iterator[None]:
    """A checkout that PYTHONPATH names."""
    if importlib.util.find_spec("apex") is None:
        pytest.skip("no checkout of NVIDIA's apex on PYTHONPATH")
    kernels = {"multi_tensor_adam": torch.no_grad()(multi_tensor_adam), "multi_tensor_adam_capturable": None}
    norms = {"rms_forward_affine_mixed_dtypes": rms_forward_affine_mixed_dtypes, "rms_backward_affine": rms_backward_affine}
    _forget_apex()  # DeepSpeed imports it where it can, without kernels
    with ExitStack() as stack:
        compiled = {"amp_C": {**kernels, "multi_tensor_adam_capturable_master": None}, "fused_layer_norm_cuda": norms}
        stack.enter_context(packages(compiled))
        adam = importlib.import_module("apex.optimizers.fused_adam")
        stack.enter_context(replaced(vars(adam), "torch", CpuTorch("torch")))
        yield
    _forget_apex()


def _forget_apex() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_the_stand_in_keeps_the_books_of_the_real_one(real_apex):
    from apex.optimizers import FusedAdam

    found, stand_in = books(FusedAdam), books(GroupCounted)
    assert [counts for counts, _, _ in found] == [counts for counts, _, _ in stand_in] == [[1, 1], [2, 2], [3, 2], [4, 3], [5, 4]]
    torch.testing.assert_close([rest for _, *rest in found], [rest for _, *rest in stand_in], rtol=0, atol=0)


def test_the_real_one_is_told_the_count_and_steps_as_torch_does(real_apex):
    """From a state that was loaded after seven steps, and over a skipped one, at which it counts a call."""
    ends = []
    for implementation in ("apex", "torch"):
        config, parameter, steps = OptimConfig(implementation=implementation, lr=0.1), nn.Parameter(torch.tensor([1.0, -2.0])), [7]
        group = [{"params": [parameter], "weight_decay": 0.1}]
        optimizer = build_implementation(group, config, applied_steps=lambda steps=steps: steps[-1], deepspeed_adam=zero._fused_adam)
        moments = {"exp_avg": torch.tensor([0.5, -0.1]), "exp_avg_sq": torch.tensor([0.25, 0.01])}
        optimizer.state[parameter] = moments if implementation == "apex" else {"step": torch.tensor(7.0), **moments}
        for gradient in ([1.0, 2.0], None, [0.3, -1.0]):
            parameter.grad = torch.tensor(gradient) if gradient else None
            optimizer.step()
            steps.append(steps[-1] + (gradient is not None))
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_through_the_real_one(real_apex, dtype):
    norms_agree(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_by_a_function_of_its_form(dtype):
    """Where apex is not there."""

    def stand_in(input: Tensor, weight: Tensor, normalized_shape: tuple[int, ...], eps: float = 1e-6) -> Tensor:
        return F.rms_norm(input.float(), normalized_shape, eps=eps).to(weight.dtype) * weight

    above = {"apex": {}, "apex.normalization": {}}
    with packages(above | {"apex.normalization.fused_layer_norm": {"mixed_dtype_fused_rms_norm_affine": stand_in}}):
        norms_agree(dtype)


def norms_agree(dtype: torch.dtype) -> None:
    """Forward and backward as our own; the weight and its gradient stay fp32, and what comes back is in the dtype of x."""
    draw = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(2, 5, 24, generator=draw).to(dtype).transpose(0, 1) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(24, generator=draw)
    found, wanted = [], []
    for norm, kept in ((apex.rms_norm, found), (rms_norm, wanted)):
        x_, weight_ = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = NativeBackend(torch.device("cpu"), norm=norm).norm(x_, weight_, 1e-2)
        kept += [out.detach(), *torch.autograd.grad(out, (x_, weight_), grad)]
    assert [one.dtype for one in found] == [dtype, dtype, torch.float32] == [one.dtype for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, to=2e-6 if one.dtype == torch.float32 else 4e-3)
