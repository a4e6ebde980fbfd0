"""Infinities that delayed scaling has met in a step: its casts saturate them, so that no loss and no norm tells of one.

What tells is the amax that a product remembers (`KeepsState`): the newest of a history, its last, in emulated FP8 and in Transformer Engine
alike. One that is not new is not told again: an amax of 0, of an expert without rows, leaves the history as it was.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megagate.backend.base import Kept
from megagate.parallel.comm import gather_objects, maximum
from megagate.parallel.mesh import Axis

HISTORY = ".history"


class SaturationWatch:
    """Looks at the newest amaxes after each micro-step of one optimizer step; the host does not wait for the device until `close`.

    Two things are not told: anything with histories of length 1, which hold but the place of the running micro-step, and the second of two
    infinities one after the other with those of length 2. Told once too often is an expert without rows after two infinities of its own.

    Args:
        kept: What products keep, by name in the order of the model; the same names on every rank. Only histories are looked at.
    """

    def __init__(self, kept: Mapping[str, Kept]):
        self.kept = {name.removesuffix(HISTORY): one for name, one in kept.items() if name.endswith(HISTORY)}
        if self.kept:
            self._newest = self._column(1)
            self._met = torch.zeros_like(self._newest, dtype=torch.bool)

    def look(self) -> None:
        """After a micro-step, its amaxes reduced over ranks."""
        if not self.kept:
            return
        newest, second = self._column(1), self._column(2)
        self._met |= ~newest.isfinite() & (self._newest.isfinite() | ~second.isfinite())
        self._newest = newest

    def close(self, world: Axis) -> str:
        """What was met, as a sentence, the same on all ranks; empty where nothing was. Collective, if anything is kept.

        Parallel: one maximum of a number over the world; experts' amaxes are their ranks' own.
        """
        if not self.kept or not int(maximum(self._met.any().int(), world)):
            return ""
        places = sorted(set().union(*gather_objects(self._places(), world)))
        others = f", and {len(places) - 1} more did" if len(places) > 1 else ""
        return f"{self._told(places[0])} held an infinity{others}"

    def _places(self) -> set["_Place"]:
        met, places = iter(self._met.tolist()), set()
        for index, (name, one) in enumerate(self.kept.items()):
            backward = name.endswith(".grad")
            order = len(self.kept) - index if backward else index
            for row in range(one.tensor[..., 0].numel()):
                if next(met):
                    places.add(_Place(backward, order, one.shard.offset[0] + row if one.tensor.dim() > 1 else -1, name))
        return places

    def _told(self, place: "_Place") -> str:
        site, _, operand = place.name.rpartition(".")
        what = f"the gradient of {site}'s output" if place.backward else f"{site}'s {operand}"
        return what if place.expert < 0 else f"{what} (expert {place.expert})"

    def _column(self, place: int) -> Tensor:
        """[amaxes] of every history, one after the other: at place 1 the newest, at 2 the one before."""
        return torch.cat([one.tensor[..., -min(place, one.tensor.shape[-1])].reshape(-1) for one in self.kept.values()])


class _Place(NamedTuple):
    """An operand; they are ordered as a step computes.

    Args:
        backward: It is a gradient.
        order: In its pass.
        expert: Of all ranks'; -1 where a product has but one scale.
        name: Of the operand: site and input, weight or grad.
    """

    backward: bool
    order: int
    expert: int
    name: str
