"""What the model is. Nothing here depends on how many devices train it."""

from dataclasses import dataclass, field
from typing import Literal

GatePosition = Literal["none", "G1", "G2", "G3", "G4", "G5"]
GateGranularity = Literal["elementwise", "headwise"]
GateScore = Literal["input", "parameter", "constant", "self"]
GateActivation = Literal["sigmoid", "silu", "identity", "ns_sigmoid", "rmsnorm"]
GateCombine = Literal["multiply", "add"]
SwitchProjections = Literal["none", "v", "kv"]
RouterScore = Literal["softmax", "sigmoid"]
BalanceScope = Literal["global_batch", "micro_batch", "sequence"]

VOCAB_MULTIPLE = 128
"""The embedding is padded to this multiple whatever tp is, so that its shape does not depend on the layout."""


@dataclass(frozen=True)
class GateConfig:
    """The attention gate Y' = Y * act(S), in the paper's main form Y * sigmoid(X W) (arXiv 2505.06708, equation 5 and section 2.2).

    Args:
        position: What is gated, Y: `G1` the attention output of each head, `G2` the value, `G3` the key, `G4` the query projection (these
            three before QK-norm and RoPE), `G5` the output projection's result; `none` for the baseline, whatever the other fields say.
        granularity: One score per channel (`elementwise`) or one per head (`headwise`).
        head_shared: Scores of all heads are averaged over the heads; the parameters are those of the elementwise gate.
        score: What S is: `input`, X W with X the normed input of the attention block; `parameter`, zero-initialised numbers that do not
            depend on the input (and decay like every matrix); `constant`, Y' = constant * Y; `self`, Y' = act(Y) without parameters.
        activation: act: `sigmoid`, `silu`, `identity`, `ns_sigmoid` (1/2 + sigmoid/2, hardly sparse), or, of Y itself, `rmsnorm` per head.
        combine: Y * act(S), or Y + act(S) (`add`).
        constant: The factor of a constant score; > 0.
    """

    position: GatePosition = "none"
    granularity: GateGranularity = "elementwise"
    head_shared: bool = False
    score: GateScore = "input"
    activation: GateActivation = "sigmoid"
    combine: GateCombine = "multiply"
    constant: float = 0.5

    @property
    def of_kv_heads(self) -> bool:
        """Whether the gated heads are key/value heads, not query heads."""
        return self.position in ("G2", "G3")

    @property
    def rides(self) -> bool:
        """Whether its logits, one a channel, are of the product of q, k and v: what may be in FP8 of a gate."""
        return self.score == "input" and self.granularity == "elementwise" and self.position not in ("none", "G5")


@dataclass(frozen=True)
class SwitchConfig:
    """Switch heads: a projection of each key/value head is the sum of the k best of n projections, weighted by the sigmoid of their scores.

    Source: arXiv 2312.07987, equations 7-9, for keys and values instead of values and outputs; arXiv 2505.06708, Table 6.

    Args:
        projections: `v` the value projection, `kv` also the key projection, with scores of its own; `none` for ordinary attention.
        num_experts: n, full projections of each kind; >= 1.
        top_k: k, chosen for each token and head; 1 to n.
    """

    projections: SwitchProjections = "none"
    num_experts: int = 1
    top_k: int = 1

    @property
    def switched(self) -> tuple[Literal["k", "v"], ...]:
        """The projections that are switched."""
        return {"none": (), "v": ("v",), "kv": ("k", "v")}[self.projections]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864).

    Args:
        base: Base of the geometric series of wavelengths; > 1.
    """

    base: float = 10000.0


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Args:
        num_heads: Query heads; a multiple of `num_kv_heads`.
        num_kv_heads: Key and value heads.
        head_dim: Channels of one head; even.
        qk_norm: RMSNorm over the channels of each query and key head, before RoPE.
        gate: The attention gate.
        switch: Key and value projections as experts.
        rope: The rotary position embedding.
    """

    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = True
    gate: GateConfig = field(default_factory=GateConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of SwiGLU experts behind a top-k router.

    Args:
        num_experts: Experts per layer; 0 makes the model dense.
        top_k: Experts per token; 1 to `num_experts`.
        ffn_size: Hidden width of one expert.
        first_dense_layers: Blocks before the first mixture; they are dense, of width `model.ffn_size`.
        shared_ffn_size: Hidden width of the shared expert that every token passes beside its k; 0 for none. Several shared experts are one
            of their summed width.
        shared_gate: The shared expert's output is multiplied by a gate of its own, sigmoid(x w), one score per token.
        score: What the router makes of its logits: `softmax` over all experts, or `sigmoid` of each (arXiv 2412.19437, equation 15).
        renormalize: Divide the weights of the chosen experts by their sum.
        bias_update_rate: Experts are chosen by score + bias (weighted by the score alone); after each step the bias of an expert with
            fewer tokens than the mean rises by this, with more it falls (arXiv 2408.15664). 0 switches it off; there 1e-3. The balance
            loss is added all the same: `balance_coef` 0 leaves balancing to the bias.
        balance_coef: Weight of the load-balancing loss of each layer; 0 switches it off.
        balance_scope: Tokens over which expert frequencies are counted: the whole `global_batch` (arXiv 2501.11873), one
            `micro_batch` over all ranks, or one `sequence` (arXiv 2412.19437).
        z_loss_coef: Weight of the router z-loss (arXiv 2202.08906) of each layer; 0 switches it off, as sigmoid scores need.
    """

    num_experts: int = 0
    top_k: int = 1
    ffn_size: int = 0
    first_dense_layers: int = 0
    shared_ffn_size: int = 0
    shared_gate: bool = False
    score: RouterScore = "softmax"
    renormalize: bool = True
    bias_update_rate: float = 0.0
    balance_coef: float = 1e-3
    balance_scope: BalanceScope = "global_batch"
    z_loss_coef: float = 1e-3


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: RMSNorm before each block, attention, and SwiGLU or a mixture of experts.

    Args:
        vocab_size: Tokens of the tokenizer; the embedding is padded to a multiple of 128.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        ffn_size: Hidden width of the dense SwiGLU; of a mixture, that of its `moe.first_dense_layers`.
        tie_embeddings: Use the embedding matrix as output projection.
        sandwich_norm: RMSNorm also on what attention and feed-forward yield, before each is added to the residual stream.
        residual_clip: What attention and feed-forward yield is clipped to +-this before it is added; 0 switches it off.
        norm_eps: Added to the mean square in each RMSNorm.
        init_std: Standard deviation of initial weights; output projections use init_std / sqrt(2 num_layers).
        attention: The attention block.
        moe: The mixture of experts.
    """

    vocab_size: int = 0
    hidden_size: int = 0
    num_layers: int = 0
    ffn_size: int = 0
    tie_embeddings: bool = False
    sandwich_norm: bool = False
    residual_clip: float = 0.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def is_moe(self) -> bool:
        """Whether there are mixtures of experts."""
        return self.moe.num_experts > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward of block `layer`, counted from 0, is a mixture of experts."""
        return self.is_moe and layer >= self.moe.first_dense_layers

    @property
    def num_moe_layers(self) -> int:
        """Blocks whose feed-forward is a mixture of experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def gate_scores(self) -> tuple[int, int]:
        """(heads, scores per head) of the gate's parameters; (0, 0) where it has none. What `G5` gates counts as one head."""
        attention, gate = self.attention, self.attention.gate
        if gate.position == "none" or gate.score not in ("input", "parameter"):
            return 0, 0
        if gate.position == "G5":
            return 1, self.hidden_size
        heads = attention.num_kv_heads if gate.of_kv_heads else attention.num_heads
        return heads, attention.head_dim if gate.granularity == "elementwise" else 1

    @property
    def gate_shape(self) -> tuple[int, int] | None:
        """Full shape of the gate's weight; None where it has none."""
        heads, width = self.gate_scores
        if not heads:
            return None
        return (heads * width, self.hidden_size) if self.attention.gate.score == "input" else (heads, width)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
