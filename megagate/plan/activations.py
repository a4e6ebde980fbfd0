"""What the forward pass of one micro-batch keeps for the backward pass, in bytes, from the config alone.

Autograd keeps tensors by storage, so the formulas name storages: two layers that save views of one tensor save it once. They mirror `nn/`,
`model/` and `backend/native.py` line by line; `tests/plan` runs the model and compares byte by byte.

The peak of a micro-step is such storages and the largest temporaries, and not exact: where allocations were counted (on a CPU) the formula
told 2 % too little to 12 % too much.

Left out: what does not grow with the model (a few scalars), and what the engine keeps for the balance loss (numbers per layer and expert).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megagate.config.model import ModelConfig
from megagate.config.precision_rules import SIZE_MULTIPLE

Core = Literal["flash", "blockwise"]
"""The attention kernel. `flash` (GPUs) keeps q, k, v, its output and one number per query; `blockwise` (CPUs) keeps q, k and v only."""

CHUNK_TOKENS = 1024
"""Tokens whose logits the loss holds at a time: `nn/loss.py`, whose module needs torch."""
INDEX = 8
FP32 = 4

Storages = dict[str, int]
"""Bytes of each kept storage, by what it is."""


@dataclass(frozen=True)
class Micro:
    """One rank's part of one micro-batch.

    Args:
        batch: Sequences.
        seq_len: Tokens per sequence.
        tp: Tensor-parallel ranks.
        ep: Expert-parallel ranks.
        element: Bytes of a weight or activation: 2 in bf16, 4 in fp32.
        core: The attention kernel.
        row_multiple: The rows of each expert are padded up to this: 16 on GPUs, 32 on CPUs.
        expert_rows: Rows that this rank's experts receive in each MoE layer, and these rows padded; None for experts that get equally many.
        share: Without `expert_rows`, how many times their equal share of the rows this rank's experts get.
        documents: Rows are cut into documents, so that each has positions of its own (`data.attention`).
    """

    batch: int
    seq_len: int
    tp: int = 1
    ep: int = 1
    element: int = 2
    core: Core = "flash"
    row_multiple: int = SIZE_MULTIPLE
    expert_rows: tuple[tuple[int, int], ...] | None = None
    share: int = 1
    documents: bool = False

    @property
    def whole(self) -> int:
        """Tokens of the sequences, as attention and dense feed-forward see them."""
        return self.batch * self.seq_len

    @property
    def own(self) -> int:
        """Tokens of this rank between blocks."""
        return self.whole // self.tp

    def wide(self, elements: int) -> int:
        """Bytes of an fp32 copy that is made of other numbers, and not of fp32 ones."""
        return 0 if self.element == FP32 else FP32 * elements

    def rows(self, model: ModelConfig, moe_layer: int) -> tuple[int, int]:
        """Rows that this rank's experts receive, and these rows padded."""
        if self.expert_rows is not None:
            return self.expert_rows[moe_layer]
        received, local = self.share * self.own * model.moe.top_k, model.moe.num_experts // self.ep
        each = max(1, -(-received // local))
        return received, local * (-(-each // self.row_multiple) * self.row_multiple)


def kept_by_forward(model: ModelConfig, micro: Micro, *, recompute: bool) -> Storages:
    """Everything that is kept when the forward pass of a micro-batch has ended."""
    kept: Storages = {}
    kept["embedding.ids and mask"] = (INDEX + 1) * micro.whole
    kept["rope table"] = FP32 * (micro.whole if micro.documents else micro.seq_len) * model.attention.head_dim
    kept["documents"] = INDEX * micro.whole if micro.documents else 0  # where each begins; flash keeps less, their borders
    for layer in range(model.num_layers):
        block = kept_by_block(model, layer, micro)
        kept |= {f"layers.{layer}.{what}": size for what, size in block.items() if not recompute or what == "x"}
    kept |= {f"final_norm.{what}": size for what, size in _norm(micro, micro.own, model.hidden_size)}
    return kept | kept_by_head(model, micro)


def kept_by_head(model: ModelConfig, micro: Micro) -> Storages:
    """The loss forms its gradients in the forward pass and keeps those, not the logits."""
    rows = model.padded_vocab_size // micro.tp
    return {
        "head.gradient of x": micro.element * micro.whole * model.hidden_size,
        "head.gradient of the weight": FP32 * rows * model.hidden_size,
    }


def loss_workspace(model: ModelConfig, micro: Micro) -> int:
    """The largest temporaries of the loss, at a moment when all that the forward pass keeps is there.

    Forward: the logits of a chunk in two dtypes, or their gradient beside a chunk's gradient of the weight. Backward: the scaled gradient
    of the weight, and its copy in the weight's dtype.
    """
    rows, width = model.padded_vocab_size // micro.tp, model.hidden_size
    chunk = min(micro.whole, CHUNK_TOKENS)
    logits = (FP32 * chunk + micro.wide(chunk) // 2) * rows
    product = micro.element * rows * (chunk + width)
    backward = (FP32 if micro.element == FP32 else FP32 + micro.element) * rows * width
    return max(logits, product, backward)


def peak(model: ModelConfig, micro: Micro, *, recompute: bool) -> int:
    """Bytes at the fullest moment of a micro-step: in the backward pass of the loss, or of a block, with what is kept at that time."""
    kept, head = sum(kept_by_forward(model, micro, recompute=recompute).values()), sum(kept_by_head(model, micro).values())
    in_block = max(_block_backward(model, layer, micro, recompute=recompute) for layer in range(model.num_layers))
    # Autograd holds the head's gradient of a tied embedding until the lookup's, which comes last, can be added.
    tied = micro.element * (model.padded_vocab_size // micro.tp) * model.hidden_size if model.tie_embeddings else 0
    return max(kept + loss_workspace(model, micro), kept - head + tied + in_block)


def _block_backward(model: ModelConfig, layer: int, micro: Micro, *, recompute: bool) -> int:
    """What the backward pass of a block adds to what is kept before it; where the block is recomputed, all that it keeps.

    Of its temporaries those that matter: four or five tensors of the feed-forward's width, then, when what the feed-forward has kept is
    gone, five fp32 tensors in a norm or a gate of all query heads.
    """
    kept = kept_by_block(model, layer, micro)
    feed_forward = sum(size for what, size in kept.items() if what.startswith(("ffn.", "moe.")))
    heads = model.attention.num_heads // micro.tp * model.attention.head_dim
    in_attention = (5 * FP32 + micro.element) * max(micro.whole * heads, micro.own * model.hidden_size)
    dense = model.moe.shared_ffn_size if model.is_moe_layer(layer) else model.ffn_size
    width = 4 * micro.whole * dense // micro.tp
    if model.is_moe_layer(layer):
        width = max(width, 5 * micro.rows(model, layer - model.moe.first_dense_layers)[1] * model.moe.ffn_size)
    again = sum(kept.values()) if recompute else 0
    return again + max(micro.element * width, in_attention - feed_forward)


def kept_by_block(model: ModelConfig, layer: int, micro: Micro) -> Storages:
    """What one transformer block keeps; `x` is its input."""
    kept = dict(_norm(micro, micro.own, model.hidden_size))
    kept |= {f"attention.{what}": size for what, size in _attention(model, micro)}
    kept |= {f"attention out.{what}": size for what, size in _tamed(model, micro)}
    kept |= {f"ffn_norm.{what}": size for what, size in _norm(micro, micro.own, model.hidden_size)}
    if model.is_moe_layer(layer):
        kept |= {f"moe.{what}": size for what, size in _moe(model, layer - model.moe.first_dense_layers, micro)}
    else:
        kept |= {f"ffn.{what}": size for what, size in _ffn(model, model.ffn_size, micro)}
    return kept | {f"ffn out.{what}": size for what, size in _tamed(model, micro)}


Kept = Iterator[tuple[str, int]]


def _norm(micro: Micro, rows: int, width: int, *, keeps_x: bool = True) -> Kept:
    """`_RMSNorm`: its input, one number per row, the weight in fp32."""
    if keeps_x:
        yield "x", micro.element * rows * width
    yield "scale", FP32 * rows
    yield "weight", micro.wide(width)


def _tamed(model: ModelConfig, micro: Micro) -> Kept:
    """`Block._tamed`: sandwich norm and residual clip."""
    if model.sandwich_norm:
        yield from _norm(micro, micro.own, model.hidden_size)
    if model.residual_clip:
        yield "unclipped", micro.element * micro.own * model.hidden_size


def _ffn(model: ModelConfig, width: int, micro: Micro, *, keeps_x: bool = True) -> Kept:
    """`DenseFFN`: the input of its GEMM, the joined weights, gate and up, and what `down` multiplies."""
    width = width // micro.tp
    if keeps_x:
        yield "x", micro.element * micro.whole * model.hidden_size
    yield "joined weights", micro.element * 2 * width * model.hidden_size
    yield "gate and up", micro.element * micro.whole * 2 * width
    yield "activated", micro.element * micro.whole * width


# ---- attention


class _Gate(NamedTuple):
    """What `AttentionGate` keeps.

    Args:
        of_y: It keeps what it gates.
        scores: Bytes of its own.
    """

    of_y: bool
    scores: int


def _attention(model: ModelConfig, micro: Micro) -> Kept:
    config, element, tokens = model.attention, micro.element, micro.whole
    position = config.gate.position
    heads, kv_heads = config.num_heads // micro.tp, max(1, config.num_kv_heads // micro.tp)
    queries, keys = element * tokens * heads * config.head_dim, element * tokens * kv_heads * config.head_dim
    rows = _rows(model, micro, heads, kv_heads)
    of_heads = (kv_heads if config.gate.of_kv_heads else heads, tokens)
    gate = _gate(model, micro, *((1, micro.own) if position == "G5" else of_heads))
    yield "x", element * tokens * model.hidden_size
    yield "joined weights", element * rows * model.hidden_size
    if config.qk_norm or position != "none" or "v" not in config.switch.switched:  # else nobody keeps a part of it
        yield "projected", element * tokens * rows
    yield from _switched(model, micro, keys, kv_heads)
    yield "gate scores", gate.scores
    if config.qk_norm:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            norm = _norm(micro, tokens * count, config.head_dim, keeps_x=False)
            yield from ((f"{name}.{what}", size) for what, size in norm)
        yield "gated", {"G4": queries, "G3": keys}.get(position, 0)  # the norm's input; without a norm nobody keeps it
    yield "rotated", queries + keys
    yield "gated value", keys if position == "G2" else 0
    # What `o` multiplies is laid out by token. So is flash's own output; that of the blocks is by head, and copied.
    yield "o input", queries
    if micro.core == "flash":
        yield "attended", queries if position == "G1" else 0
        yield "log-sum-exp", FP32 * tokens * heads
    else:
        yield "attended", queries if position == "G1" and gate.of_y else 0
    if position == "G5":
        yield from _gated_output(model, micro, gate)


def _rows(model: ModelConfig, micro: Micro, heads: int, kv_heads: int) -> int:
    """Rows of the GEMM that yields q, k, v and what rides with them."""
    config = model.attention
    rows = (heads + 2 * kv_heads) * config.head_dim
    if config.gate.score == "input" and config.gate.position not in ("none", "G5"):
        rows += (kv_heads if config.gate.of_kv_heads else heads) * model.gate_scores[1]
    switch = config.switch
    return rows + len(switch.switched) * kv_heads * ((switch.num_experts - 1) * config.head_dim + switch.num_experts)


def _switched(model: ModelConfig, micro: Micro, keys: int, kv_heads: int) -> Kept:
    """`SwitchHeads`: all projections side by side, their scores, which of them are chosen, and what it yields."""
    switch = model.attention.switch
    scores = FP32 * micro.whole * kv_heads * switch.num_experts
    for kind in switch.switched:
        yield f"switch {kind} projections", keys * switch.num_experts
        yield f"switch {kind} scores", scores
        yield f"switch {kind} chosen", 2 * scores if switch.top_k < switch.num_experts else 0
        yield f"switched {kind}", keys if kind == "v" or model.attention.qk_norm else 0


def _gate(model: ModelConfig, micro: Micro, heads: int, tokens: int) -> _Gate:
    """`AttentionGate.forward` on `heads` local heads of `tokens` tokens."""
    config = model.attention.gate
    if config.position == "none" or config.score == "constant":
        return _Gate(False, 0)
    width = model.hidden_size if config.position == "G5" else model.attention.head_dim
    if config.score == "self":
        wide = micro.wide(tokens * heads * width)
        # SiLU keeps its fp32 input; the norm also one number per head, and, being made of parts, what it divides by.
        return _Gate(micro.element == FP32, wide + (FP32 * tokens * heads if config.activation == "rmsnorm" else 0))
    multiplies = config.combine == "multiply"
    if config.activation == "sigmoid" and multiplies and config.score == "input" and not config.head_shared:
        return _Gate(True, 0)
    rows = tokens if config.score == "input" else 1
    scores = FP32 * rows * heads * model.gate_scores[1]
    own_logits = config.position == "G5" and config.score == "input"  # elsewhere they are part of what is projected
    logits = scores if own_logits or micro.element != FP32 else 0
    uses_scores = multiplies and not config.head_shared
    kept = {
        "sigmoid": scores,
        "silu": logits + (scores if uses_scores else 0),
        "identity": logits if uses_scores else 0,
        "ns_sigmoid": scores + (scores if uses_scores else 0),
    }[config.activation]
    mean = FP32 * rows * model.gate_scores[1] if config.head_shared and multiplies else 0
    return _Gate(multiplies, kept + mean)


def _gated_output(model: ModelConfig, micro: Micro, gate: _Gate) -> Kept:
    """G5: y where the gate keeps it, and the gate's own product with the block's input."""
    config, hidden = model.attention.gate, model.hidden_size
    out = micro.element * micro.own * hidden
    yield "ungated out", out if gate.of_y else 0
    if config.score == "input":
        yield "own x", 0 if micro.tp == 1 else out
        yield "gate weight", 0 if micro.element == FP32 else micro.element * hidden * hidden
        fused = config.activation == "sigmoid" and config.combine == "multiply"
        yield "gate logits", out if fused else 0


# ---- the mixture of experts


def _moe(model: ModelConfig, moe_layer: int, micro: Micro) -> Kept:
    config, hidden, element = model.moe, model.hidden_size, micro.element
    experts, chosen = config.num_experts, micro.own * config.top_k
    received, padded = micro.rows(model, moe_layer)
    yield from _shared_expert(model, micro)
    yield "router.x", micro.wide(micro.own * hidden) or element * micro.own * hidden
    yield "router.weight", micro.wide(experts * hidden)
    yield "router.logits", FP32 * micro.own * experts
    yield "router.scores", FP32 * micro.own * experts
    yield "router.log-sum-exp", FP32 * micro.own
    yield "router.ids", INDEX * chosen
    # What is divided by a sum, and the sum before and after it is kept from being 0.
    yield "router.probs and sum", FP32 * (chosen + 2 * micro.own) if config.renormalize else 0
    yield "router.sum of scores", FP32 * 2 * micro.own if config.score == "sigmoid" else 0
    # `order`, `slots` and `token` have an entry for each row that is sent; autograd does not know of `token` and `place`.
    yield "dispatch.indices", INDEX * (3 * chosen + received + padded)
    yield "experts.x", element * padded * hidden
    yield "experts.probs", FP32 * padded
    yield "experts.ends", 4 * (experts // micro.ep)
    yield "experts.gate and up", element * padded * 2 * config.ffn_size
    yield "experts.activated", element * padded * config.ffn_size


def _shared_expert(model: ModelConfig, micro: Micro) -> Kept:
    config = model.moe
    if not config.shared_ffn_size:
        return
    # With tp = 1 its input is what the router reads too; in fp32 that one is counted there.
    shares_x = micro.tp == 1 and micro.element == FP32
    yield from ((f"shared.{what}", size) for what, size in _ffn(model, config.shared_ffn_size, micro, keeps_x=not shares_x))
    if config.shared_gate:
        yield "shared.out", micro.element * micro.own * model.hidden_size
        yield "shared.gate x", micro.wide(micro.own * model.hidden_size)
        yield "shared.gate weight", micro.wide(model.hidden_size)
        yield "shared.gate logits", FP32 * micro.own
