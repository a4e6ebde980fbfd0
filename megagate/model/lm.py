"""The language model."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagate.backend.base import Backend
from megagate.backend.documents import Documents
from megagate.config.model import ModelConfig
from megagate.model.block import Block
from megagate.nn.base import Layer, Weight
from megagate.nn.embedding import Embedding
from megagate.nn.init import initialize
from megagate.nn.loss import cross_entropy_sum
from megagate.nn.moe.router import RouterStats
from megagate.nn.norm import RMSNorm
from megagate.nn.rope import at_positions, rope_table
from megagate.parallel.comm import enter, gather
from megagate.parallel.mesh import ParallelMesh


class LossParts(NamedTuple):
    """What one micro-step of one data-parallel rank yields; sums, so that one division by a global count makes a mean.

    Args:
        ce_sum: scalar fp32, sum of -log p over this rank's targets, equal on its tp ranks.
        stats: Router statistics of each MoE layer, over this rank's own tokens.
    """

    ce_sum: Tensor
    stats: list[RouterStats]


class LanguageModel(Layer):
    """Embedding, blocks, final norm, output projection (the embedding's own matrix when tied).

    Parallel: the vocabulary is cut over tp; between blocks the sequence is cut over tp. All tp ranks have the whole rows of tokens, so that
        each finds the documents by itself.

    Args:
        config: The model.
        dtype: Of weights and activations.
        backend: Its kernels.
        mesh: Its layout.
        recompute: Recompute blocks in the backward pass.
        eod_id: The last token of each document; where it is given, attention does not cross the border after it and positions begin at 0
            in each document. That the token after it is no target of it is up to the labels (`data/loader.py`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        backend: Backend,
        mesh: ParallelMesh,
        recompute: bool = False,
        eod_id: int | None = None,
    ):
        super().__init__(dtype)
        self.config, self.backend, self.mesh, self.recompute, self.eod_id = config, backend, mesh, recompute, eod_id
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size, dtype=dtype, tp=mesh.tp)
        self.layers = nn.ModuleList(
            Block(config, is_moe=config.is_moe_layer(layer), dtype=dtype, backend=backend.of_layer(layer, config.num_layers), mesh=mesh)
            for layer in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, backend=backend, tp=mesh.tp)
        if not config.tie_embeddings:
            self.head = Weight((config.padded_vocab_size, config.hidden_size), dtype, axis=mesh.tp)

    def initialize(self, *, seed: int, device: torch.device) -> "LanguageModel":
        """Give the parameters their values, the same for every layout, and return the model."""
        initialize(self, seed=seed, std=self.config.init_std, num_layers=self.config.num_layers, device=device)
        return self

    def forward(self, tokens: Tensor, labels: Tensor | None) -> LossParts | Tensor:
        """The loss of a micro-batch; without labels the logits, see `logits`.

        Shapes: tokens and labels [b, s] int64, the same on all tp ranks.
        """
        with self.backend.running():
            x, stats = self._hidden(tokens)
        if labels is None:
            local = F.linear(enter(x, self.mesh.tp, dim=1), self.output_weight).float()
            return gather(local, self.mesh.tp, dim=2)[..., : self.config.vocab_size]
        ce_sum = cross_entropy_sum(x, self.output_weight, labels, vocab_size=self.config.vocab_size, tp=self.mesh.tp)
        return LossParts(ce_sum, stats)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of every position, without padding rows, for sampling and export checks.

        Shapes: tokens [b, s] -> [b, s, vocab_size] fp32; s a multiple of tp.
        """
        return self(tokens, None)  # through `forward`, whose hooks gather partitioned weights under ZeRO-3

    def follow_counts(self, counts: Tensor) -> None:
        """Move the routers' biases after a step; counts [MoE layers, E] of rows, over all ranks."""
        routers = [block.moe.router for block in self.layers if block.is_moe]
        for router, of_layer in zip(routers, counts, strict=True):
            router.follow(of_layer)

    @property
    def output_weight(self) -> Tensor:
        """The output projection, [V/tp, h]."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def places(self, tokens: Tensor) -> tuple[Tensor, Documents | None]:
        """What blocks need to know of where tokens are: the rotary table, [2, s, 1, d/2] or [2, b, s, 1, d/2], and the documents.

        Shapes: tokens [b, s].
        """
        attention = self.config.attention
        rope = rope_table(tokens.shape[1], attention.head_dim, base=attention.rope.base, device=tokens.device)
        if self.eod_id is None:
            return rope, None
        documents = Documents.of(tokens, eod_id=self.eod_id)
        return at_positions(rope, documents.positions), documents

    def _hidden(self, tokens: Tensor) -> tuple[Tensor, list[RouterStats]]:
        """Normed final hidden states [b, s/tp, h] and the statistics of the MoE layers."""
        rope, documents = self.places(tokens)
        x, stats = self.embedding(tokens), []
        for block in self.layers:
            # The balance losses are formed from the returned sums outside the recomputed region, so nothing is counted twice.
            if self.recompute and self.training:
                x, layer_stats = self.backend.recompute(block, x, rope, documents)
            else:
                x, layer_stats = block(x, rope, documents)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.final_norm(x), stats
