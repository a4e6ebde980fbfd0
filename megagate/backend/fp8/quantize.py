"""Numbers to FP8 and back, as Transformer Engine 2.20.2 does it, on any device.

Bytes and scales equal its reference quantisers bit for bit (`tests/backend/golden`). Where its CUDA kernels differ from those, by reading,
this file goes with the references but for the last:

- a block or tensor with an infinity: the references give scale 0, so that everything in it comes back as NaN; the kernels take scale 1 and
  the infinity becomes the largest number, silently;
- NaN: the kernels look past it for the largest value, the references do not: of a tensor everything becomes NaN, of a block with a scale
  that is a power of two its own element alone (the scale is then 1/2);
- delayed scaling's kernel divides, the rule in Python multiplies by a reciprocal: a last bit of a scale. Here it is the kernel's quotient,
  since nobody's GPU runs the other.

A cast saturates, as on a GPU: PyTorch's own makes infinity of what is too large for e5m2. NaN stays NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megagate.config.precision_rules import MX_SIZE_MULTIPLE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP32_MAX = torch.finfo(torch.float32).max
BLOCK, MX_BLOCK = 128, MX_SIZE_MULTIPLE
MANTISSA_BITS, EXPONENT_BIAS = 23, 127
LARGEST_EXPONENT = 2 * EXPONENT_BIAS
TWO_TO_MINUS_127 = 0x00400000
"""The bits of 2^-127, which is denormal in fp32."""

Tile = tuple[int, int]


class Quantized(NamedTuple):
    """A matrix, or a stack of them, in FP8.

    Args:
        data: [..., m, k], e4m3 or e5m2.
        inverse: fp32, what the bytes are multiplied by. With `tile` (r, c): [..., ceil(m/r), ceil(k/c)], one for each tile of r x c
            elements (the last ones may be cut short); without: any shape that broadcasts against `data`.
        tile: Rows and columns that share a scale; None where `inverse` broadcasts.
    """

    data: Tensor
    inverse: Tensor
    tile: Tile | None = None

    def dequantize(self) -> Tensor:
        """[..., m, k] in fp32."""
        wide = self.data.float()
        if self.tile is None:
            return wide.mul_(self.inverse)
        tiles = to_tiles(wide, self.tile)
        return from_tiles(tiles * _over_tiles(self.inverse), self.data.shape)


def largest(fp8: torch.dtype) -> float:
    """The largest finite number of a format: 448 for e4m3, 57344 for e5m2."""
    return torch.finfo(fp8).max


def saturate(x: Tensor, fp8: torch.dtype) -> Tensor:
    """The nearest numbers of a format (ties to even); what is larger than its largest becomes that, NaN stays."""
    return x.clamp(-largest(fp8), largest(fp8)).to(fp8)


def amax(x: Tensor) -> Tensor:
    """The largest absolute value of each row, [n, m] -> fp32 [n]; 0 of none, NaN where there is a NaN."""
    if x.numel() == 0:
        return torch.zeros(len(x), device=x.device)
    low, high = torch.aminmax(x.detach(), dim=1)
    return torch.maximum(-low, high).float()


def scale_of(amax: Tensor, fp8: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """largest / amax, or the power of two below it: 1 for amax 0, 0 for infinity; fp32's largest number (or power) where it overflows."""
    scale = torch.div(largest(fp8), amax)  # not `/`, which multiplies by a reciprocal
    scale = scale.masked_fill(scale == torch.inf, FP32_MAX)
    if power_of_two:
        # frexp has its mantissa in [1/2, 1). Of NaN it gives exponent 0, as the references' does: scale 1/2.
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1).masked_fill(amax == torch.inf, 0.0)
    return scale.masked_fill(amax == 0, 1.0)


def with_scale(x: Tensor, scale: Tensor, fp8: torch.dtype) -> Quantized:
    """By a scale known beforehand (delayed scaling) or just measured (current scaling).

    Args:
        x: [..., m, k].
        scale: fp32, of any shape that broadcasts against `x`.
        fp8: The format.
    """
    return Quantized(saturate(x.float() * scale, fp8), scale.reciprocal())


def by_tiles(x: Tensor, tile: Tile, fp8: torch.dtype = E4M3, *, mx: bool = False, together: Tensor | None = None) -> Quantized:
    """One scale, a power of two, for each tile: (1, 128), (128, 1) or (128, 128) in block scaling, (1, 32) or (32, 1) in MXFP8.

    Shapes: x [..., m, k] -> data [..., m, k], inverse [..., ceil(m/r), ceil(k/c)].
    Source: MXFP8: OCP Microscaling Formats 1.0, with the exponent rounded up so that nothing saturates.

    Args:
        x: The numbers.
        tile: Its rows and columns.
        fp8: The format.
        mx: The scale of MXFP8, else that of block scaling.
        together: [m/r, t] int64: for each row of tiles those that it shares its scales with, itself among them. Only of a matrix.
    """
    tiles = to_tiles(x.float(), tile)
    high = (tiles.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) if mx else tiles).abs().amax((-3, -1))  # [..., M, K]
    if together is not None:
        high = high[together].amax(1)
    if mx:
        exponent = mx_exponent(high, fp8)
        scaled, inverse = tiles * _over_tiles(_power_of_two(LARGEST_EXPONENT - exponent)), _power_of_two(exponent)
        # Numbers fit by their exponent; infinities saturate. A NaN loses its sign, as C++ and GPUs cast it.
        data = scaled.nan_to_num_(nan=torch.nan, posinf=largest(fp8), neginf=-largest(fp8)).to(fp8)
    else:
        scale = scale_of(high, fp8, power_of_two=True)
        data, inverse = saturate(tiles * _over_tiles(scale), fp8), scale.reciprocal()
    return Quantized(from_tiles(data, x.shape), inverse, tile)


def mx_exponent(amax: Tensor, fp8: torch.dtype) -> Tensor:
    """The biased exponent of the power of two not below amax / largest: int32, from 0 (also for amax 0) to 254 (also for infinity)."""
    bits = (amax * (1.0 / largest(fp8))).view(torch.int32)
    exponent, mantissa = bits >> MANTISSA_BITS, bits & ((1 << MANTISSA_BITS) - 1)
    # Exponent 0 means 2^-127 here, which denormal numbers up to 2^-127 fit into.
    up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= TWO_TO_MINUS_127))
    return (exponent + up).clamp(max=LARGEST_EXPONENT)


def delayed_update(history: Tensor, scale: Tensor, amax: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """Delayed scaling's rule at the end of a micro-step: the scale of the next one, largest / max(history).

    An amax of 0 (no rows, or a step without gradient) leaves history and scale as they are, as the fused kernel does. A largest amax that
    is infinite or NaN keeps the scale until it has left the history; a scale that overflows becomes the largest number of fp32. So does
    the rule in Python; the fused kernel's `fmaxf` looks past NaN in the history, to the largest of the other amaxes
    (common/recipe/delayed_scaling.cu, kernel_bulk).

    Shapes: history [..., length], as Transformer Engine keeps it: 0 first (its place for the running micro-step), then from the oldest to
        the newest; scale and amax [...]. All fp32. -> history, scale.
    """
    rolled = torch.cat([history[..., 1:], amax.unsqueeze(-1)], dim=-1)
    high = rolled.amax(-1)
    new = torch.div(largest(fp8), high).clamp(max=FP32_MAX)
    scale = torch.where((amax != 0) & (high > 0) & high.isfinite(), new, scale)
    rolled[..., 0] = 0.0
    return torch.where((amax != 0).unsqueeze(-1), rolled, history), scale


def to_tiles(x: Tensor, tile: Tile) -> Tensor:
    """[..., m, k] -> [..., ceil(m/r), r, ceil(k/c), c], with zeros where the last tiles are cut short."""
    (rows, columns), (high, wide) = tile, x.shape[-2:]
    if high % rows or wide % columns:
        x = F.pad(x, (0, -wide % columns, 0, -high % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def from_tiles(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_tiles`."""
    whole = tiles.flatten(-2).flatten(-3, -2)
    return whole if whole.shape == shape else whole[..., : shape[-2], : shape[-1]].contiguous()


def _over_tiles(scale: Tensor) -> Tensor:
    """[..., M, K] -> [..., M, 1, K, 1]."""
    return scale[..., :, None, :, None]


def _power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127) in fp32, from 0 to 254."""
    return torch.where(biased == 0, TWO_TO_MINUS_127, biased << MANTISSA_BITS).to(torch.int32).view(torch.float32)
