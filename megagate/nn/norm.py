"""RMSNorm."""

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.nn.base import Layer
from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis


class RMSNorm(Layer):
    """x / rms(x) * w, with fp32 statistics.

    Shapes: [..., width] -> [..., width].
    Parallel: the weight is replicated over tp but used on sharded activations, so its gradient is summed over tp (in fp32).
    Source: arXiv 1910.07467, equation 4.
    """

    weight: Tensor

    def __init__(self, width: int, *, eps: float, dtype: torch.dtype, backend: Backend, tp: Axis):
        super().__init__(dtype)
        self.eps, self.backend, self.tp = eps, backend, tp
        self.add_weight("weight", (width,), init="ones")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return self.backend.norm(x, enter(self.weight.float(), self.tp), self.eps)
