"""Parameters, FLOPs and cache of a model, from its config alone."""

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

from megagate.config.model import ModelConfig

Part = Literal["embedding", "attention", "switch", "gate", "router", "experts", "shared_expert", "ffn", "norms", "head"]
"""`switch`: what switch heads have beyond one projection each, their routers included."""

FFN_MULTIPLE = 16
"""Widths of narrowed feed-forward blocks are multiples of this."""


class Parameter(NamedTuple):
    """One parameter of the built model.

    Args:
        part: What it belongs to.
        name: Full name.
        shape: Full shape.
        share: The share of it that one token passes through, k of n where experts are chosen.
        is_matrix: Tokens are multiplied by it.
    """

    part: Part
    name: str
    shape: tuple[int, ...]
    share: Fraction = Fraction(1)
    is_matrix: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Args:
        parts: All of them, by part; 0 where the model has none.
        active_parts: Those that one token passes through, the embedding matrix included, by part.
    """

    parts: Mapping[Part, int]
    active_parts: Mapping[Part, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses, the embedding matrix included."""
        return sum(self.active_parts.values())


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The full shape of every parameter that the built model has, by its name, with the vocabulary padded."""
    return {parameter.name: parameter.shape for parameter in parameters(model, padded=True)}


def parameter_parts(model: ModelConfig) -> dict[str, Part]:
    """The part that every parameter of the built model belongs to, by its name."""
    return {parameter.name: parameter.part for parameter in parameters(model, padded=True)}


def count_parameters(model: ModelConfig, *, padded: bool = False) -> ParameterCount:
    """The parameters of a model.

    Args:
        model: The model.
        padded: Count the rows that pad the vocabulary too: what is held in memory. Reports leave them out.
    """
    parts: dict[Part, Fraction] = dict.fromkeys(typing.get_args(Part), Fraction(0))
    active = dict(parts)
    for parameter in parameters(model, padded=padded):
        parts[parameter.part] += parameter.size
        active[parameter.part] += parameter.size * parameter.share
    return ParameterCount({part: int(n) for part, n in parts.items()}, {part: int(n) for part, n in active.items()})


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward per token, the numerator of model FLOPs utilisation.

    Formula:
        6 N + 6 L s n d, with N the parameters of the matrix products that one token passes through (attention, gate, router,
        its top-k experts, the shared expert or the dense FFN, output projection, also a tied one; not the embedding lookup, not norms),
        L layers, s tokens per sequence (of documents within it: the mean length of the document that a token lies in), n query heads of d
        channels. A product with a weight costs 2 operations per parameter forward
        and 4 backward. Scores and weighted values cost 4 s n d forward over a whole row, 12 s n d with the backward pass; a
        causal mask needs half of that. Recomputation is not counted, nor the rows that pad the vocabulary, nor projections that switch
        heads compute and do not choose.

    Peers:
        PaLM and torchtitan count 6 N + 12 L s n d: masked scores as work too. Their utilisation of the same run reads higher
        by 6 L s n d per token. FlashAttention halves, as here.

    Source:
        arXiv 2204.02311, appendix B; halving: arXiv 2307.08691, section 4.1.
    """
    matrices = sum(p.size * p.share for p in parameters(model, padded=False) if p.is_matrix)
    if model.tie_embeddings:
        matrices += model.vocab_size * model.hidden_size
    attention = model.num_layers * seq_len * model.attention.num_heads * model.attention.head_dim
    return int(6 * matrices) + 6 * attention


def kv_cache_bytes_per_token(model: ModelConfig, *, element_bytes: int = 2) -> int:
    """Bytes of keys and values that generation keeps per token of context: 2 L g d elements; bf16 by default."""
    return 2 * model.num_layers * model.attention.num_kv_heads * model.attention.head_dim * element_bytes


def narrowed_ffn_size(model: ModelConfig, baseline: ModelConfig) -> int:
    """The width of the dense feed-forward blocks, a multiple of 16, with which `model` has nearest to as many parameters as `baseline`.

    Raises:
        ValueError: One of them is a mixture of experts, or what `model` adds leaves no feed-forward.
    """
    if model.is_moe or baseline.is_moe:
        raise ValueError("only dense models are narrowed: a mixture's gate is added to it")
    per_unit = 3 * model.hidden_size * model.num_layers * FFN_MULTIPLE
    rest, wanted = count_parameters(replace(model, ffn_size=0)).total, count_parameters(baseline).total
    width = FFN_MULTIPLE * round(Fraction(wanted - rest, per_unit))
    if width < FFN_MULTIPLE:
        raise ValueError(f"nothing is left of the feed-forward: without it the model has {rest} parameters, its baseline {wanted} with it")
    return width


def parameters(model: ModelConfig, *, padded: bool) -> Iterator[Parameter]:
    """Each parameter of the model.

    Args:
        model: The model.
        padded: With the rows that pad the vocabulary.
    """
    hidden, rows = model.hidden_size, model.padded_vocab_size if padded else model.vocab_size
    yield Parameter("embedding", "embedding.weight", (rows, hidden), is_matrix=False)
    for layer in range(model.num_layers):
        prefix = f"layers.{layer}."
        for norm in ("attention_norm", "ffn_norm", *(("attention_out_norm", "ffn_out_norm") if model.sandwich_norm else ())):
            yield _norm(f"{prefix}{norm}", hidden)
        yield from _attention_parameters(model, f"{prefix}attention.")
        if model.is_moe_layer(layer):
            yield from _moe_parameters(model, f"{prefix}moe.")
        else:
            yield from _ffn_parameters("ffn", f"{prefix}ffn", hidden, model.ffn_size)
    yield _norm("final_norm", hidden)
    if not model.tie_embeddings:
        yield Parameter("head", "head.weight", (rows, hidden))


def is_replicated(model: ModelConfig, parameter: Parameter, *, tp: int) -> bool:
    """Whether each of `tp` tensor-parallel ranks holds the whole of a parameter and sums its gradient; not for experts."""
    gate, name = model.attention.gate, parameter.name
    if parameter.part in ("norms", "router") or name.endswith("shared_gate.weight"):
        return True
    of_kv_heads = parameter.part == "switch" or name.endswith(("attention.k.weight", "attention.v.weight"))
    if parameter.part == "gate":
        of_kv_heads = gate.of_kv_heads
    return (of_kv_heads and tp > model.attention.num_kv_heads) or (parameter.part == "gate" and gate.position == "G5")


def _norm(name: str, width: int) -> Parameter:
    return Parameter("norms", f"{name}.weight", (width,), is_matrix=False)


def _attention_parameters(model: ModelConfig, prefix: str) -> Iterator[Parameter]:
    attention, hidden = model.attention, model.hidden_size
    query_size = attention.num_heads * attention.head_dim
    kv_size = attention.num_kv_heads * attention.head_dim
    switch = attention.switch
    # One of the k that a token chooses counts as its ordinary projection, so that k of n is a whole number in both parts.
    others = switch.num_experts - 1
    share = Fraction(switch.top_k - 1, max(1, others))
    yield Parameter("attention", f"{prefix}q.weight", (query_size, hidden))
    for kind in ("k", "v"):
        yield Parameter("attention", f"{prefix}{kind}.weight", (kv_size, hidden))
    yield Parameter("attention", f"{prefix}o.weight", (hidden, query_size))
    for kind in switch.switched:
        yield Parameter("switch", f"{prefix}{kind}_switch.router.weight", (attention.num_kv_heads * switch.num_experts, hidden))
        for expert in range(others):
            yield Parameter("switch", f"{prefix}{kind}_switch.experts.{expert}.weight", (kv_size, hidden), share)
    if attention.qk_norm:
        yield _norm(f"{prefix}q_norm", attention.head_dim)
        yield _norm(f"{prefix}k_norm", attention.head_dim)
    if model.gate_shape:
        yield Parameter("gate", f"{prefix}gate.weight", model.gate_shape, is_matrix=attention.gate.score == "input")


def _moe_parameters(model: ModelConfig, prefix: str) -> Iterator[Parameter]:
    moe, hidden = model.moe, model.hidden_size
    share = Fraction(moe.top_k, moe.num_experts)
    yield Parameter("router", f"{prefix}router.weight", (moe.num_experts, hidden))
    yield Parameter("experts", f"{prefix}experts.gate_up", (moe.num_experts, 2 * moe.ffn_size, hidden), share)
    yield Parameter("experts", f"{prefix}experts.down", (moe.num_experts, hidden, moe.ffn_size), share)
    yield from _ffn_parameters("shared_expert", f"{prefix}shared_expert", hidden, moe.shared_ffn_size)
    if moe.shared_gate:
        yield Parameter("shared_expert", f"{prefix}shared_gate.weight", (1, hidden))


def _ffn_parameters(part: Part, name: str, hidden: int, width: int) -> Iterator[Parameter]:
    if width:
        yield Parameter(part, f"{name}.gate.weight", (width, hidden))
        yield Parameter(part, f"{name}.up.weight", (width, hidden))
        yield Parameter(part, f"{name}.down.weight", (hidden, width))
