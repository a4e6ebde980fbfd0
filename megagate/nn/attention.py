"""Gated grouped-query attention."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megagate.backend.base import AttentionCore, Backend, Norm, Part, Role
from megagate.backend.documents import Documents
from megagate.config.model import GatePosition, ModelConfig
from megagate.nn.base import Layer, Weight
from megagate.nn.gate import AttentionGate
from megagate.nn.heads import local_heads
from megagate.nn.norm import RMSNorm
from megagate.nn.rope import rotate
from megagate.nn.switch import SwitchHeads
from megagate.parallel.mesh import Axis


class _Rider(NamedTuple):
    """A weight in the GEMM of q, k and v."""

    name: str
    weight: Tensor
    role: Role = "projection"


class Attend(nn.Module):
    """The backend's attention as a module, so that hooks see what goes in and what comes out (`probe/taps.py`).

    Shapes: q [b, s, n/tp, d], k and v [b, s, g/tp, d] -> [b, s, n/tp, d].
    """

    def __init__(self, site: AttentionCore):
        super().__init__()
        self.site = site

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v."""
        return self.site(q, k, v, documents)


class GatedAttention(Layer):
    """softmax(q k^T / sqrt(d)) v, projected, gated at one of five places: one GEMM yields q, k, v and what gate or switch heads need.

    Shapes: x [b, s/tp, h] (normed), rope [2, s, 1, d/2], or with documents [2, b, s, 1, d/2] -> [b, s/tp, h].
    Parallel: q, gate and o are cut by query heads, k and v by kv heads. With more tp ranks than kv heads k and v are wholly replicated,
        their gradient summed over tp, and each rank uses the one kv head of its query heads. All-gather of the sequence before,
        reduce-scatter after, and their adjoints backward.
    Source: arXiv 2505.06708, section 2.

    Args:
        model: Its shapes and variants.
        dtype: Of the weights.
        backend: Its kernels.
        tp: The tensor axis.
        norm_eps: Of the norm that every call gives; None where calls may give none.
    """

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, backend: Backend, tp: Axis, norm_eps: float | None = None):
        super().__init__(dtype)
        config = model.attention
        self.config, self.tp = config, tp
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
        heads, kv_heads = config.num_heads // tp.size, max(1, config.num_kv_heads // tp.size)
        parts = [Part(rider.name, len(rider.weight), rider.role) for group in self._riders() for rider in group]
        reads = config.gate.position == "G5"
        self.project = backend.column_linears(model.hidden_size, parts, tp=tp, eps=norm_eps, gives_normed=reads)
        self.attend = Attend(backend.attention_core(heads, kv_heads, config.head_dim))
        self.out = backend.row_linear(heads * config.head_dim, model.hidden_size, tp=tp)

    def forward(self, x: Tensor, rope: Tensor, documents: Documents | None = None, norm: Norm | None = None) -> Tensor:
        """Attend (within each document, where they are given), gate, project; to x, or, where a norm is given, to the normed x."""
        (q,), keys, values, logits, x = self._project(x, norm)
        q, k, v = self._heads(q), self._heads(*keys, switch=self.k_switch), self._heads(*values, switch=self.v_switch)
        q, k, v = self._gated("G4", q, *logits), self._gated("G3", k, *logits), self._gated("G2", v, *logits)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y = self.attend(rotate(q, rope), rotate(k, rope), v, documents)
        y = self._gated("G1", y, *logits)
        out = self.out(y.flatten(2), self.o.weight)
        return self.gate.gate_output(out, x) if self.config.gate.position == "G5" else out

    def _project(self, x: Tensor, norm: Norm | None) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """What q, k, v and the gate are made of, by one GEMM, and the normed x."""
        groups = self._riders()
        made, normed = self.project(x, [rider.weight for group in groups for rider in group], norm)
        outputs = iter(made)
        q, k, v, gate = ([next(outputs) for _ in group] for group in groups)
        return q, k, v, gate, normed

    def _riders(self) -> list[list[_Rider]]:
        """What rides in that GEMM, for q, for k, for v and for the gate; nothing for a gate that needs no logits."""
        k, v = (local_heads(w.weight, self.config.num_kv_heads, cut=self.kv_axis, tp=self.tp) for w in (self.k, self.v))
        groups = [[_Rider("q", self.q.weight)], [_Rider("k", k)], [_Rider("v", v)], []]
        for name, switch, group in (("k", self.k_switch, groups[1]), ("v", self.v_switch, groups[2])):
            router, *others = switch.local_weights() if switch is not None else [None]
            if router is not None:
                group += [_Rider(f"{name}_router", router, "logits"), *(_Rider(f"{name}{i}", w) for i, w in enumerate(others, 1))]
        if self.gate is not None and self.gate.rides:
            groups[3].append(_Rider("gate", self.gate.local_weight(), "gate" if self.gate.width > 1 else "logits"))
        return groups

    def _heads(self, projected: Tensor, *others: Tensor, switch: SwitchHeads | None = None) -> Tensor:
        """[b, s, heads/tp, d]; `others` is what a switch chooses by and from."""
        first = projected.unflatten(-1, (-1, self.config.head_dim))
        return first if switch is None else switch(first, *others)

    def _gated(self, position: GatePosition, y: Tensor, *logits: Tensor) -> Tensor:
        """y, gated if the gate is here."""
        return self.gate(y, *logits) if self.config.gate.position == position else y
