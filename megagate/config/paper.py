"""Every experiment of the paper's Tables 1, 2, 3, 4 and 6 as a preset: what to run, and what the paper saw.

Source: arXiv 2505.06708, Table 7 (sizes), section 3 (training), Tables 1-4 and 6 (rows). What the paper does not print is a choice of ours:
the vocabulary (Qwen's), weight decay (of every matrix, an input-independent gate among them), clipping at 1, the seed, the spread of
initial weights, the epsilon of norms, that the weights of chosen experts are renormalised, the coefficients of the auxiliary losses, the
warm-up and the floor of the dense runs, and steps where it gives tokens.
"""

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megagate.config.count import narrowed_ffn_size
from megagate.config.keys import flatten, from_dict
from megagate.config.rules import SAME_RUN_KEYS
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

Settings = Mapping[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Preset:
    """A run by name.

    Args:
        name: Such as `paper/table1/row05`.
        title: The row's words.
        settings: What differs from the defaults of `RunConfig`.
        baseline: Name of the preset that it is compared with; its own for a baseline.
        figures: The paper's figures of this row: `added_millions` parameters, `ppl`, benchmark scores in percent, statistics of Table 4.
            None where the run diverged.
    """

    name: str
    title: str
    settings: Settings
    baseline: str
    figures: Mapping[str, float | None]

    @property
    def config(self) -> RunConfig:
        """The whole run."""
        return from_dict(self.settings)


@functools.cache
def presets() -> Mapping[str, Preset]:
    """All presets by name, in the order of the tables."""
    rows = [*_table1(), *_table2(), *_table3(), *_table4(), *_table6(), *_released()]
    return MappingProxyType({row.name: row for row in rows})


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: There is none; the message shows the nearest names.
    """
    found = presets().get(name)
    if not name:
        raise ConfigError("--preset ('') names no preset; give one such as paper/table1/row05; tools/count_params.py --all lists them")
    if found is None:
        near = difflib.get_close_matches(name, presets(), n=3, cutoff=0.0)
        raise ConfigError(f"--preset {name} is unknown; the nearest are {', '.join(near)}; tools/count_params.py --all lists every preset")
    return found


def decided(name: str) -> dict[str, Any]:
    """What `--preset` sets: each key that decides what a run computes, and each that any preset sets.

    Also those that keep their default: a baseline after a gated preset, or after a file with a gate, is ungated. The layout, the log and
    other `SAME_RUN_KEYS` that no preset sets stay as they are.

    Raises:
        ConfigError: There is no such preset.
    """
    chosen = preset(name)
    set_by_any = {key for row in presets().values() for key in row.settings}
    return {key: value for key, value in flatten(chosen.config).items() if key in set_by_any or not key.startswith(SAME_RUN_KEYS)}


# ---- the models of Table 7, and how they were trained

_TRAINING: Settings = {
    "train.steps": 100_000,
    "train.global_batch_size": 1024,
    "train.micro_batch_size": 1,
    "train.seq_len": 4096,
    "data.path": "data/pretrain",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.weight_decay": 0.1,
    "optim.grad_clip": 1.0,
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 1000,
    "schedule.min_lr": 3e-5,
    "precision.dtype": "bf16",
    "checkpoint.every": 1000,
    "checkpoint.keep": 3,
    "eval.every": 1000,
    "eval.batches": 2,
}
_MOE: Settings = _TRAINING | {
    "model.vocab_size": 151_936,
    "model.hidden_size": 2048,
    "model.num_layers": 24,
    "model.attention.num_heads": 32,
    "model.attention.num_kv_heads": 4,
    "model.attention.head_dim": 128,
    "model.moe.num_experts": 128,
    "model.moe.top_k": 8,
    "model.moe.ffn_size": 768,
    "model.moe.balance_coef": 1e-3,
    "model.moe.z_loss_coef": 1e-3,
    "train.recompute": True,
    "optim.lr": 2e-3,
}
_DENSE_28: Settings = _TRAINING | {
    "model.vocab_size": 151_936,
    "model.hidden_size": 2048,
    "model.num_layers": 28,
    "model.ffn_size": 6144,
    "model.tie_embeddings": True,
    "model.attention.num_heads": 16,
    "model.attention.num_kv_heads": 8,
    "model.attention.head_dim": 128,
    "optim.lr": 4e-3,
}
_DENSE_48: Settings = _DENSE_28 | {"model.hidden_size": 1536, "model.num_layers": 48, "model.ffn_size": 4608}


def _gate(position: str, granularity: str = "elementwise", **others: Any) -> Settings:
    """A gate's settings; `others` are further fields of `GateConfig`."""
    values = {"position": position, "granularity": granularity, **others}
    return {f"model.attention.gate.{field}": value for field, value in values.items()}


_ELEMENTWISE, _HEADWISE = _gate("G1"), _gate("G1", "headwise")


def _row(table: int, row: int, title: str, settings: Settings, figures: Settings, baseline: int = 1) -> Preset:
    name = f"paper/table{table}/row{row:02d}"
    folder = {"train.output_dir": f"runs/{name.replace('/', '-')}"}
    return Preset(name, title, {**settings, **folder}, f"paper/table{table}/row{baseline:02d}", MappingProxyType(dict(figures)))


# ---- Table 1: the 15A2B


def _table1() -> Iterator[Preset]:
    names = ("added_millions", "ppl", "hellaswag", "mmlu", "gsm8k", "ceval")
    rows: list[tuple[str, Settings, tuple[float, ...]]] = [
        ("baseline, q=32 k=4", {}, (0, 6.026, 73.07, 58.79, 52.92, 60.26)),
        ("k=8", {"model.attention.num_kv_heads": 8}, (50, 5.979, 73.51, 59.78, 52.16, 62.26)),
        ("q=48", {"model.attention.num_heads": 48}, (201, 5.953, 73.59, 58.45, 53.30, 59.67)),
        ("4 more experts", {"model.moe.num_experts": 132, "model.moe.top_k": 12}, (400, 5.964, 73.19, 58.84, 52.54, 63.19)),
        ("SDPA elementwise G1", _ELEMENTWISE, (201, 5.761, 74.64, 60.82, 55.27, 62.20)),
        ("v elementwise G2", _gate("G2"), (25, 5.820, 74.38, 59.17, 53.97, 61.00)),
        ("k elementwise G3", _gate("G3"), (25, 6.016, 72.88, 59.18, 50.49, 61.74)),
        ("q elementwise G4", _gate("G4"), (201, 5.981, 73.01, 58.74, 53.97, 62.14)),
        ("dense output G5", _gate("G5"), (100, 6.017, 73.32, 59.41, 50.87, 59.43)),
        ("SDPA headwise G1", _HEADWISE, (1.6, 5.792, 74.50, 60.05, 54.44, 62.61)),
        ("v headwise G2", _gate("G2", "headwise"), (0.2, 5.808, 74.38, 59.32, 53.53, 62.61)),
        ("SDPA head-shared G1", _gate("G1", head_shared=True), (201, 5.801, 74.34, 60.06, 53.15, 61.01)),
        ("v head-shared G2", _gate("G2", head_shared=True), (25, 5.867, 74.10, 59.02, 53.03, 60.61)),
        ("SDPA additive G1, SiLU", _gate("G1", activation="silu", combine="add"), (201, 5.821, 74.81, 60.06, 53.30, 60.98)),
        ("SDPA elementwise G1, SiLU", _gate("G1", activation="silu"), (201, 5.822, 74.22, 60.49, 54.59, 62.34)),
    ]
    for number, (title, delta, figures) in enumerate(rows, 1):
        yield _row(1, number, title, _MOE | delta, dict(zip(names, figures, strict=True)))


# ---- Table 2: dense models at rising learning rates


def _table2() -> Iterator[Preset]:
    names = ("ppl", "humaneval", "mmlu", "gsm8k", "hellaswag", "ceval", "cmmlu")
    long = {"train.steps": 417_000, "train.global_batch_size": 2048}
    wide = {"train.steps": 60_000, "train.global_batch_size": 4096}
    sandwich = {"model.sandwich_norm": True}
    none: Settings = {}
    gated, headwise = _ELEMENTWISE, _HEADWISE
    # row, model, tokens and batch, what differs, its title, baseline row, learning rate, figures
    rows: list[tuple[int, Settings, Settings, Settings, str, int, float, tuple[float, ...] | None]] = [
        (1, _DENSE_28, none, none, "28 layers, 400B: baseline", 1, 4e-3, (7.499, 28.66, 50.21, 27.82, 64.94, 49.15, 49.52)),
        (2, _DENSE_28, none, gated, "28 layers, 400B: SDPA elementwise", 1, 4e-3, (7.404, 29.27, 51.15, 28.28, 65.48, 50.72, 50.72)),
        (3, _DENSE_28, long, none, "28 layers, 3.5T: baseline", 3, 4.5e-3, (6.180, 34.15, 59.10, 69.07, 68.02, 68.19, 64.95)),
        (4, _DENSE_28, long, gated, "28 layers, 3.5T: SDPA elementwise", 3, 4.5e-3, (6.130, 37.80, 59.61, 70.20, 68.84, 68.52, 65.76)),
        (5, _DENSE_48, none, none, "48 layers, 400B: baseline", 5, 4e-3, (7.421, 28.05, 52.04, 32.98, 65.96, 51.11, 51.86)),
        (6, _DENSE_48, none, none, "48 layers, 400B: baseline", 6, 8e-3, (9.195, 21.34, 44.28, 15.24, 57.00, 43.11, 42.63)),
        (7, _DENSE_48, none, sandwich, "48 layers, 400B: sandwich norm", 6, 8e-3, (7.407, 30.49, 52.07, 32.90, 66.00, 52.04, 51.72)),
        (8, _DENSE_48, none, gated, "48 layers, 400B: SDPA elementwise", 5, 4e-3, (7.288, 31.71, 52.44, 32.37, 66.28, 52.06, 52.29)),
        (9, _DENSE_48, none, headwise, "48 layers, 400B: SDPA headwise", 5, 4e-3, (7.370, 31.10, 53.83, 34.12, 65.59, 55.07, 52.38)),
        (10, _DENSE_48, none, gated, "48 layers, 400B: SDPA elementwise", 6, 8e-3, (7.325, 31.10, 54.47, 36.62, 66.40, 53.91, 53.80)),
        (11, _DENSE_48, wide, none, "48 layers, 1T: baseline", 11, 5.3e-3, (7.363, 29.88, 54.44, 32.22, 65.43, 53.72, 53.37)),
        (12, _DENSE_48, wide, none, "48 layers, 1T: baseline", 12, 8e-3, None),
        (13, _DENSE_48, wide, gated, "48 layers, 1T: SDPA elementwise", 11, 5.3e-3, (7.101, 34.15, 55.70, 36.69, 67.17, 54.51, 54.68)),
        (14, _DENSE_48, wide, gated, "48 layers, 1T: SDPA elementwise", 12, 8e-3, (7.078, 31.71, 56.47, 39.73, 67.38, 55.52, 55.77)),
    ]
    for number, base, tokens, delta, title, baseline, lr, figures in rows:
        settings = base | tokens | delta | {"optim.lr": lr}
        if "model.attention.gate.position" in delta:
            settings |= _narrowed(settings, base)
        scores = dict.fromkeys(names) if figures is None else dict(zip(names, figures, strict=True))
        yield _row(2, number, f"{title}, LR {lr * 1e3:.1f}e-3", settings, scores, baseline)


def _narrowed(settings: Settings, base: Settings) -> Settings:
    """The feed-forward width with which a gated dense model has its baseline's parameters."""
    return {"model.ffn_size": narrowed_ffn_size(from_dict(settings).model, from_dict(base).model)}


# ---- Tables 3, 4 and 6: what the gate's parts are worth, on the 15A2B


def _table3() -> Iterator[Preset]:
    rows: list[tuple[str, Settings, float]] = [
        ("baseline", {}, 6.026),
        ("SDPA elementwise G1, sigmoid", _ELEMENTWISE, 5.761),
        ("v elementwise G2, sigmoid", _gate("G2"), 5.820),
        ("SDPA additive G1, SiLU", _gate("G1", activation="silu", combine="add"), 5.821),
        ("RMSNorm of each head at G1", _gate("G1", score="self", activation="rmsnorm"), 5.847),
        ("SiLU at G1, no parameters", _gate("G1", score="self", activation="silu"), 5.975),
        ("SDPA additive G1, identity", _gate("G1", activation="identity", combine="add"), 5.882),
    ]
    for number, (title, delta, ppl) in enumerate(rows, 1):
        yield _row(3, number, title, _MOE | delta, {"ppl": ppl})


def _table4() -> Iterator[Preset]:
    names = ("gate_score_mean", "max_activation", "first_token_attention", "ppl")
    rows: list[tuple[str, Settings, tuple[float | None, ...]]] = [
        ("baseline", {}, (None, 1053, 0.467, 6.026)),
        ("SDPA elementwise", _ELEMENTWISE, (0.116, 94, 0.048, 5.761)),
        ("SDPA headwise", _HEADWISE, (0.172, 98, 0.073, 5.792)),
        ("SDPA elementwise head-shared", _gate("G1", head_shared=True), (0.271, 286, 0.301, 5.801)),
        ("v elementwise", _gate("G2"), (0.221, 125, 0.297, 5.820)),
        ("SDPA input-independent", _gate("G1", score="parameter"), (0.335, 471, 0.364, 5.917)),
        ("SDPA elementwise NS-sigmoid", _gate("G1", activation="ns_sigmoid"), (0.653, 892, 0.451, 5.900)),
    ]
    for number, (title, delta, figures) in enumerate(rows, 1):
        seen = {name: figure for name, figure in zip(names, figures, strict=True) if figure is not None}
        yield _row(4, number, title, _MOE | delta, seen)


def _table6() -> Iterator[Preset]:
    rows: list[tuple[str, int, int, float, float]] = [
        ("kv", 8, 8, 38, 5.847),
        ("kv", 4, 4, 13, 5.935),
        ("v", 4, 4, 13, 5.820),
        ("v", 8, 2, 25, 5.870),
        ("v", 1, 1, 3, 5.808),
    ]
    yield _row(6, 1, "baseline", _MOE, {"added_millions": 0, "ppl": 6.026})
    for number, (projections, experts, top_k, added, ppl) in enumerate(rows, 2):
        values = {"projections": projections, "num_experts": experts, "top_k": top_k}
        delta = {f"model.attention.switch.{field}": value for field, value in values.items()}
        title = f"switch {projections}, {top_k} of {experts}"
        yield _row(6, number, title, _MOE | delta, {"added_millions": added, "ppl": ppl})


# ---- the models that the authors released


def _released() -> Iterator[Preset]:
    """The 1B models; only the elementwise one's FFN width is known beside Table 7."""
    rows: list[tuple[str, Settings]] = [
        ("1b_baseline", {}),
        ("1b_gate_headwise", _HEADWISE),
        ("1b_gate_elementwise", _ELEMENTWISE | {"model.ffn_size": 5504}),
    ]
    for name, delta in rows:
        folder = {"train.output_dir": f"runs/released-{name}"}
        yield Preset(f"released/{name}", name, _DENSE_28 | delta | folder, "released/1b_baseline", MappingProxyType({}))
