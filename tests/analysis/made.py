"""Made-up results of analyses."""

from math import exp, log, nan

import numpy as np

from megagate.analysis.gate.result import Analysis, ModelResult
from megagate.probe.figures import GATE_BINS, AttentionFigures, GateFigures, HiddenFigures, LayerFigures, OutputFigures

NAMES = ("baseline", "headwise", "elementwise", "value", "shared", "additive")
SINK = (0.47, 0.07, 0.05, 0.30, 0.30, 0.2)
MASSIVE = (3.0, 1.8, 1.7, 2.0, 2.3, 2.5)  # decades


def analysis(*, models: int = 3, layers: int = 6, names=None, gated=None, map_tokens: int = 12, tokens=None, seq_len=512) -> Analysis:
    """Models with a sink and massive activations, the first without a gate; `gated` says which have one (default: all but the first)."""
    names = names or [NAMES[index % 6] + ("" if index < 6 else f" {index}") for index in range(models)]
    gated = gated if gated is not None else [index > 0 for index in range(len(names))]
    each = enumerate(zip(names, gated, strict=True))
    made = [_model(name, index, layers, has, map_tokens, tokens, seq_len) for index, (name, has) in each]
    return Analysis(tuple(made), "held-out.jsonl", 16, seq_len, "fp32", "cpu")


def _model(name: str, index: int, layers: int, gated: bool, map_tokens: int, tokens, seq_len: int) -> ModelResult:
    draw = np.random.default_rng(index)
    chosen = sorted({layer for layer in (0, 6, 20, 27) if layer < layers} or {0})
    words = "none" if not gated else "elementwise at G1, sigmoid"
    texts = tuple(tokens or [f" word{i}" for i in range(map_tokens)])[:map_tokens]
    return ModelResult(
        name=name,
        path=f"runs/{name}",
        kind="native, step 600",
        gate=words,
        parameters=1_720_000_000 + 10**6 * index,
        loss=log(6.026 - 0.05 * index),
        targets=16 * (seq_len - 1),
        layers=tuple(_layer(draw, index % 6, layer, layers, gated, seq_len) for layer in range(layers)),
        maps={layer: _map(draw, SINK[index % 6], len(texts)) for layer in chosen},
        map_tokens=texts,
    )


def _layer(draw, index: int, layer: int, layers: int, gated: bool, seq_len: int) -> LayerFigures:
    depth = layer / max(1, layers - 1)
    scores = draw.beta(0.4 + 0.4 * depth, 3.0 + index, size=4000)
    gate = GateFigures(
        mean=float(scores.mean()),
        std=float(scores.std()),
        below_01=float((scores < 0.1).mean()),
        below_05=float((scores < 0.5).mean()),
        head_means=(0.1, 0.2),
        dead_heads=0,
        saturated_heads=0,
        histogram=tuple(int(one) for one in np.histogram(scores, GATE_BINS, (0, 1))[0]),
    )
    positions = np.arange(1, seq_len + 1)
    without = float((1 / positions[1:]).mean()) if seq_len > 1 else nan
    share = SINK[index] * (0.4 + depth) * float(draw.uniform(0.8, 1.1))
    attention = AttentionFigures(
        first_token=share if seq_len > 1 else nan,
        first_token_with_0=(share * (seq_len - 1) + 1) / seq_len,
        uniform=without,
        uniform_with_0=float((1 / positions).mean()),
        max_logit=float(draw.uniform(5, 30)),
        rows=seq_len,
    )
    largest = 10 ** (MASSIVE[index] * min(1.0, 0.3 + 2 * depth)) * float(draw.uniform(0.9, 1.1))
    before, after = (0.7, 0.05 + 0.02 * index) if gated else (0.7, 0.7)
    output = OutputFigures((before, after * (0.5 + depth)), (0.01, 0.4 if gated else 0.01), (0.001, 0.1 if gated else 0.001))
    return LayerFigures(gate if gated else None, attention, HiddenFigures(largest * 1.3, 7, largest), output, None)


def _map(draw, sink: float, size: int) -> tuple[tuple[float, ...], ...]:
    rows = []
    for query in range(size):
        scores = np.array([exp(-0.15 * (query - key)) * draw.uniform(0.2, 1) for key in range(query + 1)])
        shares = (1 - sink) * scores / scores.sum()
        shares[0] += sink
        rows.append(tuple((shares / shares.sum()).tolist()) + (0.0,) * (size - query - 1))
    return tuple(rows)
