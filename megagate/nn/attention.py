"""Gated grouped-query attention."""

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.backend.documents import Documents
from megagate.config.model import GatePosition, ModelConfig
from megagate.nn.base import Layer, Weight
from megagate.nn.gate import AttentionGate
from megagate.nn.heads import local_heads
from megagate.nn.norm import RMSNorm
from megagate.nn.rope import rotate
from megagate.nn.switch import SwitchHeads
from megagate.parallel.mesh import Axis


class GatedAttention(Layer):
    """softmax(q k^T / sqrt(d)) v, projected, gated at one of five places: one GEMM yields q, k, v and what gate or switch heads need.

    Shapes: x [b, s/tp, h] (normed), rope [2, s, 1, d/2], or with documents [2, b, s, 1, d/2] -> [b, s/tp, h].
    Parallel: q, gate and o are cut by query heads, k and v by kv heads. With more tp ranks than kv heads k and v are wholly replicated,
        their gradient summed over tp, and each rank uses the one kv head of its query heads. All-gather of the sequence before,
        reduce-scatter after, and their adjoints backward.
    Source: arXiv 2505.06708, section 2.
    """

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, backend: Backend, tp: Axis):
        super().__init__(dtype)
        config = model.attention
        self.config, self.backend, self.tp = config, backend, tp
        self.kv_axis = tp if tp.size <= config.num_kv_heads else None
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Weight((q_rows, model.hidden_size), dtype, axis=tp)
        self.k = Weight((kv_rows, model.hidden_size), dtype, axis=self.kv_axis)
        self.v = Weight((kv_rows, model.hidden_size), dtype, axis=self.kv_axis)
        self.o = Weight((model.hidden_size, q_rows), dtype, init="output", axis=tp, dim=1)
        self.gate = AttentionGate(model, dtype=dtype, tp=tp, kv_axis=self.kv_axis) if config.gate.position != "none" else None
        switch = {"dtype": dtype, "tp": tp, "kv_axis": self.kv_axis}
        self.k_switch = SwitchHeads(model, **switch) if "k" in config.switch.switched else None
        self.v_switch = SwitchHeads(model, **switch) if "v" in config.switch.switched else None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=model.norm_eps, dtype=dtype, backend=backend, tp=tp)
            self.k_norm = RMSNorm(config.head_dim, eps=model.norm_eps, dtype=dtype, backend=backend, tp=tp)

    def forward(self, x: Tensor, rope: Tensor, documents: Documents | None = None) -> Tensor:
        """Attend (within each document, where they are given), gate, project."""
        (q,), keys, values, logits = self._project(x)
        q, k, v = self._heads(q), self._heads(*keys, switch=self.k_switch), self._heads(*values, switch=self.v_switch)
        q, k, v = self._gated("G4", q, *logits), self._gated("G3", k, *logits), self._gated("G2", v, *logits)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y = self.backend.attention_core(rotate(q, rope), rotate(k, rope), v, documents)
        y = self._gated("G1", y, *logits)
        out = self.backend.row_linear(y.flatten(2), self.o.weight, self.tp)
        return self.gate.gate_output(out, x) if self.config.gate.position == "G5" else out

    def _project(self, x: Tensor) -> list[list[Tensor]]:
        """What q, k, v and the gate are made of, by one GEMM; nothing for a gate that needs no logits."""
        k, v = (local_heads(w.weight, self.config.num_kv_heads, cut=self.kv_axis, tp=self.tp) for w in (self.k, self.v))
        groups = [
            [self.q.weight],
            [k, *(self.k_switch.local_weights() if self.k_switch is not None else ())],
            [v, *(self.v_switch.local_weights() if self.v_switch is not None else ())],
            [self.gate.local_weight()] if self.gate is not None and self.gate.rides else [],
        ]
        outputs = iter(self.backend.column_linears(x, [weight for group in groups for weight in group], self.tp))
        return [[next(outputs) for _ in group] for group in groups]

    def _heads(self, projected: Tensor, *others: Tensor, switch: SwitchHeads | None = None) -> Tensor:
        """[b, s, heads/tp, d]; `others` is what a switch chooses by and from."""
        first = projected.unflatten(-1, (-1, self.config.head_dim))
        return first if switch is None else switch(first, *others)

    def _gated(self, position: GatePosition, y: Tensor, *logits: Tensor) -> Tensor:
        """y, gated if the gate is here."""
        return self.gate(y, *logits) if self.config.gate.position == position else y
