"""The hand-written autograd functions: against plain autograd, and by finite differences in fp64."""

import pytest
import torch
from parity.sharded import assert_close, random
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from megagate.backend.rows import collect, spread
from megagate.nn.gate import _Gate
from megagate.nn.mlp import swiglu


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def against_plain(function, plain, *inputs: Tensor, to: float) -> None:
    """Value and every gradient."""
    ours, theirs = leaves(*inputs), leaves(*inputs)
    out, expected = function(*ours), plain(*theirs)
    assert out.dtype == expected.dtype
    assert_close(out, expected, to=to, what="value")
    cotangent = random("cotangent", *out.shape).to(out.dtype)
    grads, expected_grads = torch.autograd.grad(out, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent)
    for index, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        assert grad.dtype == expected_grad.dtype
        assert_close(grad, expected_grad, to=to, what=f"gradient {index}")


@pytest.mark.parametrize("width", [6, 1], ids=["elementwise", "headwise"])
def test_gate_equals_plain_autograd(width):
    y, logits = random("y", 2, 5, 3, 6), 3 * random("logits", 2, 5, 3, width)
    against_plain(_Gate.apply, lambda y, z: y * torch.sigmoid(z), y, logits, to=1e-6)


@pytest.mark.parametrize("width", [64, 1], ids=["elementwise", "headwise"])
def test_gate_scores_are_fp32_under_bf16(width):
    y, logits = random("y", 2, 64, 3, 64).bfloat16(), 3 * random("logits", 2, 64, 3, width).bfloat16()
    exact = (y.double() * logits.double().sigmoid()).bfloat16()
    out = _Gate.apply(y, logits)
    assert out.dtype == torch.bfloat16
    assert (out == exact).double().mean() > 0.995, "one rounding, at the end"
    against_plain(_Gate.apply, lambda y, z: (y.float() * z.float().sigmoid()).to(y.dtype), y, logits, to=1e-2)


@pytest.mark.parametrize("scaled", [False, True])
def test_swiglu_by_finite_differences(scaled):
    gate, up, scale = leaves(2 * random("g", 7, 5).double(), random("u", 7, 5).double(), random("s", 7, 1).double())
    assert gradcheck(swiglu, (gate, up, scale) if scaled else (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_plain_autograd(dtype):
    to = 1e-6 if dtype == torch.float32 else 2e-2
    gate, up, scale = (3 * random("g", 9, 16)).to(dtype), random("u", 9, 16).to(dtype), random("s", 9, 1)
    against_plain(swiglu, lambda g, u: F.silu(g) * u, gate, up, to=to)
    against_plain(swiglu, lambda g, u, s: F.silu(g) * u * s.to(g.dtype), gate, up, scale, to=to)


# Row r of the output is row SOURCE[r] of the input; SLOTS is the same map read the other way.
SOURCE = torch.tensor([2, -1, 0, 3, 3, 1, -1, 0, 2, 1])
SLOTS = torch.tensor([[2, 7], [5, 9], [0, 8], [3, 4]])


def test_spread_and_collect_by_finite_differences():
    (x,), (y,) = leaves(random("x", 4, 3).double()), leaves(random("y", 10, 3).double())
    assert gradcheck(lambda x: spread(x, SOURCE, SLOTS), (x,))
    # Padding rows (source -1) are in no slot, so that their gradient is zero.
    assert gradcheck(lambda y: collect(y, SOURCE, SLOTS), (y,))


def test_spread_and_collect_equal_plain_indexing():
    padding = (SOURCE < 0).unsqueeze(-1)
    against_plain(lambda x: spread(x, SOURCE, SLOTS), lambda x: x[SOURCE].masked_fill(padding, 0), random("x", 4, 3), to=1e-6)
    against_plain(lambda y: collect(y, SOURCE, SLOTS), lambda y: y[SLOTS].sum(1), random("y", 10, 3), to=1e-6)


def test_spread_and_collect_of_no_rows():
    x, slots = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 1, dtype=torch.int64)
    made = spread(x, torch.zeros(0, dtype=torch.int64), slots)
    collected = collect(made, torch.zeros(0, dtype=torch.int64), slots)
    collected.sum().backward()
    assert made.shape == collected.shape == x.grad.shape == (0, 3)
