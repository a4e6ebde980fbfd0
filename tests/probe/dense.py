"""What a probe must find, from the definitions alone: plain products of weights in fp64, every attention matrix kept, no layer of ours."""

import cmath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from megagate.config.model import GateConfig, ModelConfig
from megagate.probe.figures import GATE_BINS, LayerFigures

ACTIVATIONS = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 / (1 + torch.exp(-x)),
}


@dataclass(frozen=True)
class Dense:
    """What one block computes for all sequences, in fp64.

    Args:
        logits: [b, n, s, s], -inf at keys that a query does not see.
        firsts: [b][s], the place of the first token that each query sees.
        scores: [b, s, heads, channels], or None.
        attended: [b, s, n, d].
        projected: The same, behind a gate at G1.
        shares: [b, s, E], or None.
        hidden: [b, s, h].
    """

    logits: Tensor
    firsts: list[list[int]]
    scores: Tensor | None
    attended: Tensor
    projected: Tensor
    shares: Tensor | None
    hidden: Tensor


def first_places(tokens: Tensor, eod_id: int | None) -> list[list[int]]:
    """Where the document of each token begins, by reading along the rows."""
    places = []
    for row in tokens.tolist():
        first, of_row = 0, []
        for place in range(len(row)):
            if place and row[place - 1] == eod_id:
                first = place
            of_row.append(first)
        places.append(of_row)
    return places


class DenseModel:
    """A model as its formulas say.

    Args:
        config: Which.
        weights: Parameters and buffers by name, whole; fp64.
        eod_id: Where attention stays within documents.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], eod_id: int | None):
        self.config, self.weights, self.eod_id = config, {name: value.double() for name, value in weights.items()}, eod_id

    def blocks(self, tokens: Tensor) -> list[Dense]:
        """What each block computes."""
        x, found = self.weights["embedding.weight"][tokens], []
        firsts = first_places(tokens, self.eod_id)
        for layer in range(self.config.num_layers):
            under = f"layers.{layer}."
            block = {name.removeprefix(under): value for name, value in self.weights.items() if name.startswith(under)}
            found.append(self._block(layer, block, x, firsts))
            x = found[-1].hidden
        return found

    def _block(self, layer: int, w: Mapping[str, Tensor], x: Tensor, firsts: list[list[int]]) -> Dense:
        out, parts = self._attention(w, self._norm(x, w["attention_norm.weight"]), firsts)
        x = x + self._tamed(out, w.get("attention_out_norm.weight"))
        normed = self._norm(x, w["ffn_norm.weight"])
        if self.config.is_moe_layer(layer):
            out, shares = self._mixture(w, normed)
        else:
            out, shares = _swiglu(normed, w["ffn.gate.weight"], w["ffn.up.weight"], w["ffn.down.weight"]), None
        return Dense(**parts, firsts=firsts, shares=shares, hidden=x + self._tamed(out, w.get("ffn_out_norm.weight")))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * weight

    def _tamed(self, out: Tensor, norm: Tensor | None) -> Tensor:
        out = out if norm is None else self._norm(out, norm)
        clip = self.config.residual_clip
        return out.clamp(-clip, clip) if clip else out

    def _attention(self, w: Mapping[str, Tensor], x: Tensor, firsts: list[list[int]]) -> tuple[Tensor, dict[str, Tensor | None]]:
        config, length = self.config.attention, x.shape[1]
        gate, width = config.gate, config.head_dim
        scores = _scores(self.config, w.get("attention.gate.weight"), x)

        def gated(position: str, y: Tensor, head: int) -> Tensor:
            return _gated(gate, y, scores, head, self.config.norm_eps) if gate.position == position else y

        rows = range(length)
        unseen = torch.tensor([[[key > row or key < of_row[row] for key in rows] for row in rows] for of_row in firsts])
        turns = torch.tensor(
            [
                [[cmath.exp(1j * (row - of_row[row]) * config.rope.base ** (-2 * i / width)) for i in range(width // 2)] for row in rows]
                for of_row in firsts
            ]
        )
        logits, attended, projected = [], [], []
        for head in range(config.num_heads):
            kv = head // (config.num_heads // config.num_kv_heads)
            q = gated("G4", x @ _head(w["attention.q.weight"], head, width).T, head)
            k, v = (gated(position, _key_or_value(config, w, name, x, kv), kv) for name, position in (("k", "G3"), ("v", "G2")))
            if config.qk_norm:
                q, k = self._norm(q, w["attention.q_norm.weight"]), self._norm(k, w["attention.k_norm.weight"])
            q, k = _turned(q, turns), _turned(k, turns)
            logits.append((q @ k.transpose(1, 2) / sqrt(width)).masked_fill(unseen, -torch.inf))
            attended.append(logits[-1].softmax(-1) @ v)
            projected.append(gated("G1", attended[-1], head))
        out = torch.cat(projected, -1) @ w["attention.o.weight"].T
        parts = {"logits": torch.stack(logits, 1), "scores": scores}
        parts |= {"attended": torch.stack(attended, 2), "projected": torch.stack(projected, 2)}
        return gated("G5", out, 0), parts

    def _mixture(self, w: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config.moe
        logits = x @ w["moe.router.weight"].T
        scores = logits.softmax(-1) if config.score == "softmax" else 1 / (1 + torch.exp(-logits))
        bias = config.bias_update_rate * w["moe.router.bias_steps"] if config.bias_update_rate else 0
        out = torch.zeros_like(x)
        for row in range(x.shape[0]):
            for place in range(x.shape[1]):
                of_token, token = scores[row, place], x[row, place]
                chosen = (of_token + bias).argsort(descending=True)[: config.top_k].tolist()
                whole = sum(of_token[expert] for expert in chosen) if config.renormalize else 1
                for expert in chosen:
                    gate, up = w["moe.experts.gate_up"][expert].chunk(2)
                    out[row, place] += of_token[expert] / whole * _swiglu(token, gate, up, w["moe.experts.down"][expert])
        if config.shared_ffn_size:
            shared = _swiglu(x, *(w[f"moe.shared_expert.{name}.weight"] for name in ("gate", "up", "down")))
            out += shared / (1 + torch.exp(-(x @ w["moe.shared_gate.weight"].T))) if config.shared_gate else shared
        return out, scores / scores.sum(-1, keepdim=True)


def _head(weight: Tensor, head: int, width: int) -> Tensor:
    return weight[head * width : (head + 1) * width]


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Channels i and i + d/2 as a complex number, turned."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat([turned.real, turned.imag], -1)


def _key_or_value(config, w: Mapping[str, Tensor], name: str, x: Tensor, head: int) -> Tensor:
    """Of one head; of a switch head the best of its projections."""
    width, switch = config.head_dim, config.switch
    first = x @ _head(w[f"attention.{name}.weight"], head, width).T
    if name not in switch.switched:
        return first
    others = [w[f"attention.{name}_switch.experts.{i}.weight"] for i in range(switch.num_experts - 1)]
    each = [first, *(x @ _head(other, head, width).T for other in others)]
    logits = x @ _head(w[f"attention.{name}_switch.router.weight"], head, switch.num_experts).T
    least = logits.sort(-1, descending=True).values[..., switch.top_k - 1]
    weights = [torch.where(of_one >= least, 1 / (1 + torch.exp(-of_one)), 0) for of_one in logits.unbind(-1)]
    return sum(weight[..., None] * one for weight, one in zip(weights, each, strict=True))


def _scores(config: ModelConfig, weight: Tensor | None, x: Tensor) -> Tensor | None:
    """[b, s, heads, channels]: act of what the gate's weight makes of each token, for each of its heads."""
    gate = config.attention.gate
    if weight is None:
        return None
    heads, width = config.gate_scores
    of_head = [
        x @ _head(weight, head, width).T if gate.score == "input" else weight[head].expand(*x.shape[:2], width) for head in range(heads)
    ]
    scores = torch.stack([ACTIVATIONS[gate.activation](logits) for logits in of_head], 2)
    return scores.mean(2, keepdim=True) if gate.head_shared else scores


def _gated(gate: GateConfig, y: Tensor, scores: Tensor | None, head: int, eps: float) -> Tensor:
    if gate.score == "constant":
        return gate.constant * y
    if gate.score == "self":
        return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() if gate.activation == "rmsnorm" else ACTIVATIONS[gate.activation](y)
    of_head = scores[:, :, 0 if gate.head_shared else head]
    return y * of_head if gate.combine == "multiply" else y + of_head


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate.T
    return (gated / (1 + torch.exp(-gated)) * (x @ up.T)) @ down.T


# ---- the figures


def assert_figures(found: LayerFigures, dense: Dense, *, queries: Sequence[int], to: float = 1e-6, what: str = "") -> None:
    """The figures of a layer are those of the definitions, up to `to` times the scale of what they are of."""
    _check_gate(found, dense, to, what)
    _check_attention(found, dense, queries, to, what)
    _check_hidden(found, dense, to, what)
    for index, values in enumerate((dense.attended, dense.projected)):
        sizes = values.abs().flatten()
        _close(found.output.mean_abs[index], sizes.mean(), to * sizes.max(), f"{what}: mean |output| {index}")
        for share, bound in ((found.output.below_001, 1e-2), (found.output.below_0001, 1e-3)):
            _share_close(share[index], sizes, bound, to, f"{what}: share of |output| below {bound} {index}")
    if dense.shares is None:
        assert found.router is None, what
    else:
        entropies = [-sum(p * log(p) for p in shares) for shares in dense.shares.flatten(0, 1).tolist()]
        _close(found.router.entropy, sum(entropies) / len(entropies), to, f"{what}: router entropy")


def _check_gate(found: LayerFigures, dense: Dense, to: float, what: str) -> None:
    if dense.scores is None:
        assert found.gate is None, what
        return
    gate, scores = found.gate, dense.scores
    values, scale = scores.flatten(), scores.abs().max()
    _close(gate.mean, values.mean(), to * scale, f"{what}: gate mean")
    _close(gate.std, values.std(correction=0), to * scale, f"{what}: gate standard deviation")
    _share_close(gate.below_01, values, 0.1, to, f"{what}: gate below 0.1")
    _share_close(gate.below_05, values, 0.5, to, f"{what}: gate below 0.5")
    means = [scores[:, :, head].mean().item() for head in range(scores.shape[2])]
    assert len(gate.head_means) == len(means), what
    for one, expected in zip(gate.head_means, means, strict=True):
        _close(one, expected, to * scale, f"{what}: gate mean of a head")
    assert gate.dead_heads == sum(mean < 0.01 for mean in means), what
    assert gate.saturated_heads == sum(mean > 0.99 for mean in means), what
    assert sum(gate.histogram) == len(values), f"{what}: the histogram counts {sum(gate.histogram)} of {len(values)}"
    for bound in range(1, GATE_BINS):
        _share_close(sum(gate.histogram[:bound]) / len(values), values, bound / GATE_BINS, to, f"{what}: histogram below bin {bound}")


def _check_attention(found: LayerFigures, dense: Dense, queries: Sequence[int], to: float, what: str) -> None:
    shares = dense.logits.softmax(-1)
    looked_at = [(row, query) for row in range(shares.shape[0]) for query in queries]
    later = [(row, query) for row, query in looked_at if dense.firsts[row][query] < query]
    attention, heads = found.attention, shares.shape[1]
    assert attention.rows == heads * len(looked_at), what
    for of_first, uniform, rows in (
        (attention.first_token_with_0, attention.uniform_with_0, looked_at),
        (attention.first_token, attention.uniform, later),
    ):
        firsts = [shares[row, head, query, dense.firsts[row][query]].item() for row, query in rows for head in range(heads)]
        alike = [1 / (query - dense.firsts[row][query] + 1) for row, query in rows]
        if rows:
            _close(of_first, sum(firsts) / len(firsts), to, f"{what}: share of the first token")
            _close(uniform, sum(alike) / len(alike), 1e-14, f"{what}: uniform share")
        else:
            assert of_first != of_first and uniform != uniform, f"{what}: a mean of nothing is {of_first}"
    visible = torch.stack([dense.logits[row, :, query] for row, query in looked_at])
    _close(attention.max_logit, visible.max(), to * visible[visible.isfinite()].abs().max(), f"{what}: largest logit")


def _check_hidden(found: LayerFigures, dense: Dense, to: float, what: str) -> None:
    sizes = dense.hidden.abs()
    by_channel = sizes.amax((0, 1))
    first, second = by_channel.sort(descending=True).values[:2]
    assert first - second > 10 * to * first, f"{what}: two channels are too close; choose other inputs"
    _close(found.hidden.max_abs, first, to * first, f"{what}: largest hidden state")
    assert found.hidden.channel == by_channel.tolist().index(first.item()), what
    _close(found.hidden.mean_max_abs, sizes.flatten(1).amax(1).mean(), to * first, f"{what}: largest hidden state of each sequence")


def _close(found: float, expected: Tensor | float, tolerance: Tensor | float, what: str) -> None:
    assert abs(found - float(expected)) <= float(tolerance), f"{what} is {found!r}, not {float(expected)!r} to {float(tolerance):.1e}"


def _share_close(found: float, values: Tensor, bound: float, to: float, what: str) -> None:
    """The share of values below a bound; those so near to it that rounding may move them across count either way."""
    near = to * max(float(values.abs().max()), 1)
    low, high = ((values < bound + shift).double().mean().item() for shift in (-near, near))
    assert high - low < 0.02, f"{what}: {high - low:.0%} lie near the bound; choose other inputs"
    assert low - 1e-12 <= found <= high + 1e-12, f"{what} is {found!r}, not {low!r} to {high!r}"
