"""Switch heads: a key or value projection as a mixture of projections."""

import torch
from torch import Tensor, nn

from megagate.config.model import ModelConfig
from megagate.nn.base import Layer, Weight
from megagate.nn.heads import local_heads
from megagate.parallel.mesh import Axis


class SwitchHeads(Layer):
    """sum over the k best e of sigmoid(x r_e) (x W_e), for each token and head; W_0 is the attention's own projection.

    All n projections ride in the GEMM of q, k and v with the router: per head and token another k are chosen, so that nothing is saved by
    leaving some out. With n = 1 it is the headwise gate at G2 (value) or G3 (key).

    Shapes: first and each of `others` [b, s, g/tp, d], logits [b, s, g/tp * n] -> [b, s, g/tp, d].
    Parallel: cut over tp by heads, or replicated like the attention's own projection; no collective of its own.
    Source: arXiv 2312.07987, equations 7-9, with full projections and a router per head; arXiv 2505.06708, Table 6.
    """

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, tp: Axis, kv_axis: Axis | None):
        super().__init__(dtype)
        attention, self.config = model.attention, model.attention.switch
        self.heads, self.tp, self.axis = attention.num_kv_heads, tp, kv_axis
        rows, hidden = attention.num_kv_heads * attention.head_dim, model.hidden_size
        self.router = Weight((self.heads * self.config.num_experts, hidden), dtype, axis=kv_axis)
        self.experts = nn.ModuleList(Weight((rows, hidden), dtype, axis=kv_axis) for _ in range(self.config.num_experts - 1))

    def local_weights(self) -> list[Tensor]:
        """What rides: the router, then all projections but the first."""
        return [local_heads(one.weight, self.heads, cut=self.axis, tp=self.tp) for one in (self.router, *self.experts)]

    def forward(self, first: Tensor, logits: Tensor, *others: Tensor) -> Tensor:
        """Choose and sum, in fp32."""
        shaped = self.ranking(first, logits)
        scores = shaped.sigmoid()
        if self.config.top_k < self.config.num_experts:
            chosen = shaped.topk(self.config.top_k, dim=-1).indices
            scores = scores * torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        each = torch.stack([first, *(other.view_as(first) for other in others)], dim=-2)  # [b, s, g/tp, n, d]
        return (each * scores.unsqueeze(-1)).sum(-2).to(first.dtype)

    def ranking(self, first: Tensor, logits: Tensor, *others: Tensor) -> Tensor:
        """What projections are chosen by, [b, s, g/tp, n] fp32."""
        return logits.view(*first.shape[:-1], -1).float()
