"""The rules of kernels and FP8: every refused combination by its message, and what they let through."""

import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from test_config_rules import DENSE, MOE

from megagate.config.hardware import GPU_VALUES, INSTALL, RECIPE_NEEDS, Hardware
from megagate.config.keys import all_keys, from_dict
from megagate.config.precision_rules import fp8_heads, fp8_layers, size_multiple
from megagate.config.rules import check
from megagate.config.run import Fp8Config, Fp8Recipe, PrecisionConfig
from megagate.errors import ConfigError
from megagate.plan.hardware import GPU_BYTES, GPU_CAPABILITY, gpu_hardware

RECIPES = tuple(recipe for recipe in typing.get_args(Fp8Recipe) if recipe != "none")
KEPT = Fp8Config.keep_high_precision
TE = {"precision.backend": "te", "precision.dtype": "bf16"}
EMULATED = {"precision.fp8.emulate": True}
KEEP = "precision.fp8.keep_high_precision"
CPU = Hardware(None, None)
H100, H100_OLD, B200, ADA = Hardware("12.9", (9, 0)), Hardware("12.8", (9, 0)), Hardware("13.0", (10, 0)), Hardware("12.6", (8, 9))
A100, CONSUMER, MI300 = Hardware("13.0", (8, 0)), Hardware("13.0", (12, 0)), Hardware(None, (9, 4))


def violations(settings: dict[str, Any], *, world_size: int = 1, base: dict[str, Any] = MOE, hardware: Hardware | None = None) -> list[str]:
    try:
        check(from_dict({**base, **settings}), world_size=world_size, hardware=hardware)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def recipe(name: str, *more: dict[str, Any]) -> dict[str, Any]:
    settings = {"precision.fp8.recipe": name}
    for others in more:
        settings |= others
    return settings


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_may_run(name: str) -> None:
    for base in (MOE, DENSE):
        assert violations(recipe(name, TE), base=base) == [], "without a machine nothing is asked of one"
        assert violations(recipe(name, EMULATED), base=base, hardware=CPU) == []
        assert violations(recipe(name, TE, {"parallel.zero_stage": 2}), base=base, hardware=B200) == []
    assert violations(recipe(name, TE, {"precision.dtype": "auto"})) == [], "it is bf16 wherever te can be"


# ---- who makes the products


def test_a_recipe_needs_someone_who_has_it() -> None:
    assert violations(recipe("current")) == [
        "precision.fp8.recipe (current) needs FP8 kernels or their emulation, but precision.backend is native and precision.fp8.emulate "
        "false; set precision.backend to te (GPUs that have FP8) or precision.fp8.emulate to true (any device)"
    ]


def test_an_emulation_needs_a_recipe_and_native_kernels() -> None:
    assert violations(EMULATED) == [
        "precision.fp8.emulate (true) needs a recipe to emulate, but precision.fp8.recipe is none; set precision.fp8.recipe to delayed, "
        "current, blockwise or mxfp8, or precision.fp8.emulate to false"
    ]
    both = (
        "precision.fp8.emulate (true) is of PyTorch's kernels, but precision.backend is te, which has FP8 of its own; set "
        "precision.backend to native, or precision.fp8.emulate to false"
    )
    assert violations(recipe("delayed", TE, EMULATED)) == [both]
    assert both in violations({**TE, **EMULATED})
    assert violations(recipe("delayed", TE, EMULATED, {"precision.dtype": "fp32"})) == [both], "fp32 is free once the kernels are native"


def test_te_is_in_bf16() -> None:
    fp32 = {"precision.dtype": "fp32"}
    refused = (
        "precision.dtype (fp32) must be bf16 where precision.backend is te: its products of fp32 numbers are in TF32, with 10 bits of "
        "mantissa, whatever PyTorch is told, and its FP8 is made for bf16 activations; set precision.dtype to bf16, or "
        "precision.backend to native"
    )
    assert violations({**TE, **fp32}) == [refused]
    assert violations(recipe("delayed", TE, fp32)) == [f"{refused} with precision.fp8.emulate true"]
    assert violations(fp32) == violations(recipe("delayed", EMULATED, fp32)) == violations({**TE, "precision.dtype": "auto"}) == []


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (
            TE,
            "Transformer Engine holds what it rounded of a weight from the forward to the backward pass, so that stage 3, which releases "
            "weights in between, would save nothing, and the two have never been shown to work together",
        ),
        (EMULATED, "an emulation is to tell what Transformer Engine would do, and there stage 3 is refused"),
    ],
    ids=["te", "emulated"],
)
def test_stage_3_is_refused(how: dict[str, Any], why: str) -> None:
    assert violations(recipe("blockwise", how, {"parallel.zero_stage": 3})) == [
        f"parallel.zero_stage (3) must be less where precision.fp8.recipe is blockwise: {why}; set parallel.zero_stage to 2, or "
        "precision.fp8.recipe to none"
    ]
    assert violations({**TE, "parallel.zero_stage": 3}) == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_history_has_a_length(name: str) -> None:
    """Runs to compare with, of other recipes or without FP8, may share a file of settings."""
    key = "precision.fp8.amax_history"
    for settings in (recipe(name, EMULATED), {}):
        assert violations({**settings, key: 16}) == violations({**settings, key: 65536}) == []
        assert violations({**settings, key: 65537}) == [f"{key} (65537) must be at most 65536; lower {key}"]
        assert violations({**settings, key: 0}) == [f"{key} (0) must be at least 1; raise {key}"]


# ---- what stays in high precision


def test_what_has_no_fp8_form_is_listed() -> None:
    assert violations(recipe("current", EMULATED, {KEEP: ["gate", "router"]})) == [
        f"{KEEP} ([gate, router]) must hold embedding, head, which have no FP8 form (embedding: a look-up is no product; head: the loss "
        "forms its logits, and their gradient, chunk by chunk by itself); add embedding, head"
    ]
    assert violations(recipe("current", EMULATED, {KEEP: ["embedding", "head"]})) == [
        f"{KEEP} ([embedding, head]) must hold router, which have no FP8 form (router: its product is in fp32, so that rounding chooses no "
        "expert); add router"
    ]
    assert violations(recipe("current", EMULATED, {KEEP: ["router", "head", "embedding"]})) == []
    assert violations({KEEP: []}) == [], "read where there is FP8"


@pytest.mark.parametrize(
    ("layers", "kept", "left"),
    [
        (2, (), [0, 1]),
        (2, ("first_layers",), [1]),
        (2, ("last_layers",), [0]),
        (3, ("last_layers", "first_layers"), [1]),
        (2, ("first_layers", "last_layers"), []),
        (1, ("last_layers",), []),
        (1, ("first_layers", "last_layers"), []),
    ],
)
def test_some_block_is_in_fp8(layers: int, kept: tuple[str, ...], left: list[int]) -> None:
    keep = [*KEPT, *kept]
    settings = recipe("mxfp8", EMULATED, {KEEP: keep, "model.num_layers": layers})
    assert list(fp8_layers(from_dict({**MOE, **settings}))) == left
    ends = "last_layers" if len(kept) == 1 else "first_layers or last_layers" if layers == 2 else "first_layers and last_layers"
    refusal = (
        f"{KEEP} ([{', '.join(keep)}]) leaves none of model.num_layers ({layers}) blocks in FP8; leave out {ends}, or set "
        "precision.fp8.recipe to none"
    )
    assert violations(settings) == ([] if left else [refusal])
    assert not fp8_layers(from_dict({**MOE, KEEP: keep})), "without a recipe none is"


# ---- sizes


ROWS = "FP8 products read rows of whole 16 bytes"
BLOCKS = "its blocks hold 32 numbers along either dimension"
SIZES = ("model.hidden_size", "train.seq_len", "model.moe.ffn_size", "model.moe.shared_ffn_size")


@pytest.mark.parametrize("how", [TE, EMULATED], ids=["te", "emulated"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("key", SIZES)
def test_sizes_of_products(key: str, name: str, how: dict[str, Any]) -> None:
    """An emulation that took what kernels refuse would tell of a run that cannot be."""
    unit = 32 if name == "mxfp8" else 16
    assert size_multiple(from_dict({**MOE, **recipe(name)}).precision.fp8) == unit
    why = f"precision.fp8.recipe is {name}: {BLOCKS if name == 'mxfp8' else ROWS}"
    for size in (unit, 3 * unit):
        assert violations(recipe(name, how, {key: size})) == []
    for size in (unit // 2, unit + 8):
        assert violations(recipe(name, how, {key: size})) == [
            f"{key} ({size}) must be a multiple of {unit} where {why}; set {key} to a multiple of {unit}"
        ]
        assert violations({**TE, key: size}) == []


def test_widths_are_those_of_a_rank() -> None:
    tp = {"parallel.tp": 2, "model.ffn_size": 48}
    lines = violations(recipe("delayed", EMULATED, tp), base=DENSE, world_size=2)
    assert lines == [
        f"model.ffn_size (48) / parallel.tp (2) = 24 must be a multiple of 16 where precision.fp8.recipe is delayed: {ROWS}; set "
        "model.ffn_size to a multiple of 32 or lower parallel.tp"
    ]
    assert violations(recipe("delayed", EMULATED, {**tp, "model.ffn_size": 64}), base=DENSE, world_size=2) == []
    shared = violations(recipe("delayed", EMULATED, {"parallel.tp": 2, "model.moe.shared_ffn_size": 16}), world_size=2)
    assert [line.split(" must ")[0] for line in shared] == ["model.moe.shared_ffn_size (16) / parallel.tp (2) = 8"]


@pytest.mark.parametrize(("kept", "told"), [((), True), (("first_layers",), False)])
def test_sizes_of_blocks_in_high_precision_are_free(kept: tuple[str, ...], told: bool) -> None:
    """Of a mixture whose first block is dense, that one's width; of all others the experts'."""
    odd = {"model.moe.first_dense_layers": 1, "model.ffn_size": 40, KEEP: [*KEPT, *kept]}
    lines = violations(recipe("current", EMULATED, odd))
    assert [line.split()[0] for line in lines] == (["model.ffn_size"] if told else [])
    experts = {**odd, "model.ffn_size": 32, "model.moe.ffn_size": 40, "model.moe.shared_ffn_size": 40, KEEP: [*KEPT, "last_layers"]}
    assert violations(recipe("current", EMULATED, experts)) == []


HEADS = {"model.attention.num_heads": 4, "model.attention.num_kv_heads": 2}
GATED = {"model.attention.gate.position": "G1"}


@pytest.mark.parametrize(
    ("settings", "tp", "lines"),
    [
        # 4 + 2 + 2 heads of 8 channels: each product has a multiple of 16 rows, no head has
        ({"model.attention.head_dim": 8}, 1, []),
        (
            {"model.attention.head_dim": 2},
            1,
            [
                "model.attention.head_dim (2) x 4 query heads = 8 must be a multiple of 16 where precision.fp8.recipe is current: {ROWS}; "
                "make model.attention.head_dim a multiple of 4"
            ],
        ),
        (
            {"model.attention.head_dim": 8},
            2,
            [],
        ),
        (
            {"model.attention.head_dim": 8},
            4,
            [
                "model.attention.head_dim (8) x 1 query head on each of parallel.tp (4) ranks = 8 must be a multiple of 16 where "
                "precision.fp8.recipe is current: {ROWS}; make model.attention.head_dim a multiple of 16 or lower parallel.tp",
                "model.attention.head_dim (8) x 3 heads of q, k and v on each of parallel.tp (4) ranks = 24 must be a multiple of 16 where "
                "precision.fp8.recipe is current: {ROWS}; make model.attention.head_dim a multiple of 16 or lower parallel.tp",
            ],
        ),
    ],
)
def test_rows_of_attention(settings: dict[str, Any], tp: int, lines: list[str]) -> None:
    found = violations(recipe("current", EMULATED, HEADS, settings, {"parallel.tp": tp}), world_size=tp)
    assert found == [line.replace("{ROWS}", ROWS) for line in lines]


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({}, {"q": 4, "k": 2, "v": 2}),
        (GATED, {"q": 4, "k": 2, "v": 2, "gate": 4}),
        ({**GATED, KEEP: KEPT}, {"q": 4, "k": 2, "v": 2}),
        ({**GATED, "model.attention.gate.granularity": "headwise"}, {"q": 4, "k": 2, "v": 2}),
        ({**GATED, "model.attention.gate.score": "parameter"}, {"q": 4, "k": 2, "v": 2}),
        ({"model.attention.gate.position": "G2"}, {"q": 4, "k": 2, "v": 2, "gate": 2}),
        ({"model.attention.gate.position": "G5"}, {"q": 4, "k": 2, "v": 2}),
        (
            {"model.attention.switch.projections": "kv", "model.attention.switch.num_experts": 3, "model.attention.switch.top_k": 2},
            {"q": 4, "k": 6, "v": 6},
        ),
        ({"parallel.tp": 4}, {"q": 1, "k": 1, "v": 1}),
    ],
)
def test_what_rides_with_q_k_and_v_in_fp8(settings: dict[str, Any], heads: dict[str, int]) -> None:
    rounded = {KEEP: [part for part in KEPT if part != "gate"]}
    assert fp8_heads(from_dict({**MOE, **HEADS, **recipe("current"), **rounded, **settings})) == heads


def test_a_gate_in_fp8_is_of_the_product() -> None:
    odd = {**HEADS, "model.attention.head_dim": 4, "model.attention.gate.position": "G2"}
    assert violations(recipe("current", EMULATED, odd)) == []
    rounded = {KEEP: [part for part in KEPT if part != "gate"]}
    (line,) = violations(recipe("current", EMULATED, odd, rounded))
    assert line.startswith("model.attention.head_dim (4) x 10 heads of q, k, v and gate = 40 must be a multiple of 16")
    assert line.endswith("make model.attention.head_dim a multiple of 8")


# ---- the machine


def test_gpus_by_recipe() -> None:
    runs = {
        "A100": (A100, ()),
        "Ada": (ADA, ("delayed", "current")),
        "H100 with an older CUDA": (H100_OLD, ("delayed", "current")),
        "H100": (H100, ("delayed", "current", "blockwise")),
        "H100, CUDA 13": (Hardware("13.0", (9, 0)), ("delayed", "current", "blockwise")),
        "B200": (B200, RECIPES),
        "B300": (Hardware("13.0", (10, 3)), RECIPES),
        "a consumer's Blackwell": (CONSUMER, ("delayed", "current", "blockwise")),
    }
    for gpu, (hardware, allowed) in runs.items():
        assert tuple(name for name in RECIPES if not violations(recipe(name, TE), hardware=hardware)) == allowed, gpu
        assert violations(TE, hardware=hardware) == [], "without FP8 any will do"


ELSEWHERE = "; precision.backend native with precision.fp8.emulate shows this recipe's numbers on any device"


@pytest.mark.parametrize(
    ("name", "hardware", "line"),
    [
        (
            "delayed",
            A100,
            "precision.fp8.recipe (delayed) needs a GPU of compute capability 8.9 or more (Ada, Hopper and later), this one has 8.0; set "
            "precision.fp8.recipe to none",
        ),
        (
            "blockwise",
            ADA,
            "precision.fp8.recipe (blockwise) needs a GPU of compute capability 9.0 or more (Hopper and later), this one has 8.9; set "
            "precision.fp8.recipe to delayed or current",
        ),
        (
            "blockwise",
            H100_OLD,
            "precision.fp8.recipe (blockwise) needs CUDA 12.9 or later, and PyTorch was built with 12.8; install a PyTorch of CUDA 12.9, "
            "or set precision.fp8.recipe to delayed or current",
        ),
        (
            "mxfp8",
            H100,
            "precision.fp8.recipe (mxfp8) needs a GPU of compute capability 10.0 or more and below 12.0 (Blackwell such as the B200, not "
            "that of consumers' cards), this one has 9.0; set precision.fp8.recipe to delayed, current or blockwise",
        ),
        (
            "mxfp8",
            CONSUMER,
            "precision.fp8.recipe (mxfp8) needs a GPU of compute capability 10.0 or more and below 12.0 (Blackwell such as the B200, not "
            "that of consumers' cards), this one has 12.0; set precision.fp8.recipe to delayed, current or blockwise",
        ),
    ],
)
def test_a_recipe_that_a_gpu_lacks(name: str, hardware: Hardware, line: str) -> None:
    assert violations(recipe(name, TE), hardware=hardware) == [line + ELSEWHERE]
    assert violations(recipe(name, EMULATED), hardware=hardware) == []


ANYWHERE = {"precision.backend": "native", "precision.norm": "native", "optim.implementation": "torch"}
VALUES = [(key, value) for key, values in GPU_VALUES.items() for value in values]


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_kernels_of_gpus(key: str, value: str) -> None:
    """Without a GPU, on another maker's, without the package, with all."""
    settings = {key: value, "precision.dtype": "bf16"}
    package = GPU_VALUES[key][value].package
    more = "; FP8 is emulated anywhere by precision.fp8.emulate" if key == "precision.backend" else ""
    gpu = "a CUDA GPU" if package else "a GPU"
    for none in (CPU, Hardware("13.0", None, frozenset())):
        (line,) = violations(settings, hardware=none)
        assert line == f"{key} ({value}) needs {gpu}, and PyTorch finds none here; set {key} to {ANYWHERE[key]}{more}"
    others = violations(settings, hardware=MI300)
    assert others == (
        [f"{key} ({value}) needs a CUDA GPU, and PyTorch finds one that is not NVIDIA's here; set {key} to {ANYWHERE[key]}{more}"]
        if package
        else []
    )
    bare = Hardware("13.0", (9, 0), frozenset())
    missing = violations(settings, hardware=bare)
    if package:
        other = " (PyPI's package `apex` is another project)" if package == "apex" else ""
        assert missing == [
            f"{key} ({value}) needs the package {package}, which is not installed; install it with `{INSTALL[package]}`{other}, or set "
            f"{key} to {ANYWHERE[key]}"
        ]
    else:
        assert missing == []
    assert violations(settings, hardware=H100) == []


def test_all_that_is_missing_is_told_at_once() -> None:
    wishes = {"precision.backend": "te", "precision.norm": "apex", "optim.implementation": "deepspeed", "parallel.tp": 3}
    lines = violations(recipe("delayed", wishes), hardware=CPU)
    assert [line.split()[0] for line in lines[:3]] == ["precision.backend", "precision.norm", "optim.implementation"]
    assert any("parallel.tp (3)" in line for line in lines)


def test_every_value_of_a_choice_is_free_or_has_its_needs() -> None:
    """A new recipe or implementation is refused nowhere until it has a row."""
    assert set(RECIPE_NEEDS) == set(RECIPES)
    for key, values in GPU_VALUES.items():
        assert {*values, ANYWHERE[key]} == set(all_keys()[key].choices)
    choices = {name for name, key in all_keys().items() if name.startswith("precision.") and key.choices and not key.is_list}
    of_hardware = {key for key in GPU_VALUES if key.startswith("precision.")}
    assert choices == {"precision.dtype", "precision.grad_dtype", "precision.fp8.recipe", *of_hardware}
    assert {field.name for field in fields(PrecisionConfig)} >= {"backend", "norm", "fp8"}


def test_planned_gpus() -> None:
    assert set(GPU_CAPABILITY) == set(GPU_BYTES)
    assert gpu_hardware("80") is None
    runs: Callable[[str, str], bool] = lambda gpu, name: not violations(recipe(name, TE), hardware=gpu_hardware(gpu))  # noqa: E731
    assert [gpu for gpu in GPU_BYTES if runs(gpu, "delayed")] == ["l40s-48gb", "h100-80gb", "h100-96gb", "h200-141gb", "b200-180gb"]
    assert [gpu for gpu in GPU_BYTES if runs(gpu, "mxfp8")] == ["b200-180gb"]
    assert violations({"optim.implementation": "deepspeed"}, hardware=gpu_hardware("mi300x-192gb")) == []
