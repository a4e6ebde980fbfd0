"""What is measured of a layer, and what of a model: numbers with their definitions, in one place for training and analysis."""

from dataclasses import dataclass

GATE_BINS = 50
"""Of the histogram of gate scores, over [0, 1]; scores beyond lie in the first or the last bin."""


@dataclass(frozen=True)
class GateFigures:
    """Of the gate's scores act(S), over tokens, heads and channels.

    Args:
        mean: Of all scores.
        std: Their standard deviation.
        below_01: The share below 0.1.
        below_05: The share below 0.5.
        head_means: The mean of each head's scores; one number where heads share them.
        dead_heads: Heads whose mean is below 0.01.
        saturated_heads: Heads whose mean is above 0.99.
        histogram: Counts in `GATE_BINS` bins of equal width over [0, 1]; of scores that are nan none.
    """

    mean: float
    std: float
    below_01: float
    below_05: float
    head_means: tuple[float, ...]
    dead_heads: int
    saturated_heads: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class AttentionFigures:
    """Of the rows of softmax(q k^T / sqrt(d)) that were looked at, over heads and sequences.

    The first token is that of the row or, where attention stays within documents, of the query's document; query 0 is that token itself,
    which sees nothing else, so that its share is 1 in any model.

    Args:
        first_token: Mean share of attention on the first token, without queries 0; nan where only those were looked at.
        first_token_with_0: The same with them, as in arXiv 2505.06708.
        uniform: What `first_token` were if all visible keys had equal shares, the mean of 1 / (position + 1).
        uniform_with_0: What `first_token_with_0` were.
        max_logit: The largest q k / sqrt(d) of a key that the query sees.
        rows: Rows that were looked at, over heads and sequences.
    """

    first_token: float
    first_token_with_0: float
    uniform: float
    uniform_with_0: float
    max_logit: float
    rows: int


@dataclass(frozen=True)
class HiddenFigures:
    """Of the hidden states that a block gives on; maxima are nan where one of the numbers is, and the channel is then the first of such.

    Args:
        max_abs: The largest absolute value over all tokens and channels.
        channel: Its channel; of several the first.
        mean_max_abs: The largest absolute value of each sequence, averaged over sequences: the paper's M-Act, of one layer.
    """

    max_abs: float
    channel: int
    mean_max_abs: float


@dataclass(frozen=True)
class OutputFigures:
    """Of the numbers of the attention's heads (softmax(q k^T / sqrt(d)) v), before the gate and as the output projection gets them.

    Without a gate at G1 both are the same.

    Args:
        mean_abs: Mean of absolute values, before and after.
        below_001: Share of absolute values below 1e-2, before and after.
        below_0001: Share below 1e-3, before and after.
    """

    mean_abs: tuple[float, float]
    below_001: tuple[float, float]
    below_0001: tuple[float, float]


@dataclass(frozen=True)
class RouterFigures:
    """Of the router of a mixture of experts.

    Args:
        entropy: Mean over tokens of -sum_e p_e ln p_e, p the scores as shares of 1; nats, ln E where all experts are alike.
    """

    entropy: float


@dataclass(frozen=True)
class LayerFigures:
    """Of one layer.

    Args:
        gate: None where nothing is scored.
        attention: Of the rows that were looked at.
        hidden: Of what the block gives on.
        output: Of the attention's heads.
        router: None in a dense block.
    """

    gate: GateFigures | None
    attention: AttentionFigures
    hidden: HiddenFigures
    output: OutputFigures
    router: RouterFigures | None
