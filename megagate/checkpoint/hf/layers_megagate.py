"""The layers of a gated-attention language model of megagate, in plain PyTorch, for Hugging Face transformers 4.53 to 5.

In the order of the forward pass: norms and rotary positions, the gate, switch heads, attention, SwiGLU, the router and its experts. Weights
may have any type; statistics of norms, rotations, gates, softmaxes and routers are computed in fp32.

Shapes: `b s h` batch, sequence, hidden; `n g d` query heads, key/value heads, channels of a head; `T` tokens; `E k` experts, chosen ones.

Part of the Python package megagate (megagate/checkpoint/hf), whose tools/convert_checkpoint.py puts it beside the weights that it writes.
SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_megagate import MegagateConfig

TINY = torch.finfo(torch.float32).tiny
"""Sigmoid scores may all round to 0; their sum is kept from being a divisor of 0."""


# Norms and rotary positions


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class MegagateRMSNorm(nn.Module):
    """x / rms(x) * w, in fp32, rounded once (arXiv 1910.07467, equation 4). The weight is w itself, not 1 + w."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return (unit_rms(x, self.eps) * self.weight.float()).to(x.dtype)


def rope_base(config: MegagateConfig) -> float:
    """Base of the geometric series of wavelengths.

    Raises:
        ValueError: Positions are to be scaled, or the base stands in the configuration twice with two values.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or getattr(config, "rope_scaling", None) not in (None, rope):
        raise ValueError(f"rope_parameters ({rope}) must be of rope_type default, as in training; leave rope_parameters as it was")
    if rope["rope_theta"] != config.rope_theta:
        raise ValueError(f"rope_theta ({config.rope_theta}) must equal rope_parameters.rope_theta ({rope['rope_theta']}); change both")
    return rope["rope_theta"]


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base^(-2i/d) for i < d/2 (arXiv 2104.09864, equation 15).

    Shapes: positions [b or 1, s] -> two of [b or 1, s, 1, d/2], fp32. Nothing is kept: a model on the meta device has no table to fill.
    """
    wavelengths = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = (positions.unsqueeze(-1).float() * wavelengths).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs (i, i + d/2) of x [b, s, heads, d] by their angles."""
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


# The gate


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "identity": lambda logits: logits,
        "ns_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
    }
)


class MegagateGate(nn.Module):
    """Y' = Y * act(S) or Y + act(S) (arXiv 2505.06708, equation 5 and section 2.2).

    Y: the attention output of each head (G1), the value (G2), key (G3) or query projection (G4), or the output projection's result (G5).
    S: `input`, X W with X the normed input of the attention block; `parameter`, the weight itself. One score per channel, or per head where
    headwise; `head_shared` scores are averaged over heads. Without a weight: `constant`, Y' = constant * Y; `self`, Y' = act(Y).

    Shapes: y [b, s, heads, d], at G5 [b, s, h]; x [b, s, h] -> like y.
    """

    def __init__(self, config: MegagateConfig):
        super().__init__()
        self.settings, self.eps = config.megagate["model"]["attention"]["gate"], config.rms_norm_eps
        heads = config.num_key_value_heads if self.settings["position"] in ("G2", "G3") else config.num_attention_heads
        width = config.head_dim if self.settings["granularity"] == "elementwise" else 1
        if self.settings["position"] == "G5":
            heads, width = 1, config.hidden_size
        if self.settings["score"] == "input":
            self.weight = nn.Parameter(torch.empty(heads * width, config.hidden_size))
        elif self.settings["score"] == "parameter":
            self.weight = nn.Parameter(torch.zeros(heads, width))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Gate y."""
        match self.settings["score"]:
            case "constant":
                return y * self.settings["constant"]
            case "self":
                return self._activated(y.float()).to(y.dtype)
            case "input":
                logits = F.linear(x, self.weight).view(*y.shape[:-1], -1)
            case "parameter":
                logits = self.weight  # [heads, d or 1]
        scores = self._activated(logits.float())
        if self.settings["head_shared"]:
            scores = scores.mean(-2, keepdim=True)
        gated = y + scores if self.settings["combine"] == "add" else y * scores
        return gated.to(y.dtype)

    def _activated(self, values: Tensor) -> Tensor:
        if self.settings["activation"] == "rmsnorm":
            return unit_rms(values, self.eps)
        return ACTIVATIONS[self.settings["activation"]](values)


# Switch heads


class MegagateSwitchHeads(nn.Module):
    """sum over the k best e of sigmoid(x r_e) (x W_e), for each token and head; W_0 is the attention's own projection.

    Shapes: x [b, s, h], first = x W_0 [b, s, g, d] -> [b, s, g, d].
    Source: arXiv 2312.07987, equations 7-9; arXiv 2505.06708, Table 6.
    """

    def __init__(self, config: MegagateConfig):
        super().__init__()
        switch = config.megagate["model"]["attention"]["switch"]
        self.num_experts, self.top_k = switch["num_experts"], switch["top_k"]
        rows = config.num_key_value_heads * config.head_dim
        self.router = nn.Linear(config.hidden_size, config.num_key_value_heads * self.num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, rows, bias=False) for _ in range(self.num_experts - 1))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """Choose and sum."""
        logits = self.router(x).view(*first.shape[:-1], -1).float()  # [b, s, g, n]
        scores = logits.sigmoid()
        if self.top_k < self.num_experts:
            chosen = logits.topk(self.top_k, dim=-1).indices
            scores = scores * torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        each = torch.stack([first, *(expert(x).view_as(first) for expert in self.experts)], dim=-2)  # [b, s, g, n, d]
        return (each * scores.unsqueeze(-1)).sum(-2).to(first.dtype)


# Attention


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, **unused: Any
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + mask) v with the softmax's weights, which the other implementations do not show.

    Shapes: query [b, n, s, d], key and value [b, g, keys, d], mask [b, 1, s, keys] -> [b, s, n, d], [b, n, s, keys].
    """
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class MegagateAttention(nn.Module):
    """Causal attention of n query heads over g key/value heads, gated at one of five places.

    Shapes: x [b, s, h] (normed) -> [b, s, h], and the softmax's weights [b, n, s, keys] with eager attention, else None.
    """

    def __init__(self, config: MegagateConfig, layer_idx: int):
        super().__init__()
        model = config.megagate["model"]["attention"]
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        # Names that transformers' attention functions read.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = config.head_dim**-0.5, True

        q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_rows, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_rows, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_rows, bias=False)
        self.o_proj = nn.Linear(q_rows, config.hidden_size, bias=False)
        self.k_switch = MegagateSwitchHeads(config) if model["switch"]["projections"] == "kv" else None
        self.v_switch = MegagateSwitchHeads(config) if model["switch"]["projections"] in ("v", "kv") else None
        self.gate_position = model["gate"]["position"]
        self.gate = MegagateGate(config) if self.gate_position != "none" else None
        self.q_norm = MegagateRMSNorm(config.head_dim, config.rms_norm_eps) if model["qk_norm"] else None
        self.k_norm = MegagateRMSNorm(config.head_dim, config.rms_norm_eps) if model["qk_norm"] else None

    def forward(
        self, x: Tensor, *, rope: tuple[Tensor, Tensor], attention_mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Project, gate, norm, rotate, attend, gate, project, gate."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        k = k if self.k_switch is None else self.k_switch(x, k)
        v = v if self.v_switch is None else self.v_switch(x, v)
        q, k, v = self._gated("G4", q, x), self._gated("G3", k, x), self._gated("G2", v, x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))  # [b, heads, s, d]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        chosen = self.config._attn_implementation
        attend = eager_attention if chosen == "eager" else ALL_ATTENTION_FUNCTIONS[chosen]
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)  # [b, s, n, d]
        y = self._gated("G1", y, x)
        return self._gated("G5", self.o_proj(y.flatten(2)), x), weights

    def _gated(self, position: str, y: Tensor, x: Tensor) -> Tensor:
        """y, gated if the gate is here."""
        return self.gate(y, x) if self.gate_position == position else y


# Feed-forward: SwiGLU, router, experts


class MegagateMLP(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202, equation 6). Shapes: [..., h] -> [..., h], weights [..., 1]."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Apply the block; `weights` multiply each row."""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner if weights is None else inner * weights.to(inner.dtype))


def full_precision_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32, under autocast too."""
    with nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class Routed(NamedTuple):
    """Where tokens go: logits [T, E] fp32, ids [T, k], weights [T, k] fp32."""

    logits: Tensor
    ids: Tensor
    weights: Tensor


class MegagateRouter(nn.Module):
    """The k experts with the largest score (plus bias, where there is one), weighted by the scores alone, renormalised if so trained.

    The bias is `bias_update_rate * bias_steps`: a whole number of moves, which no cast of a model changes.

    Source: arXiv 2101.03961, equation 1; sigmoid scores: arXiv 2412.19437, equations 13-15; bias: arXiv 2408.15664, algorithm 1.
    """

    def __init__(self, config: MegagateConfig):
        super().__init__()
        moe = config.megagate["model"]["moe"]
        self.num_experts, self.top_k, self.renormalize = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
        self.score, self.rate = moe["score"], moe["bias_update_rate"]
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if self.rate:
            self.register_buffer("bias_steps", torch.zeros(config.num_experts, dtype=torch.int32))

    def forward(self, x: Tensor) -> Routed:
        """Route tokens x [T, h]."""
        logits = full_precision_linear(x, self.weight)
        scores, ids = self._choose(logits)
        weights = scores.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(TINY)
        return Routed(logits, ids, weights)

    def balance_loss(self, logits: Tensor, counted: Tensor | None) -> Tensor:
        """E * sum_e f_e P_e, 1 when perfectly balanced: f the share of rows that an expert gets, P its mean share of the scores.

        Shapes: logits [T, E], counted [T] (0 for padding) or None -> scalar.
        Source: arXiv 2101.03961, equation 4.
        """
        counted = torch.ones_like(logits[:, 0]) if counted is None else counted.to(logits)
        scores, ids = self._choose(logits)
        shares = scores / scores.sum(-1, keepdim=True).clamp_min(TINY)
        rows = torch.zeros_like(logits).scatter_(-1, ids, 1.0)
        frequency, mean_share = counted @ rows, counted @ shares
        return self.num_experts * (frequency / frequency.sum() * mean_share / counted.sum()).sum()

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [T, E] and the ids [T, k] of the best."""
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        chosen_by = scores + self.rate * self.bias_steps.float() if self.rate else scores
        return scores, chosen_by.topk(self.top_k, dim=-1).indices


class MegagateTokenGate(nn.Module):
    """y * sigmoid(x w), one score per token, in fp32. Shapes: y and x [b, s, h] -> [b, s, h]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Gate y."""
        return (y * full_precision_linear(x, self.weight).sigmoid()).to(y.dtype)


class MegagateMoE(nn.Module):
    """The weighted sum of each token's k experts, and of the shared expert, where there is one, with or without a gate sigmoid(x w).

    Shapes: x [b, s, h] -> [b, s, h], and the router's logits [T, E].
    Source: arXiv 2101.03961, equation 2; shared expert: arXiv 2401.06066, section 3.2.
    """

    def __init__(self, config: MegagateConfig):
        super().__init__()
        moe = config.megagate["model"]["moe"]
        self.gate = MegagateRouter(config)
        self.experts = nn.ModuleList(MegagateMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts))
        width = config.shared_expert_intermediate_size
        self.shared_expert = MegagateMLP(config.hidden_size, width) if width else None
        self.shared_expert_gate = MegagateTokenGate(config.hidden_size) if moe["shared_gate"] else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the block."""
        tokens = x.flatten(0, 1)  # [T, h]
        routed = self.gate(tokens)
        out = self._experts(tokens, routed).view_as(x)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            out = out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(shared, x))
        return out, routed.logits

    def _experts(self, tokens: Tensor, routed: Routed) -> Tensor:
        """Rows are sorted by expert; only experts that have rows run. One wait for the device: the host must know how many each has."""
        order = routed.ids.flatten().argsort(stable=True)  # rows, k of each token
        counts = torch.bincount(routed.ids.flatten(), minlength=len(self.experts)).tolist()
        weights = routed.weights.flatten().unsqueeze(-1)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for expert, rows in zip(self.experts, order.split(counts), strict=True):
            if len(rows):
                token = rows // routed.ids.shape[1]
                out.index_add_(0, token, expert(tokens[token], weights[rows]).float())
        return out.to(tokens.dtype)
