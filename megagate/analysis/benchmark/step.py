"""The rows of `tools/benchmark.py step`: one full training step of megagate, of its peers, and of megagate with one thing more.

Pure: what loads torch runs in the rows' own processes (`step_plain.py`, `step_zero.py`, `step_transformers.py`).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megagate.analysis.benchmark.interleave import Entrant, Series, run_rounds
from megagate.analysis.benchmark.paired import Ratio, paired_ratio
from megagate.config.count import flops_per_token
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig

BASE = "plain"
PEAK = "matmul"
"""Not a row: the bf16 matrix product whose best round is the machine's peak."""
_WARMUP = 3
_PACKAGE = __package__


@dataclass(frozen=True)
class Shape:
    """What is trained: a model without gate and auxiliary losses, and the tokens of one step."""

    model: ModelConfig
    seq_len: int
    micro_batch: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.seq_len * self.micro_batch


def _model(hidden: int, heads: tuple[int, int], experts: tuple[int, int, int], *, layers: int = 4, vocab: int = 8192) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        attention=AttentionConfig(num_heads=heads[0], num_kv_heads=heads[1], head_dim=64),
        moe=MoEConfig(num_experts=experts[0], top_k=experts[1], ffn_size=experts[2], balance_coef=0.0, z_loss_coef=0.0),
    )


SHAPES: dict[str, Shape] = {
    "S": Shape(_model(512, (8, 2), (32, 4, 256)), seq_len=512, micro_batch=4),
    "L": Shape(_model(1024, (16, 4), (64, 8, 256)), seq_len=1024, micro_batch=2),
    "tiny": Shape(_model(64, (2, 1), (4, 2, 32), layers=1, vocab=256), seq_len=32, micro_batch=2),
}
"""`S` and `L` are for figures, `tiny` for tests of the command."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        title: What is measured.
        target: `module:function` of this package that makes the step; called with the shape's name and `arguments`.
        arguments: Of that function.
        environment: Of the row's process.
        warmup: Steps before the first round.
    """

    title: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    warmup: int = _WARMUP


_QWEN = Row("transformers Qwen3Moe, grouped_mm, as shipped", "step_transformers:qwen3_moe")
_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

ROWS: dict[str, Row] = {
    BASE: Row("megagate: plain engine, no gate", "step_plain:plain"),
    "qwen3moe": _QWEN,
    "qwen3moe-cache": replace(_QWEN, title=f"the same, {_CACHE}=20000, warmed up", environment={_CACHE: "20000"}, warmup=24),
    "elementwise": Row("megagate + elementwise gate", "step_plain:plain", {"gate": "elementwise"}),
    "headwise": Row("megagate + headwise gate", "step_plain:plain", {"gate": "headwise"}),
    "aux": Row("megagate + balance loss and z-loss", "step_plain:plain", {"auxiliary": True}),
    "zero1-bf16": Row("megagate, DeepSpeed ZeRO-1, bf16 gradients", "step_zero:zero", {"grad_dtype": "model"}),
    "zero1-fp32": Row("megagate, DeepSpeed ZeRO-1, fp32 gradients", "step_zero:zero", {"grad_dtype": "fp32"}),
}
"""In the order of the table. The plain rows keep and update bf16 weights; ZeRO keeps fp32 masters and clips."""


@dataclass(frozen=True)
class Line:
    """What the table says of a row. `cost` is its step time over the base's, `share` of the machine's measured peak (None without it)."""

    key: str
    seconds: float
    tokens_per_second: float
    cost: Ratio
    share: float | None
    peak_rss: int
    warmup: int


@dataclass(frozen=True)
class Table:
    """The result: its lines, complete rounds, and the best rate of a large bf16 matrix product, FLOP/s."""

    lines: list[Line]
    rounds: int
    peak_flops: float | None
    series: dict[str, Series]

    def record(self) -> dict[str, Any]:
        """Every round's numbers."""
        rows = {key: vars(series) for key, series in self.series.items()}
        return {"rounds": self.rounds, "peak_flops": self.peak_flops, "rows": rows}


def measure(
    keys: Sequence[str], *, shape: str, rounds: int, deadline: float, threads: int, tell: Callable[[str], None] = lambda text: None
) -> Table:
    """Measure rows against the base, which always takes part.

    Args:
        keys: Of `ROWS`.
        shape: Of `SHAPES`.
        rounds: Steps of each row.
        deadline: On `time.monotonic`'s clock.
        threads: Of each process.
        tell: Gets a line of progress.
    """
    keys = [BASE, *(key for key in ROWS if key in keys and key != BASE)]
    entrants = [_entrant(key, ROWS[key], shape, threads) for key in keys]
    peak = Row("", "step_plain:matmul_peak", warmup=1)
    series = run_rounds([*entrants, _entrant(PEAK, peak, shape, threads)], rounds=rounds, deadline=deadline, tell=tell)
    return _table(series, SHAPES[shape])


def _entrant(key: str, row: Row, shape: str, threads: int) -> Entrant:
    environment = {"OMP_NUM_THREADS": str(threads), **row.environment}
    return Entrant(key, f"{_PACKAGE}.{row.target}", {"shape": shape, **row.arguments}, environment, row.warmup)


def _table(series: dict[str, Series], shape: Shape) -> Table:
    rounds = len(series[BASE].seconds)
    rates = [note["flops"] / seconds for note, seconds in zip(series[PEAK].notes, series[PEAK].seconds, strict=True)]
    peak = max(rates, default=None)
    lines = []
    for key, row in ROWS.items():
        if key not in series or not rounds:
            continue
        seconds = statistics.median(series[key].seconds)
        # Every row does the base's work; what a gate adds is its cost, not its merit.
        share = shape.tokens * flops_per_token(shape.model, shape.seq_len) / seconds / peak
        cost = paired_ratio(series[key].seconds, series[BASE].seconds)
        lines.append(Line(key, seconds, shape.tokens / seconds, cost, share, series[key].peak_rss, row.warmup))
    return Table(lines, rounds, peak, series)


def gated(model: ModelConfig, granularity: str | None) -> ModelConfig:
    """The model with a gate on the attention output, or as it is."""
    if granularity is None:
        return model
    return replace(model, attention=replace(model.attention, gate=GateConfig("G1", granularity)))


def markdown(table: Table) -> str:
    """A row for each line."""
    rows = [
        "| row | step, s | tokens/s | step time / base [95 %] | share of peak | peak RSS, GB | warm-up steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in table.lines:
        cells = [
            f"{ROWS[line.key].title} (`{line.key}`)",
            f"{line.seconds:.3f}",
            f"{line.tokens_per_second:.0f}",
            str(line.cost),
            f"{100 * line.share:.1f} %",
            f"{line.peak_rss / 1e9:.2f}",
            str(line.warmup),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
