"""The backend in plain PyTorch, for CPUs and GPUs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megagate.backend import routing, rows
from megagate.backend.base import AttentionCore, Chosen, ColumnLinears, GroupedLinear, Norm, Part, Permuted, RowLinear
from megagate.backend.blockwise import causal_attention
from megagate.backend.documents import Documents
from megagate.config.model import MoEConfig
from megagate.config.precision_rules import SIZE_MULTIPLE
from megagate.parallel.comm import enter, leave
from megagate.parallel.mesh import Axis, ParallelMesh

CPU_ROW_MULTIPLE = 32
"""oneDNN compiles a kernel for every row count it has not seen, which dominates a dropless step; multiples of 32 make counts repeat."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_WIDTH_MULTIPLE, FLASH_WIDEST = 8, 256
"""Head widths that PyTorch's flash kernel takes as they are."""


NormFunction = Callable[[Tensor, Tensor, float], Tensor]
"""See `Backend.norm`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Backend.norm`: statistics and product in fp32, one cast at the end."""
    return _RMSNorm.apply(x, weight.float(), eps)


class NativeBackend:
    """See `Backend` for shapes and collectives. Its sites are functions that keep nothing.

    Args:
        device: Where it computes.
        norm: The kernel of norms, where it is not PyTorch's operations.
    """

    def __init__(self, device: torch.device, *, norm: NormFunction = rms_norm):
        self.row_multiple = SIZE_MULTIPLE if device.type == "cuda" else CPU_ROW_MULTIPLE
        self._norm = norm

    def of_layer(self, index: int, num_layers: int) -> "NativeBackend":
        """All blocks are alike."""
        return self

    def column_linears(
        self, width: int, parts: Sequence[Part], *, tp: Axis, eps: float | None = None, gives_normed: bool = True
    ) -> ColumnLinears:
        """One GEMM over the concatenated weights."""
        return partial(_column_linears, tp)

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        """A GEMM of partial sums."""
        return partial(_row_linear, tp)

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """PyTorch's grouped GEMM."""
        return _grouped_linear

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        """PyTorch's scaled dot product attention; of documents its flash kernel of variable length; on a CPU, blocks."""
        return attend

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """By the kernel that it was given."""
        return self._norm(x, weight, eps)

    def choose(self, logits: Tensor, config: MoEConfig, *, bias: Tensor | None) -> Chosen:
        """Scores, top-k, gather."""
        return routing.choose(logits, config, bias=bias)

    def permute(self, x: Tensor, probs: Tensor, ids: Tensor, *, num_experts: int) -> Permuted:
        """A stable sort."""
        return rows.permute(x, probs, ids)

    def unpermute(self, rows_: Tensor, restore: rows.Order) -> Tensor:
        """Sums in the order of each token's choices."""
        return rows.collect(rows_, *restore)

    def running(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def recompute(self, function: Callable[..., Any], *args: Any) -> Any:
        """PyTorch's checkpoint; nothing in a block is random."""
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    def after_backward(self, model: nn.Module) -> None:
        """Nothing to do."""

    def unrecorded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


def _column_linears(tp: Axis, x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
    normed = x if norm is None else norm(x)
    joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    out = F.linear(enter(normed, tp, dim=1), joined)  # [b, s, sum(rows)/tp]
    return list(out.split([w.shape[0] for w in weights], dim=-1)), normed


def _row_linear(tp: Axis, x: Tensor, weight: Tensor) -> Tensor:
    return leave(F.linear(x, weight), tp, dim=1)


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """See `AttentionCore`. PyTorch's own attention; of documents its flash kernel of variable length; on a CPU, blocks.

    That kernel has neither fp32 nor widths of heads that are above 256 or no multiple of 8: documents then go in blocks on a GPU too,
    exact and slow.
    """
    if q.device.type == "cpu":
        return causal_attention(q, k, v, documents)
    if documents is not None:
        flash = flash_takes(q.dtype, q.shape[-1])
        return _varlen_attention(q, k, v, documents) if flash else causal_attention(q, k, v, documents)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [b, heads, s, d]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash_takes(dtype: torch.dtype, width: int) -> bool:
    """Whether PyTorch's flash kernel takes heads of this type and width."""
    return dtype in FLASH_DTYPES and width % FLASH_WIDTH_MULTIPLE == 0 and width <= FLASH_WIDEST


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention within documents, each a sequence of its own to the flash kernel.

    The operator that stands below `torch.nn.attention.varlen`, whose own arguments differ between PyTorch 2.10 (`is_causal`, no grouped
    queries) and 2.12 (`window_size`, `enable_gqa`); those passed here have been the same since 2.2, and it has a gradient.
    """
    rows, length = q.shape[:2]
    borders = documents.cu_seqlens
    # No document is longer than a row: a bound for the kernel's grid, whose excess ends at once, instead of waiting for the true maximum.
    longest = length
    flat = [t.flatten(0, 1) for t in (q, k, v)]  # [b*s, heads, d]
    out = torch.ops.aten._flash_attention_forward(*flat, borders, borders, longest, longest, 0.0, True, False)[0]
    return out.unflatten(0, (rows, length))


class _RMSNorm(Function):
    """x / rms(x) * w, keeping x and one number per row for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        product = grad * normed
        along = (product @ weight).unsqueeze(-1).div_(x.shape[-1])
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), product.flatten(0, -2).sum(0), None
