"""The vocabulary-parallel embedding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from megagate.nn.base import Layer
from megagate.parallel.comm import leave
from megagate.parallel.mesh import Axis


class Embedding(Layer):
    """A row of the table per token.

    Shapes: ids [b, s] int64 -> [b, s/tp, h].
    Parallel: rows are cut over tp; each rank looks up its own ids and the partial results are reduce-scattered over the sequence.
    """

    weight: Tensor

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype, tp: Axis):
        super().__init__(dtype)
        self.tp = tp
        self.add_weight("weight", (rows, width), init="normal", axis=tp)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the tokens."""
        local = ids - self.labels["weight"].shard.offset[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        return leave(rows, self.tp, dim=1)
