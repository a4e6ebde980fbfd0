"""What the model is. Nothing here depends on how many devices train it."""

from dataclasses import dataclass, field
from typing import Literal

GatePosition = Literal["none", "G1"]
GateGranularity = Literal["elementwise", "headwise"]
BalanceScope = Literal["global_batch", "micro_batch", "sequence"]

VOCAB_MULTIPLE = 128
"""The embedding is padded to this multiple whatever tp is, so that its shape does not depend on the layout."""


@dataclass(frozen=True)
class GateConfig:
    """The attention gate Y' = Y * sigmoid(X W) (arXiv 2505.06708, equation 5).

    Args:
        position: Where the gate acts: `G1` on the attention output before the output projection, `none` for the baseline.
        granularity: One score per channel (`elementwise`) or one per query head (`headwise`).
    """

    position: GatePosition = "none"
    granularity: GateGranularity = "elementwise"


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
        rope: The rotary position embedding.
    """

    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = True
    gate: GateConfig = field(default_factory=GateConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)

    @property
    def gate_rows(self) -> int:
        """Rows of the gate's weight, one per score of a token; 0 without a gate."""
        if self.gate.position == "none":
            return 0
        return self.num_heads * (self.head_dim if self.gate.granularity == "elementwise" else 1)


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of SwiGLU experts behind a softmax top-k router.

    Args:
        num_experts: Experts per layer; 0 makes the model dense.
        top_k: Experts per token; 1 to `num_experts`.
        ffn_size: Hidden width of one expert.
        shared_ffn_size: Hidden width of the shared expert that every token passes beside its k; 0 for none.
        renormalize: Divide the chosen probabilities by their sum.
        balance_coef: Weight of the load-balancing loss of each layer; 0 switches it off.
        balance_scope: Tokens over which expert frequencies are counted: the whole `global_batch` (arXiv 2501.11873), one
            `micro_batch` over all ranks, or one `sequence` (arXiv 2412.19437).
        z_loss_coef: Weight of the router z-loss (arXiv 2202.08906) of each layer; 0 switches it off.
    """

    num_experts: int = 0
    top_k: int = 1
    ffn_size: int = 0
    shared_ffn_size: int = 0
    renormalize: bool = True
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
        ffn_size: Hidden width of the dense SwiGLU; used where `moe.num_experts` is 0.
        tie_embeddings: Use the embedding matrix as output projection.
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
    norm_eps: float = 1e-6
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.moe.num_experts > 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
