"""Rotary position embedding."""

import torch
from torch import Tensor
from torch.autograd import Function


def rope_table(length: int, head_dim: int, *, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of position * base^(-2i/d) for i < d/2.

    Returns:
        Tensor: [2, length, 1, head_dim/2], fp32.

    Source: arXiv 2104.09864, equation 15.
    """
    wavelengths = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), wavelengths)  # [length, d/2]
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def at_positions(table: Tensor, positions: Tensor) -> Tensor:
    """The table of tokens whose positions are not their places in the row.

    Shapes: table [2, s, 1, d/2], positions [b, s] below s -> [2, b, s, 1, d/2].
    """
    return table[:, positions]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) by their angle, in fp32: the half-split form of Hugging Face's models.

    Shapes: x [b, s, heads, d], table [2, s, 1, d/2], or [2, b, s, 1, d/2] where rows differ -> [b, s, heads, d].
    """
    return _Rotate.apply(x, table)


class _Rotate(Function):
    """A rotation; its adjoint rotates back."""

    @staticmethod
    def forward(ctx, x, table):
        ctx.save_for_backward(table)
        return _turn(x, *table)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors[0]
        return _turn(grad, cos, -sin), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    out = wide * torch.cat([cos, cos], dim=-1)
    left, right = wide.chunk(2, dim=-1)
    out_left, out_right = out.chunk(2, dim=-1)
    out_left.addcmul_(right, sin, value=-1)
    out_right.addcmul_(left, sin)
    return out.to(x.dtype)
