"""The rules between values, and the example configs that must keep them."""

import re
from pathlib import Path
from typing import Any

import pytest

from megagate.config.cli import parse
from megagate.config.keys import all_keys, flatten, from_dict
from megagate.config.rules import _SIZE_KEYS, RANGES, SAME_RUN_KEYS, changed_keys, check
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
MOE = {"model.vocab_size": 512, "model.hidden_size": 64, "model.num_layers": 2, "model.attention.num_heads": 4}
MOE |= {"model.attention.num_kv_heads": 2, "model.attention.head_dim": 16, "model.moe.num_experts": 8, "model.moe.top_k": 3}
MOE |= {"model.moe.ffn_size": 32, "train.seq_len": 32, "train.steps": 100}
THREE_HEADS = {"model.attention.num_heads": 6, "model.attention.num_kv_heads": 3}
DENSE = {**MOE, "model.moe.num_experts": 0, "model.moe.ffn_size": 0, "model.ffn_size": 96}


def violations(settings: dict[str, Any], *, world_size: int = 1, base: dict[str, Any] = MOE) -> list[str]:
    """The lines of the refusal of `base` with `settings` in place; empty where it is fine."""
    try:
        check(from_dict({**base, **settings}), world_size=world_size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_the_bases_are_fine() -> None:
    assert violations({}) == []
    assert violations({}, base=DENSE) == []


def test_stages_of_zero() -> None:
    assert [stage for stage in range(-1, 5) if not violations({"parallel.zero_stage": stage})] == [1, 2, 3]
    dense_fp32 = {**DENSE, "precision.dtype": "fp32"}
    assert [stage for stage in range(-1, 5) if not violations({"parallel.zero_stage": stage}, base=dense_fp32)] == [0, 1, 2, 3]


def test_every_number_has_a_rule_of_its_own() -> None:
    numbers = {name for name, key in all_keys().items() if key.type in (int, float)}
    assert numbers == {*RANGES, *_SIZE_KEYS, "parallel.zero_stage"}


@pytest.mark.parametrize("key", sorted(RANGES))
def test_a_number_out_of_its_range(key: str) -> None:
    allowed = RANGES[key]
    low = allowed.low if allowed.open_low else allowed.low - 1
    outside = [low] if allowed.high is None else [low, allowed.high if allowed.open_high else allowed.high + 1]
    kind = all_keys()[key].type
    for value in outside:
        lines = violations({key: kind(value)})
        wanted = rf"{re.escape(key)} \({re.escape(str(kind(value)))}\) must be .*; (raise|lower) {re.escape(key)}$"
        assert any(re.match(wanted, line) for line in lines), lines
    if not allowed.open_low and key not in ("model.moe.num_experts", "model.moe.ffn_size"):
        assert violations({key: kind(allowed.low)}) == [], "the end of the range is allowed"
    if kind is float:
        for value in (float("nan"), float("inf")):
            assert f"{key} ({value}) must be a finite number; change {key}" in violations({key: value})


@pytest.mark.parametrize("key", ["train.output_dir", "train.resume", "data.path"])
def test_text_that_must_not_be_empty(key: str) -> None:
    assert violations({key: ""}) == [f"{key} ('') must not be empty; set {key} or leave it out"]


def test_a_missing_base_config_is_the_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        check(RunConfig(), world_size=1)
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == [*_SIZE_KEYS, "model.ffn_size"]
    assert all("must be at least 1" in line and "--config examples/configs/tiny.yaml" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "world_size", "line"),
    [
        ({"model.moe.ffn_size": 0}, 1, "model.moe.ffn_size (0) must be at least 1 for a mixture of experts; give a base config"),
        ({"model.attention.num_heads": -4}, 1, "model.attention.num_heads (-4) must be at least 1; give a base config"),
        (
            {"model.attention.num_heads": 5},
            1,
            "model.attention.num_heads (5) must be divisible by model.attention.num_kv_heads (2); each key/value head",
        ),
        ({"model.attention.head_dim": 15}, 1, "model.attention.head_dim (15) must be even: RoPE"),
        ({"model.moe.shared_ffn_size": -1}, 1, "model.moe.shared_ffn_size (-1) must be at least 0; raise model.moe.shared_ffn_size"),
        (
            {"parallel.tp": 2, "model.moe.shared_ffn_size": 33},
            2,
            "model.moe.shared_ffn_size (33) must be divisible by parallel.tp (2); lower parallel.tp or change shared_ffn_size",
        ),
        (
            {"model.moe.ffn_size": 18},
            1,
            "model.moe.ffn_size (18) must be a multiple of 4 for a mixture in fp32: PyTorch's grouped matrix product takes rows of whole",
        ),
        ({"model.hidden_size": 30}, 1, "model.hidden_size (30) must be a multiple of 4 for a mixture in fp32"),
        (
            {"model.moe.ffn_size": 20, "precision.dtype": "bf16"},
            1,
            "model.moe.ffn_size (20) must be a multiple of 8 for a mixture in bf16",
        ),
        ({"model.moe.top_k": 9}, 1, "model.moe.top_k (9) must be at most model.moe.num_experts (8); lower model.moe.top_k"),
        ({"schedule.warmup_steps": 101}, 1, "schedule.warmup_steps (101) must be at most train.steps (100); lower"),
        ({"schedule.min_lr": 0.5, "optim.lr": 0.1}, 1, "schedule.min_lr (0.5) must be at most optim.lr (0.1); lower"),
        ({"schedule.kind": "wsd"}, 1, "schedule.decay_steps (0) must be at least 1 where schedule.kind is wsd; set"),
        (
            {"schedule.kind": "wsd", "schedule.warmup_steps": 10, "schedule.decay_steps": 91},
            1,
            "schedule.decay_steps (91) must be at most train.steps - schedule.warmup_steps (90); lower",
        ),
        ({"parallel.zero_stage": 0}, 1, "parallel.zero_stage (0) must be at least 1 for a mixture of experts: DeepSpeed's stage 0 sums"),
        ({"parallel.zero_stage": 7}, 1, "parallel.zero_stage (7) must be 0, 1, 2 or 3: there is no such stage; set"),
        (
            {"parallel.tp": 8, "parallel.ep": 8, "model.attention.num_heads": 12},
            8,
            "model.attention.num_heads (12) must be divisible by parallel.tp (8); lower parallel.tp or change num_heads",
        ),
        (
            {"parallel.tp": 4, "model.attention.num_kv_heads": 3, "model.attention.num_heads": 12},
            4,
            "model.attention.num_kv_heads (3) must divide parallel.tp (4) or be divisible by it; change parallel.tp or num_kv_heads",
        ),
        (
            {"parallel.tp": 2, "train.seq_len": 31},
            2,
            "train.seq_len (31) must be divisible by parallel.tp (2); lower parallel.tp or change seq_len",
        ),
        (
            {"parallel.tp": 3, "train.seq_len": 33, "model.vocab_size": 500, **THREE_HEADS},
            3,
            "model.vocab_size 500 padded (512) must be divisible by parallel.tp (3); lower parallel.tp or change vocab_size",
        ),
        (
            {"parallel.ep": 3, "train.global_batch_size": 9},
            3,
            "model.moe.num_experts (8) must be divisible by parallel.ep (3); lower parallel.ep or change num_experts",
        ),
        ({"parallel.tp": 2}, 3, "the number of ranks (3) must be divisible by parallel.tp (2); start 2 or 4 ranks or change parallel.tp"),
        ({"parallel.ep": 8}, 4, "the number of ranks (4) must be divisible by parallel.ep (8); start 8 ranks or change parallel.ep"),
        (
            {},
            3,
            "train.global_batch_size (8) must be divisible by train.micro_batch_size (1) x data-parallel ranks "
            "(3 ranks / parallel.tp 1 = 3); use a multiple of 3 or start 2 or 4 ranks or change train.micro_batch_size",
        ),
    ],
)
def test_one_broken_rule_is_one_line(settings: dict[str, Any], world_size: int, line: str) -> None:
    found = violations(settings, world_size=world_size)
    assert len(found) == 1, found
    assert found[0].startswith(line)


def test_tp_and_ep_fold_only_when_one_divides_the_other() -> None:
    settings = {"parallel.tp": 2, "parallel.ep": 3, "model.moe.num_experts": 6, "train.global_batch_size": 6}
    assert violations(settings, world_size=6) == ["parallel.tp (2) must divide parallel.ep (3) or be divisible by it; change one of them"]


def test_dense_models() -> None:
    assert violations({"model.ffn_size": 0}, base=DENSE)[0].startswith("model.ffn_size (0) must be at least 1 for a dense model")
    assert violations({"parallel.ep": 2}, world_size=2, base=DENSE) == [
        "parallel.ep (2) must be 1 for a dense model (model.moe.num_experts is 0); set parallel.ep to 1"
    ]
    assert violations({"parallel.tp": 2, "model.ffn_size": 95}, world_size=2, base=DENSE) == [
        "model.ffn_size (95) must be divisible by parallel.tp (2); lower parallel.tp or change ffn_size"
    ]
    (line,) = violations({"parallel.zero_stage": 0, "precision.dtype": "bf16"}, base=DENSE)
    assert line.startswith("parallel.zero_stage (0) must be at least 1 where precision.dtype is bf16: DeepSpeed's stage 0 keeps no fp32")
    unused = {"model.moe.top_k": 4, "model.moe.shared_ffn_size": 33, "parallel.tp": 2}
    assert violations(unused, world_size=2, base=DENSE) == [], "the keys of a mixture of experts do not matter to a dense model"


def test_sizes_that_the_experts_kernel_takes_are_no_rule_of_others() -> None:
    assert violations({"model.moe.ffn_size": 20, "model.hidden_size": 36}) == []
    assert violations({"model.ffn_size": 17, "model.hidden_size": 30}, base=DENSE) == []


def test_all_violations_come_at_once() -> None:
    settings = {"optim.lr": 0.0, "optim.beta1": 1.0, "parallel.tp": 3, "parallel.ep": 5, "parallel.zero_stage": 4, "train.seq_len": 0}
    keys = [line.split()[0] for line in violations(settings, world_size=7)]
    assert keys == [
        "train.seq_len",
        "optim.lr",
        "optim.beta1",
        "parallel.zero_stage",
        "model.attention.num_heads",
        "model.vocab_size",
        "model.attention.num_kv_heads",
        "model.moe.num_experts",
        "parallel.tp",
        "the",
        "the",
    ]


def test_zeros_and_negatives_never_divide() -> None:
    for key in ("parallel.tp", "parallel.ep", "train.micro_batch_size", "train.global_batch_size", "model.attention.num_kv_heads"):
        for value in (-1 if key == "train.micro_batch_size" else 0, -2, -3):
            assert len(violations({key: value}, world_size=2)) == 1


def test_micro_batch_size_0_takes_the_whole_share() -> None:
    settings = {"train.micro_batch_size": 0, "train.global_batch_size": 12}
    assert violations(settings, world_size=4) == []
    assert [from_dict(settings).micro_batch(dp) for dp in (1, 4)] == [12, 3]
    (line,) = violations(settings, world_size=8)
    assert line.startswith("train.global_batch_size (12) must be divisible by data-parallel ranks (8 ranks / parallel.tp 1 = 8); ")
    for key in ("train.seq_len", "model.attention.num_heads", "model.attention.num_kv_heads"):
        assert len(violations({key: -3, "parallel.tp": 2}, world_size=2)) == 1


def test_what_a_resumed_run_may_change() -> None:
    old = from_dict(MOE)
    other: dict[Any, Any] = {int: 77, float: 0.77, str: "else", bool: True}
    kept, counted = set(), set()
    for name, key in all_keys().items():
        value = next((choice for choice in key.choices if choice != flatten(old)[name]), None) if key.choices else other[key.type]
        value = (not flatten(old)[name]) if key.type is bool else (key.choices[:1] if key.is_list else value)
        changes = changed_keys(old, from_dict({**MOE, name: value}))
        assert changes in ([], [(name, flatten(old)[name], value)])
        (counted if changes else kept).add(name)
    assert {"train.output_dir", "parallel.tp", "checkpoint.every", "data.cache_dir", "profile.steps"} <= kept
    assert {"model.hidden_size", "train.steps", "train.seed", "data.path", "optim.lr", "schedule.kind", "precision.dtype"} <= counted
    assert kept == {name for name in all_keys() if name.startswith(SAME_RUN_KEYS)}
    for prefix in SAME_RUN_KEYS:
        assert any(name == prefix or (prefix.endswith(".") and name.startswith(prefix)) for name in all_keys()), f"{prefix} names no key"


BASES = {"tiny": 1, "nano": 1, "moe_15a2b": 8, "dense_1p7b_28l": 8, "dense_1p7b_48l": 8}
DELTAS = ("gate_none", "gate_headwise", "gate_elementwise")


def example(*names: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    argv = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return parse([*argv, *overrides], prog="megagate")


def test_every_example_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*BASES, *DELTAS}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("delta", [None, *DELTAS])
def test_examples_run(base: str, delta: str | None) -> None:
    config = example(base, *([delta] if delta else []))
    check(config, world_size=BASES[base])
    if delta:
        gate = config.model.attention.gate
        assert delta.removeprefix("gate_") == ("none" if gate.position == "none" else gate.granularity)
        assert all(key.startswith("model.attention.gate.") for key, _, _ in changed_keys(example(base), config))


LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2), (4, 2, 4), (4, 2, 1), (4, 4, 4), (4, 4, 1), (4, 1, 4)]


@pytest.mark.parametrize(("world", "tp", "ep"), LAYOUTS)
def test_nano_fits_the_layouts_it_is_compared_in(world: int, tp: int, ep: int) -> None:
    check(example("nano", overrides=(f"--parallel.tp={tp}", f"--parallel.ep={ep}")), world_size=world)


def test_nano_has_every_mechanism() -> None:
    moe = example("nano").model.moe
    assert moe.num_experts >= 8 and moe.top_k < moe.num_experts and min(moe.balance_coef, moe.z_loss_coef) > 0


def test_the_large_model_on_eight_gpus() -> None:
    for tp, ep in ((1, 8), (2, 8), (2, 4), (4, 8)):
        check(example("moe_15a2b", overrides=(f"--parallel.tp={tp}", f"--parallel.ep={ep}")), world_size=8)
