"""Rotary position embedding."""

import torch
from torch import Tensor


def rope_table(length: int, head_dim: int, *, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of position * base^(-2i/d) for i < d/2.

    Returns:
        Tensor: [2, length, 1, head_dim/2], fp32.

    Source: arXiv 2104.09864, equation 15.
    """
    wavelengths = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), wavelengths)  # [length, d/2]
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) by their angle, in fp32: the half-split form of Hugging Face's models.

    Shapes: x [b, s, heads, d], table [2, s, 1, d/2] -> [b, s, heads, d].
    """
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
