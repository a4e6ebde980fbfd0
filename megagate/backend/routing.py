"""From a router's logits to experts and their weights, in plain PyTorch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megagate.backend.base import Chosen
from megagate.config.model import MoEConfig, RouterScore

TINY = torch.finfo(torch.float32).tiny
"""Sigmoid scores may all round to 0; their sum is kept from being a divisor of 0."""

SCORES: Mapping[RouterScore, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}
)
"""Of fp32 logits [..., E]."""


def choose(logits: Tensor, config: MoEConfig, *, bias: Tensor | None) -> Chosen:
    """See `Backend.choose`."""
    scores = SCORES[config.score](logits)
    chosen_by = scores if bias is None else scores + bias
    ids = chosen_by.topk(config.top_k, dim=-1).indices  # [b, s, k]
    probs = scores.gather(-1, ids)
    if config.renormalize:
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(TINY)
    # The balance loss needs a distribution; a softmax is one.
    return Chosen(ids, probs, scores if config.score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp_min(TINY))
