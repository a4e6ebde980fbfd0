"""The mixture-of-experts block: route, dispatch, experts, combine."""

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.config.model import MoEConfig
from megagate.nn.base import Layer
from megagate.nn.gate import sigmoid_gate
from megagate.nn.mlp import DenseFFN
from megagate.nn.moe.dispatch import Dispatcher
from megagate.nn.moe.experts import Experts
from megagate.nn.moe.router import Router, RouterStats
from megagate.parallel.comm import enter
from megagate.parallel.mesh import Axis, ParallelMesh


class MoE(Layer):
    """The sum of each token's k experts, weighted by the router, and of the shared expert, where there is one, that every token passes.

    Shapes: [b, s/tp, h] -> [b, s/tp, h], and the router's statistics of this rank's tokens.
    Parallel: every rank owns distinct tokens (the sequence is cut over tp); rows travel over ep and back. The shared expert is cut over tp
        like a dense block.
    Source: arXiv 2101.03961, equation 2; shared experts: arXiv 2401.06066, section 3.2; their gate: Hugging Face's Qwen2MoeSparseMoeBlock.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, *, dtype: torch.dtype, backend: Backend, mesh: ParallelMesh):
        super().__init__(dtype)
        self.router = Router(config, hidden_size, dtype=dtype, backend=backend, tp=mesh.tp)
        self.dispatcher = Dispatcher(backend=backend, ep=mesh.ep)
        self.experts = Experts(config, hidden_size, dtype=dtype, backend=backend, mesh=mesh)
        shared = config.shared_ffn_size
        self.shared_expert = DenseFFN(hidden_size, shared, dtype=dtype, backend=backend, tp=mesh.tp) if shared else None
        self.shared_gate = TokenGate(hidden_size, dtype=dtype, tp=mesh.tp) if config.shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """Apply the block."""
        # The shared expert first: a recomputed block stops at the last tensor that is kept, so that `combine` does not run again.
        shared = None if self.shared_expert is None else self.shared_expert(x)
        if self.shared_gate is not None:
            shared = self.shared_gate(shared, x)
        route, stats = self.router(x)
        rows, plan = self.dispatcher.dispatch(x.flatten(0, 1), route)
        out = self.dispatcher.combine(self.experts(rows), plan).view_as(x)
        return (out if shared is None else out + shared), stats


class TokenGate(Layer):
    """y * sigmoid(x w), one score per token.

    Shapes: y and x [b, s/tp, h] -> [b, s/tp, h].
    Parallel: the weight [1, h] is replicated but used on sharded tokens, so its gradient is summed over tp.
    """

    weight: Tensor

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, tp: Axis):
        super().__init__(dtype)
        self.tp = tp
        self.add_weight("weight", (1, hidden_size), init="normal")

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Gate y."""
        return sigmoid_gate(y, x.float() @ enter(self.weight.float(), self.tp).t())
