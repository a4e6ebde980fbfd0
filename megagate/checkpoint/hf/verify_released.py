"""The tensors of a model released with arXiv 2505.06708 as a class of transformers keeps them, not by the mapping that is verified."""

from math import prod

import torch
from torch import Tensor

from megagate.checkpoint.box import Shape
from megagate.checkpoint.hf.verify_files import FolderTensors
from megagate.config.model import ModelConfig

_FUSED = ".self_attn.q_proj.weight"


class Regrouped(FolderTensors):
    """The same tensors, as qwen3_5_text has them: queries and gates by heads, the gate of as many rows; norms less 1.

    For each of g key/value heads a file's matrix holds d rows of each of its n/g query heads, and then the rows of their gates: d or 1 of
    each head.

    Args:
        model: The model.
        tensors: As they lie in the folder.
    """

    def __init__(self, model: ModelConfig, tensors: FolderTensors):
        super().__init__(tensors.folder, tensors.weights)
        self._attention = model.attention

    def shape(self, name: str) -> Shape:
        """Of a tensor."""
        own = super().shape(name)
        return (2 * self._attention.num_heads * self._attention.head_dim, own[1]) if self._is_fused(name) else own

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of a tensor, fp32."""
        tensor = super().read(name).float()
        if name.endswith("norm.weight"):
            tensor = tensor - 1
        return (self._by_heads(tensor) if self._is_fused(name) else tensor)[rows]

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(prod(self.shape(name)) for name in self)

    def _is_fused(self, name: str) -> bool:
        return name.endswith(_FUSED) and self._attention.gate.position != "none"

    def _by_heads(self, fused: Tensor) -> Tensor:
        made, row = [], 0
        attention = self._attention
        d = attention.head_dim
        rows = 1 if attention.gate.granularity == "headwise" else d
        for _ in range(attention.num_kv_heads):
            heads = range(attention.num_heads // attention.num_kv_heads)
            gates = row + len(heads) * d
            for head in heads:
                query, gate = fused[row + head * d : row + (head + 1) * d], fused[gates + head * rows : gates + (head + 1) * rows]
                made += [query, gate.expand(d, -1)]
            row = gates + len(heads) * rows
        return torch.cat(made)
