"""The paper's rows: figures and settings typed in again from its tables, not read from `paper.py`."""

import subprocess
import sys
import typing
from collections.abc import Mapping
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

from megagate.config import model
from megagate.config.cli import parse
from megagate.config.count import count_parameters
from megagate.config.keys import all_keys, differences, flatten
from megagate.config.paper import Preset, decided, preset, presets
from megagate.config.rules import SAME_RUN_KEYS, check
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
ROWS = {1: 15, 2: 14, 3: 7, 4: 7, 6: 6}
RELEASED = ["released/1b_baseline", "released/1b_gate_headwise", "released/1b_gate_elementwise"]
OUTPUT_DIR = "train.output_dir"


def row(table: int, number: int) -> Preset:
    return preset(f"paper/table{table}/row{number:02d}")


def delta(of: Preset) -> dict[str, Any]:
    """In which values a row differs from its baseline, the folder aside; the gate's and the switch heads' keys without their groups."""
    changes = differences(preset(of.baseline).config, of.config)
    assert OUTPUT_DIR in {name for name, _, _ in changes} or of.name == of.baseline
    return {name.removeprefix("model.attention."): value for name, _, value in changes if name != OUTPUT_DIR}


def gate(position: str, **values: Any) -> dict[str, Any]:
    """The gate's values that are not the defaults."""
    return {f"gate.{field}": value for field, value in {"position": position, **values}.items()}


# ---- names and runs


def test_all_rows_of_the_tables_and_the_released_models() -> None:
    names = [f"paper/table{table}/row{number:02d}" for table, rows in ROWS.items() for number in range(1, rows + 1)]
    assert list(presets()) == [*names, *RELEASED]
    assert [of.name for of in presets().values()] == list(presets())


@pytest.mark.parametrize("name", presets())
def test_every_preset_runs_on_eight_ranks(name: str) -> None:
    config = preset(name).config
    check(config, world_size=8)
    assert preset(preset(name).baseline).baseline == preset(name).baseline, "a baseline is its own"
    assert config.train.output_dir == f"runs/{name.replace('/', '-')}"


def test_no_two_presets_write_into_one_folder() -> None:
    folders = {of.config.train.output_dir for of in presets().values()}
    assert len(folders) == len(presets())


@pytest.mark.parametrize("name", presets())
def test_a_row_and_its_baseline_see_the_same_batches(name: str) -> None:
    """They differ in the model, of the same tokens, and in the folder: not in seed, batch, length, data or schedule."""
    changed = {key for key, _, _ in differences(preset(preset(name).baseline).config, preset(name).config)}
    assert all(key.startswith("model.") for key in changed - {OUTPUT_DIR})
    assert "model.vocab_size" not in changed and "model.init_std" not in changed


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("paper/table1/row5")
    assert str(caught.value).startswith("--preset paper/table1/row5 is unknown; the nearest are paper/table1/row")
    assert "paper/table1/row05, " in str(caught.value)
    assert str(caught.value).endswith("; tools/count_params.py --all lists every preset")
    with pytest.raises(ConfigError, match=r"nearest are released/1b_gate_headwise, "):
        preset("1b_headwise")
    with pytest.raises(ConfigError, match=r"^--preset \(''\) names no preset; give one such as paper/table1/row05; "):
        preset("")


def test_an_unknown_preset_ends_the_job_with_2() -> None:
    command = [sys.executable, "-m", "megagate.train.main", "--preset", "paper/table5/row01"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "ConfigError: --preset paper/table5/row01 is unknown; the nearest are paper/table" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_preset_decides_the_whole_run() -> None:
    """All presets set the same keys, among them each that decides what is computed: the last preset leaves nothing of an earlier one."""
    keys = {name: set(decided(name)) for name in presets()}
    assert all(found == keys[RELEASED[0]] for found in keys.values())
    assert keys[RELEASED[0]] >= {name for name in all_keys() if not name.startswith(SAME_RUN_KEYS)}
    assert not {"parallel.tp", "parallel.ep", "parallel.zero_stage", "log.every", "wandb.mode", "train.resume"} & keys[RELEASED[0]]
    for name, of in presets().items():
        whole = flatten(of.config)
        assert decided(name) == {key: whole[key] for key in keys[name]}
        assert all(whole[key] == default for key, default in flatten(RunConfig()).items() if key not in keys[name])


@pytest.mark.parametrize(("example", "table", "number"), [("moe_15a2b", 1, 5), ("dense_1p7b_28l", 2, 1), ("dense_1p7b_48l", 2, 5)])
def test_the_examples_are_rows(example: str, table: int, number: int) -> None:
    config = parse(["--config", str(CONFIGS / f"{example}.yaml")], prog="megagate")
    assert [name for name, _, _ in differences(config, row(table, number).config)] == [OUTPUT_DIR]


# ---- the models of Table 7, and how they are trained

TRAINED = {
    "model.vocab_size": 151_936,
    "model.attention.head_dim": 128,
    "model.attention.qk_norm": True,
    "model.attention.rope.base": 10_000.0,
    "train.seq_len": 4096,
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 1000,
    "schedule.min_lr": 3e-5,
    "precision.dtype": "bf16",
}
SIZES = ("num_layers", "hidden_size", "attention.num_heads", "attention.num_kv_heads", "moe.num_experts", "moe.top_k", "moe.ffn_size")


def sizes(of: Preset) -> tuple[int, ...]:
    return tuple(flatten(of.config)[f"model.{name}"] for name in SIZES)


@pytest.mark.parametrize("name", presets())
def test_what_all_runs_share(name: str) -> None:
    values = flatten(preset(name).config)
    assert {key: values[key] for key in TRAINED} == TRAINED


def test_the_mixture_of_table_7() -> None:
    for table in (1, 3, 4, 6):
        config = row(table, 1).config
        assert sizes(row(table, 1)) == (24, 2048, 32, 4, 128, 8, 768)
        assert differences(config, row(1, 1).config) in ([], [(OUTPUT_DIR, config.train.output_dir, "runs/paper-table1-row01")])
    config = row(1, 1).config
    assert not config.model.tie_embeddings and config.model.moe.score == "softmax" and config.model.moe.balance_scope == "global_batch"
    assert min(config.model.moe.balance_coef, config.model.moe.z_loss_coef) > 0
    assert (config.optim.lr, config.train.steps, config.train.global_batch_size) == (2e-3, 100_000, 1024)
    assert count_parameters(config.model).total / 1e9 == pytest.approx(15.577, abs=5e-4)


def test_the_dense_models_of_table_7() -> None:
    for number in range(1, 15):
        layers, hidden, ffn = (28, 2048, 6144) if number <= 4 else (48, 1536, 4608)
        of = row(2, number)
        assert sizes(of)[:5] == (layers, hidden, 16, 8, 0)
        assert of.config.model.tie_embeddings
        assert preset(of.baseline).config.model.ffn_size == ffn


def test_tokens_and_learning_rates_of_table_2() -> None:
    """Row: (billion tokens, batch, thousandths of learning rate)."""
    runs = {
        1: (400, 1024, 4.0),
        3: (3500, 2048, 4.5),
        5: (400, 1024, 4.0),
        6: (400, 1024, 8.0),
        11: (1000, 4096, 5.3),
        12: (1000, 4096, 8.0),
    }
    baseline = {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 6, 7: 6, 8: 5, 9: 5, 10: 6, 11: 11, 12: 12, 13: 11, 14: 12}
    for number, base in baseline.items():
        of, (billions, batch, rate) = row(2, number), runs[base]
        train = of.config.train
        assert of.baseline == row(2, base).name
        assert train.global_batch_size == batch
        assert train.steps * batch * 4096 / 1e9 == pytest.approx(billions, rel=0.05)
        assert of.config.optim.lr == pytest.approx(rate / 1e3, rel=1e-12)
        assert of.title.endswith(f", LR {rate}e-3") and of.title.startswith("28 layers" if number <= 4 else "48 layers")
        assert {400: ", 400B: ", 3500: ", 3.5T: ", 1000: ", 1T: "}[billions] in of.title
    assert sum(round(row(2, number).config.optim.lr * 1e4) for number in baseline) == 796


# ---- what each row says and is

ELEMENTWISE, HEADWISE = gate("G1"), gate("G1", granularity="headwise")
SHARED, ADDITIVE = gate("G1", head_shared=True), gate("G1", combine="add")
SILU = {"gate.activation": "silu"}
DELTAS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [
        ("baseline, q=32 k=4", {}),
        ("k=8", {"num_kv_heads": 8}),
        ("q=48", {"num_heads": 48}),
        ("4 more experts", {"model.moe.num_experts": 132, "model.moe.top_k": 12}),
        ("SDPA elementwise G1", ELEMENTWISE),
        ("v elementwise G2", gate("G2")),
        ("k elementwise G3", gate("G3")),
        ("q elementwise G4", gate("G4")),
        ("dense output G5", gate("G5")),
        ("SDPA headwise G1", HEADWISE),
        ("v headwise G2", gate("G2", granularity="headwise")),
        ("SDPA head-shared G1", SHARED),
        ("v head-shared G2", gate("G2", head_shared=True)),
        ("SDPA additive G1, SiLU", ADDITIVE | SILU),
        ("SDPA elementwise G1, SiLU", ELEMENTWISE | SILU),
    ],
    3: [
        ("baseline", {}),
        ("SDPA elementwise G1, sigmoid", ELEMENTWISE),
        ("v elementwise G2, sigmoid", gate("G2")),
        ("SDPA additive G1, SiLU", ADDITIVE | SILU),
        ("RMSNorm of each head at G1", gate("G1", score="self", activation="rmsnorm")),
        ("SiLU at G1, no parameters", gate("G1", score="self", activation="silu")),
        ("SDPA additive G1, identity", ADDITIVE | {"gate.activation": "identity"}),
    ],
    4: [
        ("baseline", {}),
        ("SDPA elementwise", ELEMENTWISE),
        ("SDPA headwise", HEADWISE),
        ("SDPA elementwise head-shared", SHARED),
        ("v elementwise", gate("G2")),
        ("SDPA input-independent", gate("G1", score="parameter")),
        ("SDPA elementwise NS-sigmoid", gate("G1", activation="ns_sigmoid")),
    ],
    6: [
        ("baseline", {}),
        ("switch kv, 8 of 8", {"switch.projections": "kv", "switch.num_experts": 8, "switch.top_k": 8}),
        ("switch kv, 4 of 4", {"switch.projections": "kv", "switch.num_experts": 4, "switch.top_k": 4}),
        ("switch v, 4 of 4", {"switch.projections": "v", "switch.num_experts": 4, "switch.top_k": 4}),
        ("switch v, 2 of 8", {"switch.projections": "v", "switch.num_experts": 8, "switch.top_k": 2}),
        ("switch v, 1 of 1", {"switch.projections": "v"}),
    ],
}


@pytest.mark.parametrize("table", DELTAS)
def test_rows_of_the_mixture(table: int) -> None:
    assert [(row(table, number).title, delta(row(table, number))) for number in range(1, ROWS[table] + 1)] == DELTAS[table]
    assert {row(table, number).baseline for number in range(1, ROWS[table] + 1)} == {row(table, 1).name}


def test_rows_of_the_dense_models() -> None:
    """Gated ones have a feed-forward so narrow that they have the baseline's parameters; sandwich norms are only added."""
    sandwich: dict[str, Any] = {"model.sandwich_norm": True}
    narrow28, narrow48 = ELEMENTWISE | {"model.ffn_size": 5456}, ELEMENTWISE | {"model.ffn_size": 3920}
    expected = {2: narrow28, 4: narrow28, 7: sandwich, 8: narrow48, 9: HEADWISE, 10: narrow48, 13: narrow48, 14: narrow48}
    words = {2: "SDPA elementwise", 4: "SDPA elementwise", 7: "sandwich norm", 9: "SDPA headwise"}
    words |= dict.fromkeys((8, 10, 13, 14), "SDPA elementwise")
    for number in range(1, 15):
        assert delta(row(2, number)) == expected.get(number, {})
        assert f": {words.get(number, 'baseline')}, LR" in row(2, number).title


def test_gated_dense_models_are_of_their_baselines_size() -> None:
    for number in range(1, 15):
        of = row(2, number)
        total, wanted = (count_parameters(config.model).total for config in (of.config, preset(of.baseline).config))
        assert of.config.model.ffn_size % 16 == 0
        assert abs(total - wanted) <= 1e-3 * wanted


def test_the_released_models() -> None:
    assert [delta(preset(name)) for name in RELEASED] == [{}, HEADWISE, ELEMENTWISE | {"model.ffn_size": 5504}]
    assert {preset(name).baseline for name in RELEASED} == {RELEASED[0]}
    assert [name for name, _, _ in differences(preset(RELEASED[0]).config, row(2, 1).config)] == [OUTPUT_DIR]
    assert all(not preset(name).figures for name in RELEASED), "the paper prints no figures of them"


NOT_IN_THE_TABLES: dict[str, set[str]] = {
    "GateScore": {"constant"},  # a control of ours
    "RouterScore": {"sigmoid"},
    "BalanceScope": {"micro_batch", "sequence"},
}
LITERALS = {
    "model.attention.gate.position": "GatePosition",
    "model.attention.gate.granularity": "GateGranularity",
    "model.attention.gate.score": "GateScore",
    "model.attention.gate.activation": "GateActivation",
    "model.attention.gate.combine": "GateCombine",
    "model.attention.switch.projections": "SwitchProjections",
    "model.moe.score": "RouterScore",
    "model.moe.balance_scope": "BalanceScope",
}


def test_every_choice_is_in_the_tables_or_said_not_to_be() -> None:
    assert set(LITERALS) == {name for name, key in all_keys().items() if name.startswith("model.") and key.choices}
    for key, literal in LITERALS.items():
        used = {flatten(of.config)[key] for of in presets().values()}
        others = NOT_IN_THE_TABLES.get(literal, set())
        assert used | others == set(typing.get_args(getattr(model, literal)))
        assert not used & others


# ---- figures

# Table: figure: its column's sum.
SUMS: dict[int, Mapping[str, str]] = {
    1: {"added_millions": "1832.8", "ppl": "88.428", "hellaswag": "1107.94", "mmlu": "892.18", "gsm8k": "797.53", "ceval": "922.05"},
    2: {
        "ppl": "94.761",
        "humaneval": "399.41",
        "mmlu": "695.81",
        "gsm8k": "488.24",
        "hellaswag": "854.49",
        "ceval": "707.63",
        "cmmlu": "699.45",
    },
    3: {"ppl": "41.132"},
    4: {"gate_score_mean": "1.768", "max_activation": "3019", "first_token_attention": "2.001", "ppl": "41.017"},
    6: {"added_millions": "92", "ppl": "35.306"},
}
# One of each row, so that no two cells of a column are exchanged unseen.
PPL = {
    1: "6.026 5.979 5.953 5.964 5.761 5.820 6.016 5.981 6.017 5.792 5.808 5.801 5.867 5.821 5.822",
    2: "7.499 7.404 6.180 6.130 7.421 9.195 7.407 7.288 7.370 7.325 7.363 - 7.101 7.078",
    3: "6.026 5.761 5.820 5.821 5.847 5.975 5.882",
    4: "6.026 5.761 5.792 5.801 5.820 5.917 5.900",
    6: "6.026 5.847 5.935 5.820 5.870 5.808",
}
CELLS: list[tuple[int, int, str, float]] = [
    (1, 1, "ceval", 60.26),
    (1, 4, "added_millions", 400),
    (1, 4, "ceval", 63.19),
    (1, 5, "gsm8k", 55.27),
    (1, 7, "gsm8k", 50.49),
    (1, 10, "mmlu", 60.05),
    (1, 14, "hellaswag", 74.81),
    (1, 15, "ceval", 62.34),
    (2, 1, "cmmlu", 49.52),
    (2, 3, "gsm8k", 69.07),
    (2, 4, "humaneval", 37.80),
    (2, 6, "hellaswag", 57.00),
    (2, 7, "ceval", 52.04),
    (2, 9, "mmlu", 53.83),
    (2, 10, "gsm8k", 36.62),
    (2, 14, "cmmlu", 55.77),
    (4, 1, "max_activation", 1053),
    (4, 2, "gate_score_mean", 0.116),
    (4, 4, "first_token_attention", 0.301),
    (4, 7, "max_activation", 892),
    (6, 2, "added_millions", 38),
    (6, 5, "added_millions", 25),
    (6, 6, "added_millions", 3),
]


@pytest.mark.parametrize("table", SUMS)
def test_columns(table: int) -> None:
    rows = [row(table, number).figures for number in range(1, ROWS[table] + 1)]
    assert {name for figures in rows for name in figures} == set(SUMS[table])
    sums = {name: sum(Decimal(str(figures[name])) for figures in rows if figures.get(name) is not None) for name in SUMS[table]}
    assert sums == {name: Decimal(total) for name, total in SUMS[table].items()}
    assert [figures["ppl"] for figures in rows] == [None if cell == "-" else float(cell) for cell in PPL[table].split()]


@pytest.mark.parametrize(("table", "number", "figure", "value"), CELLS)
def test_cells(table: int, number: int, figure: str, value: float) -> None:
    assert row(table, number).figures[figure] == value


def test_missing_figures_are_those_of_the_run_that_diverged_and_the_baselines_gate() -> None:
    missing = {(of.name, name) for of in presets().values() for name, value in of.figures.items() if value is None}
    assert missing == {(row(2, 12).name, name) for name in SUMS[2]}
    for table, columns in SUMS.items():
        for number in range(1, ROWS[table] + 1):
            absent = set(columns) - set(row(table, number).figures)
            assert absent == ({"gate_score_mean"} if (table, number) == (4, 1) else set())


@pytest.mark.parametrize("number", range(1, 16))
def test_added_parameters_of_table_1(number: int) -> None:
    """As printed, rounded or cut; but row 4, where Table 7 says more than Table 1."""
    of = row(1, number)
    added = count_parameters(of.config.model).total - count_parameters(preset(of.baseline).config.model).total
    if number == 4:
        assert (added, of.figures["added_millions"]) == (453_181_440, 400)
        return
    printed = Decimal(str(of.figures["added_millions"]))
    assert printed in {(Decimal(added) / 10**6).quantize(printed, rounding) for rounding in (ROUND_HALF_UP, ROUND_DOWN)}


def test_added_parameters_of_table_6_follow_from_no_formula() -> None:
    """Ours: n - 1 further projections of 512 x 2048 and a router of 4 n x 2048 in each of 24 layers, for each kind."""
    counts = [count_parameters(row(6, number).config.model).total for number in range(1, 7)]
    formula = [kinds * 24 * 2048 * ((n - 1) * 512 + 4 * n) for kinds, n in ((0, 1), (2, 8), (2, 4), (1, 4), (1, 8), (1, 1))]
    assert [count - counts[0] for count in counts] == formula
    assert formula[-1] == 196_608, "as the headwise gate of the value"
    printed = [row(6, number).figures["added_millions"] for number in range(1, 7)]
    assert printed == [0, 38, 13, 13, 25, 3]
