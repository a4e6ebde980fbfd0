"""One operand of a product in FP8, by recipe: how its bytes and scales come about."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megagate.backend.fp8.extent import Extent
from megagate.backend.fp8.quantize import BLOCK, E4M3, E5M2, MX_BLOCK, Quantized, Tile, by_tiles, delayed_update, scale_of, with_scale
from megagate.config.run import Fp8Recipe

OPERANDS = ("input", "weight", "grad")


class Operand(Protocol):
    """The input, the weight or the output's gradient of a product."""

    def __call__(self, x: Tensor, extent: Extent, *, columns: bool, record: bool) -> tuple[Quantized, Quantized | None]:
        """x for products over its last dimension, and, if asked for, over the one before; per-tensor scales serve both.

        Args:
            x: [..., m, k].
            extent: Where per-tensor scales reach.
            columns: The second is needed, too.
            record: Remember the amax for the scale to come.
        """
        ...


@dataclass(frozen=True)
class Current:
    """One scale, of the tensor's own amax."""

    fp8: torch.dtype

    def __call__(self, x: Tensor, extent: Extent, *, columns: bool, record: bool) -> tuple[Quantized, Quantized | None]:
        """See `Operand`."""
        made = with_scale(x, extent.spread(scale_of(extent.amax(x), self.fp8)), self.fp8)
        return made, made


class Delayed:
    """One scale, of the amaxes of earlier micro-steps; 1 in the first, in which gradients of the order of 1 / tokens vanish.

    The smallest number of e5m2 is 2^-16 = 1.5e-5, so that the first micro-step of millions of tokens gives almost no gradient, as with
    Transformer Engine. Amaxes are recorded before rounding: each micro-step brings the scales of one product more, back from the residual
    stream, and the third has the gradients of all.

    Args:
        fp8: The format.
        count: 1, or the experts of this rank.
        length: Micro-steps that are remembered.
        device: Where.
        unit: What comes is so many times the tensor whose amax and scale are kept.
    """

    def __init__(self, fp8: torch.dtype, *, count: int, length: int, device: torch.device, unit: int = 1):
        self.fp8, self.unit = fp8, unit
        self.history = torch.zeros(count, length, device=device)
        self.scale = torch.ones(count, device=device)
        self.amax = torch.zeros(count, device=device)

    def __call__(self, x: Tensor, extent: Extent, *, columns: bool, record: bool) -> tuple[Quantized, Quantized | None]:
        """See `Operand`."""
        if record:
            self.amax = torch.maximum(self.amax, extent.amax(x) / self.unit)
        made = with_scale(x, extent.spread(self.scale / self.unit), self.fp8)
        return made, made

    def update(self, amax: Tensor) -> None:
        """Close the micro-step with its amax [count] over all ranks."""
        history, scale = delayed_update(self.history, self.scale, amax, self.fp8)
        self.history.copy_(history)
        self.scale.copy_(scale)
        self.amax = torch.zeros_like(self.amax)


@dataclass(frozen=True)
class Blocks:
    """One scale for each block of numbers.

    Args:
        along: Tiles for products over the last dimension.
        down: Tiles for products over the one before.
        mx: MXFP8's exponents.
    """

    along: Tile
    down: Tile
    mx: bool = False

    def __call__(self, x: Tensor, extent: Extent, *, columns: bool, record: bool) -> tuple[Quantized, Quantized | None]:
        """See `Operand`."""
        first = by_tiles(x, self.along, mx=self.mx)
        if not columns or self.down == self.along:
            return first, first
        length, together = self.down[0], extent.together(self.down[0])
        rows = length if together is None else extent.granule
        return first, by_tiles(x, (rows, self.down[1]), mx=self.mx, together=together)


def operands(recipe: Fp8Recipe, *, count: int, length: int, device: torch.device, unit: int) -> dict[str, Operand]:
    """The three of a product: input, weight, gradient.

    Args:
        recipe: Any but `none`.
        count: Scales of a tensor: 1, or the experts of this rank.
        length: Of delayed scaling's history.
        device: Of its state.
        unit: The backward pass carries so many times the gradient.
    """
    formats = dict(zip(OPERANDS, (E4M3, E4M3, E5M2), strict=True))  # of per-tensor scales: gradients need range more than digits
    if recipe == "delayed":
        state = {"count": count, "length": length, "device": device}
        return {name: Delayed(fp8, **state, unit=unit if name == "grad" else 1) for name, fp8 in formats.items()}
    if recipe == "current":
        return {name: Current(fp8) for name, fp8 in formats.items()}
    block, mx = (BLOCK, False) if recipe == "blockwise" else (MX_BLOCK, True)
    made = {name: Blocks((1, block), (block, 1), mx) for name in OPERANDS}
    if recipe == "blockwise":
        made["weight"] = Blocks((block, block), (block, block))
    return made
