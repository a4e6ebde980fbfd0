"""Over which numbers an operand has one scale: all of a matrix, or those of each expert."""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megagate.backend.fp8.quantize import amax


class Extent(Protocol):
    """Where the per-tensor scales of an operand reach; n is 1, or the experts of this rank.

    Args:
        granule: Rows that belong to the same expert, for tiles down a column; None where all do.
    """

    granule: int | None

    def amax(self, x: Tensor) -> Tensor:
        """[n] fp32, largest absolute values; NaN where there is a NaN, 0 of nothing."""
        ...

    def spread(self, scale: Tensor) -> Tensor:
        """[n] -> a shape that broadcasts against the operand."""
        ...

    def together(self, length: int) -> Tensor | None:
        """[rows/granule, length/granule] int64: for each granule those of its tile of `length` rows, the first again where the tile is
        short; None where granules are tiles. No tile reaches over two experts."""
        ...


class Whole:
    """All of a matrix [m, k]."""

    granule = None

    def amax(self, x: Tensor) -> Tensor:
        """[1]."""
        return amax(x.reshape(1, -1))

    def spread(self, scale: Tensor) -> Tensor:
        """As it is."""
        return scale

    def together(self, length: int) -> None:
        """Tiles are just tiles."""


class Stacked:
    """Each expert's matrix of a stack [e, n, k]."""

    granule = None

    def amax(self, x: Tensor) -> Tensor:
        """[e]."""
        return amax(x.flatten(1))

    def spread(self, scale: Tensor) -> Tensor:
        """[e, 1, 1]."""
        return scale[:, None, None]

    def together(self, length: int) -> None:
        """Tiles are of each matrix anyway."""


class Grouped:
    """The rows of each expert in [rows, k]; padding rows are zeros, which never decide a scale.

    Args:
        ends: [e] int32, where each expert's rows end, multiples of `granule`; that of an expert without rows is its predecessor's.
        rows: How many there are; the last of `ends`.
        granule: Divides the length of tiles, or is a multiple of it.
    """

    def __init__(self, ends: Tensor, *, rows: int, granule: int):
        self.ends, self.rows, self.granule = ends, rows, granule

    @cached_property
    def experts(self) -> Tensor:
        """[rows/granule] int64, the expert of each granule."""
        first = torch.arange(0, self.rows, self.granule, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, first, right=True)

    def amax(self, x: Tensor) -> Tensor:
        """[e]; 0 for an expert without rows."""
        if self.rows == 0:
            return torch.zeros(self.ends.shape, device=x.device)
        each = amax(x.reshape(-1, self.granule * x.shape[-1]))
        own = self.experts == torch.arange(len(self.ends), device=x.device)[:, None]  # [e, rows/granule]
        return torch.where(own, each, 0.0).amax(1)

    def spread(self, scale: Tensor) -> Tensor:
        """[rows, 1]."""
        return scale[self.experts].repeat_interleave(self.granule, output_size=self.rows)[:, None]

    def together(self, length: int) -> Tensor | None:
        """Tiles begin where an expert's rows do; its last may be short."""
        if length <= self.granule:
            return None
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])[self.experts] // self.granule
        place = torch.arange(len(self.experts), device=self.ends.device)
        several = length // self.granule
        first = (place - (place - starts) % several)[:, None]
        tile = (first + torch.arange(several, device=self.ends.device)).clamp(max=len(place) - 1)
        return torch.where(self.experts[tile] == self.experts[:, None], tile, first)
