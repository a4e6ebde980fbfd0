"""The hand-written kernels of the native backend against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F

from megagate.backend.blockwise import BLOCK, causal_attention
from megagate.backend.native import NativeBackend

SHAPES = [(1, 1, 2, 1), (2, 5, 4, 2), (1, BLOCK, 3, 3), (2, BLOCK + 1, 4, 1), (1, 3 * BLOCK - 7, 6, 2)]


def inputs(batch: int, length: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(batch, length, h, 8) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def pytorch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_blockwise_attention_is_attention(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    *qkv, grad = inputs(*shape)
    ours, theirs = causal_attention(*qkv), pytorch_attention(*qkv)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for mine, other in zip(torch.autograd.grad(ours, qkv, grad), torch.autograd.grad(theirs, qkv, grad), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_blockwise_attention_in_bf16_rounds_no_more_than_pytorch_does() -> None:
    torch.manual_seed(0)
    *qkv, grad = inputs(2, 3 * BLOCK, 4, 2)
    exact = [pytorch_attention(*qkv), *torch.autograd.grad(pytorch_attention(*qkv), qkv, grad)]
    low = [t.detach().bfloat16().requires_grad_() for t in qkv]

    def errors(attention) -> list[float]:
        out = attention(*low)
        found = [out, *torch.autograd.grad(out, low, grad.bfloat16())]
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    for ours, theirs in zip(errors(causal_attention), errors(pytorch_attention), strict=True):
        assert 0 < ours < 1.2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backend = NativeBackend(torch.device("cpu"))
    x, weight, grad = torch.randn(3, 5, 32).to(dtype), torch.rand(32) + 0.5, torch.randn(3, 5, 32).to(dtype)
    x.requires_grad_(), weight.requires_grad_()
    ours = backend.norm(x, weight, 1e-3)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    theirs = F.rms_norm(wide, (32,), wide_weight, 1e-3)
    to = 1e-6 if dtype == torch.float32 else 2**-8
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=to, atol=to)
    found = torch.autograd.grad(ours, [x, weight], grad)
    wanted = torch.autograd.grad(theirs, [wide, wide_weight], grad.double())
    for mine, other, limit in zip(found, wanted, (to, 1e-5), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=limit, atol=limit)
