"""The experts of one rank, as one stack."""

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.config.model import MoEConfig
from megagate.nn.base import Layer
from megagate.nn.mlp import swiglu
from megagate.nn.moe.dispatch import Rows
from megagate.parallel.mesh import Axis


class Experts(Layer):
    """p * down(silu(gate x) * up x) for each row and its expert.

    The router's weight p is applied before `down`, which keeps one tensor less for the backward pass.

    Shapes: rows [P, h] -> [P, h]; gate_up [e, 2f, h] (gate rows first), down [e, h, f].
    Parallel: whole experts are spread over ep; an expert without rows still takes part, since skipping it would hang ZeRO.
    """

    gate_up: Tensor
    down: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int, *, dtype: torch.dtype, backend: Backend, ep: Axis):
        super().__init__(dtype)
        self.backend = backend
        self.add_weight("gate_up", (config.num_experts, 2 * config.ffn_size, hidden_size), init="normal", axis=ep, stacked=True)
        self.add_weight("down", (config.num_experts, hidden_size, config.ffn_size), init="output", axis=ep, stacked=True)

    def forward(self, rows: Rows) -> Tensor:
        """Apply each row's expert."""
        gate, up = self.backend.grouped_linear(rows.x, self.gate_up, rows.ends).chunk(2, dim=-1)
        return self.backend.grouped_linear(swiglu(gate, up, rows.probs), self.down, rows.ends)
