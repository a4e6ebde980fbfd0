"""One transformer block."""

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.backend.documents import Documents
from megagate.config.model import ModelConfig
from megagate.nn.attention import GatedAttention
from megagate.nn.base import Layer
from megagate.nn.mlp import DenseFFN
from megagate.nn.moe.layer import MoE
from megagate.nn.moe.router import RouterStats
from megagate.nn.norm import RMSNorm
from megagate.parallel.mesh import ParallelMesh


class Block(Layer):
    """x + attention(norm(x)), then x + ffn(norm(x)); the feed-forward is dense or a mixture of experts.

    With sandwich norms what is added is normed, too; with a residual clip it is clipped.

    Shapes: [b, s/tp, h] -> [b, s/tp, h], and the router's statistics (None in a dense block).
    Source: sandwich norm: arXiv 2105.13290, section 2.4; residual clip: arXiv 2505.06708, appendix A.6.
    """

    def __init__(self, config: ModelConfig, *, is_moe: bool, dtype: torch.dtype, backend: Backend, mesh: ParallelMesh):
        super().__init__(dtype)
        norm = {"eps": config.norm_eps, "dtype": dtype, "backend": backend, "tp": mesh.tp}
        self.attention_norm = RMSNorm(config.hidden_size, **norm)
        self.attention = GatedAttention(config, dtype=dtype, backend=backend, tp=mesh.tp, norm_eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, **norm)
        self.is_moe, self.clip = is_moe, config.residual_clip
        self.attention_out_norm = RMSNorm(config.hidden_size, **norm) if config.sandwich_norm else None
        self.ffn_out_norm = RMSNorm(config.hidden_size, **norm) if config.sandwich_norm else None
        if is_moe:
            self.moe = MoE(config.moe, config.hidden_size, dtype=dtype, backend=backend, mesh=mesh)
        else:
            self.ffn = DenseFFN(
                config.hidden_size, config.ffn_size, dtype=dtype, backend=backend, tp=mesh.tp, norm_eps=config.norm_eps
            )

    def forward(self, x: Tensor, rope: Tensor, documents: Documents | None = None) -> tuple[Tensor, RouterStats | None]:
        """Apply the block."""
        x = x + self._tamed(self.attention(x, rope, documents, norm=self.attention_norm), self.attention_out_norm)
        out, stats = self.moe(self.ffn_norm(x)) if self.is_moe else (self.ffn(x, norm=self.ffn_norm), None)
        return x + self._tamed(out, self.ffn_out_norm), stats

    def _tamed(self, out: Tensor, norm: RMSNorm | None) -> Tensor:
        """What is added to the residual stream."""
        out = out if norm is None else norm(out)
        return out.clamp(-self.clip, self.clip) if self.clip else out
