"""What the figures are called and mean, in words: one home for pictures, tables and the command line."""

from collections.abc import Sequence
from math import isnan

PAPER = "paper's Table 4 (arXiv 2505.06708): its 15A2B MoE, 400B tokens, its own text"
PAPER_CAUTION = (
    "The paper's rows are of another model on another text: compare what a gate changes, not our numbers with the paper's."
)

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "Gate score",
        "act(S), what the gate multiplies (or adds to) a value with, S the gate's logits: mean, standard deviation (std), shares below 0.1 "
        "and 0.5, over all tokens, heads and channels, then over the layers that have a gate. 0 lets nothing through, 1 everything.",
    ),
    (
        "F-Attn",
        "share of attention, softmax(q k / sqrt(d)), on the first token, 0 to 1: mean over heads and query positions, then over layers. "
        "With query 0, as in the paper, the first token's own row counts, which sees nothing but itself (share 1); without, it is not. "
        "Where attention stays within documents, the first token is that of the query's document.",
    ),
    (
        "Uniform attention",
        "the yardstick of F-Attn: what it would be if each query attended alike to all keys that it sees, the mean of 1 / (position + 1). "
        "F-Attn far above it is an attention sink.",
    ),
    (
        "M-Act",
        "massive activations: the largest absolute hidden state (over tokens and channels) of each sequence that a layer's block gives on; "
        "mean over sequences, then over layers. Max: the largest of all.",
    ),
    (
        "SDPA output",
        "the numbers that the attention's heads yield, softmax(q k / sqrt(d)) v: before the gate, and as the output projection gets them. "
        "Without a gate at that place (G1) both are the same.",
    ),
    ("Attention logit", "q k / sqrt(d), before the softmax; the largest of all keys that their queries see."),
    ("PPL", "perplexity, exp of the mean cross-entropy (nats) over all predicted tokens; lower is better."),
)
"""Each with its name, for captions."""
ABSENT = ("-", "no gate scores, or not printed in the paper; n/a: not defined (only query 0 was seen).")


def defined(*names: str) -> list[tuple[str, str]]:
    """Some of them, by their names."""
    meanings = dict(DEFINITIONS)
    return [(name, meanings[name]) for name in names]


def number(value: float | None, places: int = 3) -> str:
    """A mean or a share, with so many places; "-" where there is nothing to measure, "n/a" where it is not defined."""
    if value is None:
        return "-"
    return "n/a" if isnan(value) else f"{value:.{places}f}"


def size(value: float | None) -> str:
    """A number of any size, with three digits and more: 1,053, 94.1, 0.0123."""
    if value is None:
        return "-"
    if isnan(value):
        return "n/a"
    digits = f"{value:.3g}"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else digits


def count(parameters: int) -> str:
    """A number of parameters: 15.1B, 203M, 88K."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}" if parameters < 999.5 * unit else f"{parameters / unit:,.0f}{letter}"
    return str(parameters)


def shortened(text: str, length: int) -> str:
    """On one line, with a gap in the middle where it is longer."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def labels(names: Sequence[str], length: int = 36) -> list[str]:
    """Short names that still tell the models apart: those that became the same get their number."""
    short = [shortened(name, length) for name in names]
    return [f"{one} #{index + 1}" if short.count(one) > 1 else one for index, one in enumerate(short)]
