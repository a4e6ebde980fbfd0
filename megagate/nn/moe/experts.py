"""The experts of one rank, as one stack."""

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.config.model import MoEConfig
from megagate.nn.base import Layer
from megagate.nn.mlp import swiglu
from megagate.nn.moe.dispatch import Rows
from megagate.parallel.mesh import ParallelMesh


class Experts(Layer):
    """p * down(silu(gate x) * up x) for each row and its expert.

    The router's weight p is applied before `down`, which keeps one tensor less for the backward pass.

    Shapes: rows [P, h] -> [P, h]; gate_up [e, 2f, h] (gate rows first), down [e, h, f].
    Parallel: whole experts are spread over ep; an expert without rows still takes part, since skipping it would hang ZeRO.
    """

    gate_up: Tensor
    down: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int, *, dtype: torch.dtype, backend: Backend, mesh: ParallelMesh):
        super().__init__(dtype)
        experts, width = config.num_experts, config.ffn_size
        self.add_weight("gate_up", (experts, 2 * width, hidden_size), init="normal", axis=mesh.ep, stacked=True)
        self.add_weight("down", (experts, hidden_size, width), init="output", axis=mesh.ep, stacked=True)
        self.project = backend.grouped_linear(hidden_size, 2 * width, num_experts=experts, mesh=mesh)
        self.out = backend.grouped_linear(width, hidden_size, num_experts=experts, mesh=mesh)

    def forward(self, rows: Rows) -> Tensor:
        """Apply each row's expert."""
        gate, up = self.project(rows.x, self.gate_up, rows.ends).chunk(2, dim=-1)
        return self.out(swiglu(gate, up, rows.probs), self.down, rows.ends)
