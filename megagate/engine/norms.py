"""Norms of the gradient by part of the model."""

import math
import typing

import torch
from torch import Tensor

from megagate.config.count import Part, parameter_parts
from megagate.config.run import RunConfig
from megagate.engine.fragment import Fragment
from megagate.engine.optim import clipping
from megagate.parallel.comm import total
from megagate.parallel.mesh import Axis


class PartNorms:
    """Sums the squares of one step's gradients, as the optimizer is given them, each element on one rank; makes no copy."""

    def __init__(self, config: RunConfig):
        self.limit = config.optim.grad_clip
        self._part_of = parameter_parts(config.model)
        held = set(self._part_of.values())
        self.parts: list[Part] = [part for part in typing.get_args(Part) if part in held]
        self._places: list[int] = []
        self._norms: list[Tensor] = []  # scalars fp64, of each gradient that was added

    def add(self, fragment: Fragment) -> None:
        """Add a fragment's clipped gradient, unless other ranks hold the same and one of them adds it."""
        if fragment.owned:
            self._places.append(self.parts.index(self._part_of[fragment.name]))
            self._norms.append(torch.linalg.vector_norm(fragment.grad, dtype=torch.float64))

    def close(self, world: Axis, *, grad_norm: float, applied: bool, device: torch.device) -> dict[Part, float]:
        """The norms before clipping, by part. Collective.

        Args:
            world: All ranks; together they have added the whole gradient.
            grad_norm: Of the whole, before clipping.
            applied: Whether the step was made; where it was not, nothing is known of its parts, and all are nan.
            device: Of this rank.
        """
        squares = [0.0] * len(self.parts)  # added up here, in one order: atomic additions on a GPU have none
        for place, norm in zip(self._places, torch.stack(self._norms).tolist() if self._norms else [], strict=True):
            squares[place] += norm**2
        found = total(torch.tensor(squares, dtype=torch.float64, device=device), world).sqrt().tolist()
        divisor = clipping(grad_norm, self.limit) if applied else math.nan
        return {part: norm * divisor for part, norm in zip(self.parts, found, strict=True)}
