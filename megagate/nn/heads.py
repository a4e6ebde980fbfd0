"""Weights that belong to attention heads: which rows this rank uses."""

from torch import Tensor

from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis


def local_heads(weight: Tensor, heads: int, *, cut: Axis | None, tp: Axis) -> Tensor:
    """The rows of this rank's heads.

    Where there are more tp ranks than heads the weight is whole on every rank (`cut` None), its gradient is summed over tp, and each rank
    uses one head, as several others do.

    Shapes: weight [heads * rows, ...], of this rank where it is cut -> [heads/tp * rows, ...], at least one head.

    Args:
        weight: The parameter.
        heads: Heads of the full weight.
        cut: The axis that cuts it; None where it is replicated.
        tp: The tensor axis.
    """
    if cut is not None:
        return weight
    whole = enter(weight.float(), tp).to(weight.dtype)
    rows = whole.shape[0] // heads
    return whole.narrow(0, tp.rank * heads // tp.size * rows, rows)
