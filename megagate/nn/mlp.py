"""The dense SwiGLU block, and SwiGLU itself."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megagate.backend.base import Backend, Norm, Part
from megagate.nn.base import Layer, Weight
from megagate.parallel.mesh import Axis


def swiglu(gate: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times `scale` per row; keeps only its inputs for the backward pass.

    Shapes: gate and up [..., f], scale [..., 1] fp32 or None -> [..., f].
    Source: arXiv 2002.05202, equation 6.
    """
    return _SwiGLU.apply(gate, up, scale)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up, scale):
        ctx.save_for_backward(gate, up, scale)
        out = F.silu(gate).mul_(up)
        return out if scale is None else out.mul_(scale.to(out.dtype))

    @staticmethod
    def backward(ctx, grad):
        gate, up, scale = ctx.saved_tensors
        silu, grad_scale = F.silu(gate), None
        if scale is not None:
            grad_scale = (silu * up).mul_(grad).sum(-1, keepdim=True, dtype=scale.dtype)
            grad = grad * scale.to(grad.dtype)
        return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad), grad_scale


class DenseFFN(Layer):
    """down(silu(gate x) * up x).

    Shapes: [b, s/tp, h] -> [b, s/tp, h].
    Parallel: gate and up are cut by rows, down by columns over tp; all-gather of the sequence before, reduce-scatter after.
    Source: arXiv 2002.05202, equation 6.

    Args:
        hidden_size: Of x.
        ffn_size: Of gate and up, over all ranks.
        dtype: Of the weights.
        backend: Its kernels.
        tp: The tensor axis.
        norm_eps: Of the norm that every call gives; None where calls may give none.
    """

    def __init__(self, hidden_size: int, ffn_size: int, *, dtype: torch.dtype, backend: Backend, tp: Axis, norm_eps: float | None = None):
        super().__init__(dtype)
        self.gate = Weight((ffn_size, hidden_size), dtype, axis=tp)
        self.up = Weight((ffn_size, hidden_size), dtype, axis=tp)
        self.down = Weight((hidden_size, ffn_size), dtype, init="output", axis=tp, dim=1)
        local = ffn_size // tp.size
        parts = [Part("gate", local), Part("up", local)]
        self.project = backend.column_linears(hidden_size, parts, tp=tp, eps=norm_eps, gives_normed=False)
        self.out = backend.row_linear(local, hidden_size, tp=tp)

    def forward(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """Apply the block to x, or, where a norm is given, to the normed x."""
        (gate, up), _ = self.project(x, [self.gate.weight, self.up.weight], norm)
        return self.out(swiglu(gate, up), self.down.weight)
