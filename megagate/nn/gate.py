"""The attention gate: every variant is one value of `GateConfig` and one branch here."""

import torch
from torch import Tensor
from torch.autograd import Function

from megagate.config.model import AttentionConfig
from megagate.nn.base import Weight
from megagate.parallel.mesh import Axis


class AttentionGate(Weight):
    """Y' = Y * sigmoid(X W), X the normed input of the attention block; its logits ride in the GEMM of q, k and v.

    Shapes: y [b, s, n/tp, d], logits [b, s, n/tp * d] (elementwise) or [b, s, n/tp] (headwise) -> [b, s, n/tp, d].
    Parallel: the weight is cut by heads over tp, like the query's; no collective of its own.
    Source: arXiv 2505.06708, equation 5.
    """

    def __init__(self, config: AttentionConfig, hidden_size: int, *, dtype: torch.dtype, tp: Axis):
        super().__init__((config.gate_rows, hidden_size), dtype, axis=tp)

    def forward(self, y: Tensor, logits: Tensor) -> Tensor:
        """Scale the attention output by its scores, computed in fp32."""
        return _Gate.apply(y, logits.view(*y.shape[:-1], -1))


class _Gate(Function):
    """y * sigmoid(logits), keeping only its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx, y, logits):
        ctx.save_for_backward(y, logits)
        return (y * logits.float().sigmoid()).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, logits = ctx.saved_tensors
        score = logits.float().sigmoid()
        slope = grad * y * (score * (1 - score))
        if logits.shape[-1] == 1:
            slope = slope.sum(-1, keepdim=True)
        return (grad * score).to(y.dtype), slope.to(logits.dtype)
