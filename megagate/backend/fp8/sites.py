"""The sites of the emulated backend: products in FP8 with the collectives of their layers. See `backend/base.py` for shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megagate.backend.base import Norm
from megagate.backend.fp8.extent import Grouped
from megagate.backend.fp8.operand import Operand
from megagate.backend.fp8.product import Fp8Product
from megagate.parallel.comm import enter, leave
from megagate.parallel.mesh import Axis, ParallelMesh


class Fp8Columns(Fp8Product):
    """Column-parallel products of one input: those in FP8 as one GEMM with one scale, the others as another one.

    Args:
        operands: See `Fp8Product`.
        rounded: Of each part, whether it is in FP8.
        tp: Cuts the weights.
        world: Over which amaxes are reduced.
    """

    def __init__(self, operands: dict[str, Operand], rounded: Sequence[bool], *, tp: Axis, world: Axis):
        super().__init__(operands, reduced=world)
        self.rounded, self.tp = tuple(rounded), tp

    def forward(self, x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
        """See `ColumnLinears`."""
        normed = x if norm is None else norm(x)
        entered = enter(normed, self.tp, dim=1)
        outputs = {}
        for rounded, product in ((True, self.multiply), (False, F.linear)):
            places = [i for i, is_rounded in enumerate(self.rounded) if is_rounded == rounded]
            if not places:
                continue
            chosen = [weights[i] for i in places]
            out = product(entered, chosen[0] if len(chosen) == 1 else torch.cat(chosen))  # [b, s, sum(rows)/tp]
            outputs.update(zip(places, out.split([len(weight) for weight in chosen], dim=-1), strict=True))
        return [outputs[i] for i in range(len(weights))], normed


class Fp8Row(Fp8Product):
    """A row-parallel product: each rank's part in FP8, the sum over ranks in the activations' dtype."""

    def __init__(self, operands: dict[str, Operand], *, tp: Axis, world: Axis):
        super().__init__(operands, reduced=world)
        self.tp = tp

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `RowLinear`."""
        return leave(self.multiply(x, weight), self.tp, dim=1)


class Fp8Grouped(Fp8Product):
    """The products of the experts, each with scales of its own; no block of numbers reaches over two experts.

    Args:
        operands: See `Fp8Product`.
        num_experts: Of all ranks.
        mesh: ep cuts them, edp is where amaxes are reduced.
        granule: The rows of each expert are a multiple of it.
    """

    def __init__(self, operands: dict[str, Operand], *, num_experts: int, mesh: ParallelMesh, granule: int):
        super().__init__(operands, reduced=mesh.edp, experts=(num_experts, mesh.ep))
        self.granule = granule

    def forward(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """See `GroupedLinear`."""
        return self.multiply(x, weight, Grouped(ends, rows=len(x), granule=self.granule))
