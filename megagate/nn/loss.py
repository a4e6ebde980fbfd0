"""Vocabulary-parallel cross-entropy that never holds the logits of a whole micro-batch."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megagate.data.loader import IGNORE_INDEX
from megagate.parallel.comm import enter, maximum, total
from megagate.parallel.mesh import Axis

CHUNK_TOKENS = 1024
"""Rows whose fp32 logits exist at the same time."""


def cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, tp: Axis) -> Tensor:
    """Sum over all targets of -log softmax(x W^T)[label], in nats.

    Shapes: x [b, s/tp, h], weight [V/tp, h], labels [b, s] int64 (IGNORE_INDEX has no target) -> scalar fp32, equal on all tp ranks.
    Parallel: all-gather of the sequence forward, reduce-scatter backward; per chunk a maximum of [tokens] and a sum of [tokens + 1] over
        tp. The gradient of x and W is formed in the forward pass, chunk by chunk.

    Args:
        x: Final hidden states.
        weight: This rank's rows of the output projection.
        labels: Target tokens.
        vocab_size: Rows from here on are padding and take no part.
        tp: The tensor-parallel axis.

    Source: arXiv 1909.08053, section 3.
    """
    return _CrossEntropy.apply(enter(x, tp, dim=1).flatten(0, 1), weight, labels.flatten(), vocab_size, tp)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, labels, vocab_size, tp):
        first = tp.rank * weight.shape[0]
        real = max(0, min(weight.shape[0], vocab_size - first))  # rows of this rank that are not padding
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        loss = x.new_zeros((), dtype=torch.float32)
        for start in range(0, x.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            part, grad_logits = _chunk(x[rows], weight[:real], labels[rows] - first, labels[rows] != IGNORE_INDEX, tp)
            loss += part
            if needs_grad:
                grad_logits = grad_logits.to(x.dtype)
                grad_x[rows] = grad_logits @ weight[:real]
                grad_weight[:real] += grad_logits.t() @ x[rows]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, (grad_weight * grad).to(ctx.weight_dtype), None, None, None


def _chunk(x: Tensor, weight: Tensor, local: Tensor, counted: Tensor, tp: Axis) -> tuple[Tensor, Tensor]:
    """Loss sum of some tokens and the gradient of their local logits, [tokens, V/tp] fp32."""
    logits = F.linear(x, weight).float()
    peak = logits.new_full(local.shape, -torch.inf) if logits.shape[1] == 0 else logits.amax(-1)
    logits -= maximum(peak, tp).unsqueeze(-1)
    mine = (local >= 0) & (local < logits.shape[1])  # IGNORE_INDEX is negative on every rank
    index = local.where(mine, 0).unsqueeze(-1)
    target = logits.new_zeros(()) if logits.shape[1] == 0 else (logits.gather(1, index).squeeze(-1) * mine).sum()
    exps = logits.exp_()
    # A target's logit is on one rank and only the sum of all is needed: one number per chunk travels, not one per token.
    sums, target = total(torch.cat([exps.sum(-1), target.view(1)]), tp).split([len(local), 1])
    probs = exps.div_(sums.unsqueeze(-1))
    if logits.shape[1]:
        probs.scatter_add_(1, index, -mine.unsqueeze(-1).to(probs.dtype))
    probs *= counted.unsqueeze(-1)
    return (sums.log() * counted).sum() - target.squeeze(), probs
