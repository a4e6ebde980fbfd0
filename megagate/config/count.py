"""Parameters and FLOPs of a model, from its config alone."""

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megagate.config.model import ModelConfig

Part = Literal["embedding", "attention", "gate", "router", "experts", "shared_expert", "ffn", "norms", "head"]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by part.

    Args:
        embedding: The embedding matrix.
        attention: The q, k, v and o projections of all layers.
        gate: The attention gates of all layers.
        router: The routers of all layers.
        experts: All experts of all layers.
        active_experts: The experts of all layers that one token passes through.
        shared_expert: The shared experts of all layers.
        ffn: The dense feed-forward blocks of all layers.
        norms: Every RMSNorm.
        head: The output projection; 0 where it is tied to the embedding.
    """

    embedding: int
    attention: int
    gate: int
    router: int
    experts: int
    active_experts: int
    shared_expert: int
    ffn: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.active - self.active_experts + self.experts

    @property
    def active(self) -> int:
        """Parameters that one token uses, the embedding matrix included."""
        attention = self.attention + self.gate
        feed_forward = self.router + self.active_experts + self.shared_expert + self.ffn
        return self.embedding + attention + feed_forward + self.norms + self.head


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The full shape of every parameter that the built model has, by its name, with the vocabulary padded."""
    return {name: shape for _, name, shape in _parameters(model, model.padded_vocab_size)}


def parameter_parts(model: ModelConfig) -> dict[str, Part]:
    """The part that every parameter of the built model belongs to, by its name."""
    return {name: part for part, name, _ in _parameters(model, model.padded_vocab_size)}


def count_parameters(model: ModelConfig, *, padded: bool = False) -> ParameterCount:
    """The parameters of a model.

    Args:
        model: The model.
        padded: Count the rows that pad the vocabulary too: what is held in memory. Reports leave them out.
    """
    counts: dict[Part, int] = dict.fromkeys(typing.get_args(Part), 0)
    for part, _, shape in _parameters(model, model.padded_vocab_size if padded else model.vocab_size):
        counts[part] += math.prod(shape)
    active_experts = counts["experts"] // model.moe.num_experts * model.moe.top_k if model.is_moe else 0
    return ParameterCount(**counts, active_experts=active_experts)


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward per token, the numerator of model FLOPs utilisation.

    Formula:
        6 N + 6 L s n d, with N the parameters of the matrix products that one token passes through (attention, gate, router,
        its top-k experts, the shared expert or the dense FFN, output projection, also a tied one; not the embedding lookup, not norms),
        L layers, s tokens per sequence, n query heads of d channels. A product with a weight costs 2 operations per parameter forward
        and 4 backward. Scores and weighted values cost 4 s n d forward over a whole row, 12 s n d with the backward pass; a
        causal mask needs half of that. Recomputation is not counted, nor the rows that pad the vocabulary.

    Peers:
        PaLM and torchtitan count 6 N + 12 L s n d: masked scores as work too. Their utilisation of the same run reads higher
        by 6 L s n d per token. FlashAttention halves, as here.

    Source:
        arXiv 2204.02311, appendix B; halving: arXiv 2307.08691, section 4.1.
    """
    counts = count_parameters(model)
    head = model.vocab_size * model.hidden_size
    matrices = counts.attention + counts.gate + counts.router + counts.active_experts + counts.shared_expert + counts.ffn + head
    attention = model.num_layers * seq_len * model.attention.num_heads * model.attention.head_dim
    return 6 * matrices + 6 * attention


def _parameters(model: ModelConfig, vocab_rows: int) -> Iterator[tuple[Part, str, tuple[int, ...]]]:
    """Each parameter with its part, name and full shape."""
    hidden = model.hidden_size
    yield "embedding", "embedding.weight", (vocab_rows, hidden)
    for layer in range(model.num_layers):
        prefix = f"layers.{layer}."
        yield "norms", f"{prefix}attention_norm.weight", (hidden,)
        yield from _attention_parameters(model, f"{prefix}attention.")
        yield "norms", f"{prefix}ffn_norm.weight", (hidden,)
        yield from _feed_forward_parameters(model, prefix)
    yield "norms", "final_norm.weight", (hidden,)
    if not model.tie_embeddings:
        yield "head", "head.weight", (vocab_rows, hidden)


def _attention_parameters(model: ModelConfig, prefix: str) -> Iterator[tuple[Part, str, tuple[int, ...]]]:
    attention, hidden = model.attention, model.hidden_size
    query_size = attention.num_heads * attention.head_dim
    kv_size = attention.num_kv_heads * attention.head_dim
    yield "attention", f"{prefix}q.weight", (query_size, hidden)
    yield "attention", f"{prefix}k.weight", (kv_size, hidden)
    yield "attention", f"{prefix}v.weight", (kv_size, hidden)
    yield "attention", f"{prefix}o.weight", (hidden, query_size)
    if attention.qk_norm:
        yield "norms", f"{prefix}q_norm.weight", (attention.head_dim,)
        yield "norms", f"{prefix}k_norm.weight", (attention.head_dim,)
    if attention.gate_rows:
        yield "gate", f"{prefix}gate.weight", (attention.gate_rows, hidden)


def _feed_forward_parameters(model: ModelConfig, prefix: str) -> Iterator[tuple[Part, str, tuple[int, ...]]]:
    hidden = model.hidden_size
    if model.is_moe:
        experts, width = model.moe.num_experts, model.moe.ffn_size
        yield "router", f"{prefix}moe.router.weight", (experts, hidden)
        yield "experts", f"{prefix}moe.experts.gate_up", (experts, 2 * width, hidden)
        yield "experts", f"{prefix}moe.experts.down", (experts, hidden, width)
        part, name, width = "shared_expert", f"{prefix}moe.shared_expert", model.moe.shared_ffn_size
    else:
        part, name, width = "ffn", f"{prefix}ffn", model.ffn_size
    if width:
        yield part, f"{name}.gate.weight", (width, hidden)
        yield part, f"{name}.up.weight", (width, hidden)
        yield part, f"{name}.down.weight", (hidden, width)
