"""The doctor of kernels: bands that the formats give hold what they should, and what is wrong with a product falls out of them."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import ranks
import torch
from verify_runs import config

from megagate.backend.base import Backend
from megagate.backend.build import build_backend
from megagate.config.hardware import Hardware
from megagate.errors import ConfigError
from megagate.parallel.spawn import RankContext
from megagate.verify.bands import E4M3, E5M2, MARGIN, Band
from megagate.verify.cells import Cell, PrecisionFindings, RecipeFindings, Row, Sums, rows_of
from megagate.verify.precision import RECIPES, PrecisionOrder, examine_precision, precision_order
from megagate.verify.precision_faults import PRECISION_FAULTS
from megagate.verify.precision_report import precision_verdict, record_precision, render_precision

CPU = torch.device("cpu")
TP2_EP4, TP4_EP2, TP2 = "--parallel.tp 2 --parallel.ep 4", "--parallel.tp 4 --parallel.ep 2", "--parallel.tp 2"
KEEP = "--precision.fp8.keep_high_precision"
BF16 = "--precision.dtype bf16"


def prepare(words: str, world: int, recipes: str = "", *, fault: str = "") -> PrecisionOrder:
    asked = tuple(filter(None, recipes.split(",")))
    return precision_order(config(f"nano {words}"), world_size=world, gpu=False, examined="emulated", recipes=asked, fault=fault)


def examine(order: PrecisionOrder, *, build: Callable[..., Backend] = build_backend, seed: int = 0) -> PrecisionFindings:
    found, *others = ranks.run_ranks(_examine, order.world_size, order, build, seed)
    assert others == [None] * (order.world_size - 1)
    return found


def _examine(context: RankContext, order: PrecisionOrder, build: Callable[..., Backend], seed: int) -> PrecisionFindings | None:
    return examine_precision(order, device=CPU, build=build, seed=seed)


def _refused(context: RankContext, orders: list[PrecisionOrder]) -> str:
    with pytest.raises(ConfigError) as refused:
        examine_precision(orders[context.rank], device=CPU)
    return str(refused.value)


def cells(found: PrecisionFindings, level: str, *, fp8: bool = True) -> list[Cell]:
    """Those with a lower edge above 0, if `fp8`."""
    rows = [row for recipe in found.recipes for row in recipe.rows if row.level == level]
    return [cell for row in rows for cell in row.cells.values() if not fp8 or cell.low > 0]


# ---- formats


@pytest.mark.parametrize(("form", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand, lambda n, generator: torch.randn(n, generator=generator).exp()])
@pytest.mark.parametrize("scale", [1.0, 1.4, 1.9])
def test_rounding_to_a_format_is_as_far_off_as_its_mantissa_says(form: Any, dtype: torch.dtype, draw: Callable, scale: float) -> None:
    x = draw(100_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    scaled = (x * scale * 16).clamp(-form.largest, form.largest)
    error = ((scaled.to(dtype).float() - scaled).square().sum() / scaled.square().sum()).sqrt().item()
    assert form.low < error < form.high
    even = 2.0 ** (torch.rand(100_000, generator=torch.Generator().manual_seed(2)) * 4)
    error = ((even.to(dtype).float() - even).square().sum() / even.square().sum()).sqrt().item()
    assert error == pytest.approx(form.usual, rel=0.02)
    assert torch.finfo(dtype).max == form.largest and torch.finfo(dtype).smallest_normal * 2.0**-form.mantissa == form.smallest


# ---- nothing to find


WELL = {
    "one rank": (1, "", "current"),
    "bf16, tp2 ep4, documents, recomputed": (
        4,
        f"{TP2_EP4} {BF16} --data.attention document --train.recompute true",
        "delayed",
    ),
    "more ranks than kv heads, shared expert with a gate": (
        4,
        f"{TP4_EP2} --model.moe.shared_ffn_size 48 --model.moe.shared_gate true",
        "current",
    ),
    "dense, gate in FP8": (
        2,
        f"{TP2} {BF16} --model.moe.num_experts 0 --model.ffn_size 48 {KEEP} [embedding,head,router]",
        "blockwise",
    ),
    "first and last layers kept, headwise": (
        1,
        f"{BF16} --model.num_layers 4 --model.attention.gate.granularity headwise "
        f"{KEEP} [embedding,head,router,gate,first_layers,last_layers]",
        "mxfp8",
    ),
    "switch heads, no gate, dense first": (
        2,
        "--parallel.ep 2 --model.attention.switch.projections kv --model.attention.switch.num_experts 3 --model.attention.switch.top_k 2 "
        "--model.attention.gate.position none --model.moe.first_dense_layers 1 --model.ffn_size 48 --model.sandwich_norm true",
        "current",
    ),
    "gate of the output": (2, f"{TP2} {BF16} --model.attention.gate.position G5 --model.attention.qk_norm false", "current"),
}


@pytest.mark.parametrize(("world", "words", "recipes"), WELL.values(), ids=WELL)
def test_nothing_is_found_where_nothing_is_wrong(world: int, words: str, recipes: str) -> None:
    order = prepare(words, world, recipes)
    found = examine(order, seed=len(words))
    assert found.causes == [], render_precision(order, found)
    assert len(cells(found, "product")) >= 12 and cells(found, "part") and cells(found, "model")
    # The derivation holds nearly without its margin: rounding stays within the formats' own range.
    excess = max(cell.excess for cell in cells(found, "product"))
    assert excess * MARGIN < 1.1, "the margin is for few numbers and for other kernels"


def test_products_that_are_kept_out_of_fp8_are_told_apart() -> None:
    order = prepare(f"--model.num_layers 3 {KEEP} [embedding,head,router,gate,first_layers]", 1, "current")
    found = examine(order)
    fp8 = {row.name for row in found.recipes[0].rows if row.level == "product" and row.fp8}
    places = ("attention.project", "attention.out", "moe.experts.project", "moe.experts.out")
    assert fp8 == {f"layers.{index}.{place}" for index in (1, 2) for place in places}
    high = {row.name: row for row in found.recipes[0].rows if row.level == "product" and not row.fp8}
    assert high["layers.1.attention.project"].cells["output"].where.startswith("gate") and "layers.0.attention.project" in high
    assert all(cell.low == 0 and cell.high < 1e-5 for row in high.values() for cell in row.cells.values())


# ---- what is wrong


FAULTS = {
    "weight-scale-off-by-two": (1, BF16, "delayed", "layers.1.attention.out: (output|input gradient)"),
    "dgrad-of-wrong-operand": (2, TP2, "current", "layers.1.attention.out: input gradient"),
    "wgrad-of-stale-input": (2, f"{TP2} {BF16}", "blockwise", "layers.1.attention.out: weight gradient"),
    "gate-in-fp8": (1, BF16, "mxfp8", "layers.1.attention.project: output"),
    "scale-of-another-expert": (2, "--parallel.ep 2", "current", r"layers.0.moe.experts.project: (output|input gradient) .* \(expert 0 on"),
    "not-in-fp8": (
        1,
        f"{BF16} {KEEP} [embedding,head,router,gate,last_layers]",  # the last block is no longer that which should be
        "blockwise",
        "layers.0.attention.out: (output|input gradient|weight gradient)",
    ),
}


@pytest.mark.parametrize("fault", PRECISION_FAULTS)
def test_a_fault_falls_out_of_its_band_and_nothing_else_does(fault: str) -> None:
    world, words, recipe, cause = FAULTS[fault]
    order = prepare(words, world, recipe, fault=fault)
    found = examine(order)
    text = render_precision(order, found)
    assert found.causes, text
    assert all(re.match(f"{recipe}: {cause}", one) and "differs by" in one for one in found.causes), text
    assert precision_verdict(order, found) == text.splitlines()[-1] and text.splitlines()[-1].startswith("FAIL: ")
    assert not record_precision(order, found)["passed"] and f"with the fault {fault}" in text


def _forgetful(precision: Any, *, device: torch.device, mesh: Any) -> Backend:
    """Delayed scaling whose scales are never set."""
    backend = build_backend(precision, device=device, mesh=mesh)
    backend.after_backward = lambda model: None
    return backend


def test_scales_that_are_never_set_fall_out_of_the_bands() -> None:
    found = examine(prepare(BF16, 1, "delayed"), build=_forgetful)
    assert found.causes and all("differs by" in cause for cause in found.causes)


# ---- judging


@pytest.mark.parametrize(
    ("cell", "ok"),
    [
        (Cell(0.03, 0.02, 0.06), True),
        (Cell(0.07, 0.02, 0.06), False),
        (Cell(0.01, 0.02, 0.06), False),
        (Cell(0.0, 0.02, 0.06), False),
        (Cell(0.0, 0.0, 0.0), True),
        (Cell(1e-9, 0.0, 0.0), False),
        (Cell(math.nan, 0.0, 1.0), False),
        (Cell(math.inf, 0.0, 1.0), False),
        (Cell(0.03, math.nan, math.nan), False),
        (Cell(0.03, 0.0, math.nan), False),
        (Cell(math.inf, math.inf, math.inf), False),
        (Cell(0.03, 0.0, math.inf), False),
    ],
)
def test_a_cell_is_right_inside_of_its_band(cell: Cell, ok: bool) -> None:
    assert cell.ok == ok


def test_the_rank_and_the_tensor_that_fit_least_decide() -> None:
    def sums(where: str, difference: float, low: float = 1.0) -> Sums:
        return Sums("product", "layers.0.attention.out", True, "output", where, difference, 100.0, Band(low, 4.0))

    (row,) = rows_of([[sums("q", 2.0)], [sums("q", 1.0), sums("k", 5.0), sums("v", 3.9)]])
    assert not row.ok and row.cells["output"].where == "k on rank 1"
    assert row.cells["output"].error == pytest.approx(0.05**0.5) and row.cells["output"].high == pytest.approx(0.2)
    (row,) = rows_of([[sums("q", 3.9)], [sums("k", 0.5)]])
    assert not row.ok and row.cells["output"].where == "k on rank 1", "less than expected is as wrong as more"


@pytest.mark.parametrize("difference", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("high", [math.nan, math.inf])
@pytest.mark.parametrize("turned", [False, True])
def test_a_cell_that_is_no_number_is_not_hidden_by_others(difference: float, high: float, turned: bool) -> None:
    good = Sums("product", "layers.0.attention.out", True, "output", "q", 2.0, 100.0, Band(1.0, 4.0))
    bad = replace(good, where="k", difference=difference, band=Band(high if difference != 1.0 else 0.0, high))
    (row,) = rows_of([[bad, good] if turned else [good, bad]])
    assert not row.ok and row.cells["output"].where == "k on rank 0"


def test_a_kernel_s_nan_is_text_in_json() -> None:
    order = prepare("", 1, "current")
    row = Row("product", "layers.0.attention.out", True, {"output": Cell(math.nan, 0.02, math.inf)})
    found = PrecisionFindings([RecipeFindings("current", [row], (math.nan, 5.0))], ["it"])
    text = json.dumps(record_precision(order, found), allow_nan=False)
    (recipe,) = json.loads(text)["recipes"]
    assert recipe["loss"] == ["nan", 5.0] and recipe["rows"][0]["cells"]["output"]["error"] == "nan"


# ---- what is asked


H100, ADA, OLD_CUDA, CPU_ONLY = Hardware("12.9", (9, 0)), Hardware("12.9", (8, 9)), Hardware("12.6", (9, 0)), Hardware(None, None)


def te(words: str = BF16, hardware: Hardware | None = None, **options: Any) -> PrecisionOrder:
    return precision_order(config(f"nano {words}"), world_size=1, gpu=True, examined="te", hardware=hardware, **options)


def test_a_run_for_gpus_is_compared_in_emulation_on_a_cpu() -> None:
    """Its own kernels and recipe are checked for some hardware, not for this."""
    run = "--precision.dtype auto --precision.backend te --precision.fp8.recipe current"
    assert prepare(run, 1, "mxfp8").config.precision.dtype == "fp32"


def test_ranks_that_were_told_different_things_are_refused() -> None:
    """As on machines with other GPUs; else they would wait for each other."""
    one, *others = prepare(BF16, 2, "current"), prepare(BF16, 2, "current,mxfp8"), prepare(f"{BF16} --parallel.tp 2", 2, "current")
    words = ("they are current (ranks 0); current, mxfp8 (ranks 1); name with", "but on ranks 1 it is not")
    for other, told in zip(others, words, strict=True):
        texts = ranks.run_ranks(_refused, 2, [one, other])
        assert all("must be the same on all ranks, " in text and told in text for text in texts), texts


def test_by_default_all_is_compared_that_the_hardware_has() -> None:
    assert te(hardware=H100).recipes == ("bf16", "delayed", "current", "blockwise")
    assert te(hardware=ADA).recipes == te(hardware=OLD_CUDA).recipes == ("bf16", "delayed", "current")
    assert te(hardware=Hardware("12.9", (10, 0))).recipes == ("bf16", *RECIPES)
    assert te(hardware=Hardware("12.9", (8, 0))).recipes == ("bf16",)
    assert prepare("", 1).recipes == RECIPES


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: te(hardware=CPU_ONLY), "precision.backend (te) needs a CUDA GPU"),
        (lambda: te(hardware=H100, recipes=("mxfp8",)), "precision.fp8.recipe (mxfp8) needs a GPU of compute capability 10.0"),
        (lambda: te(hardware=H100, recipes=("fp4",)), "--recipe fp4 is not one of bf16, delayed, current, blockwise, mxfp8 with"),
        (lambda: prepare("", 1, "bf16"), "--recipe bf16 is not one of delayed, current, blockwise, mxfp8 with --backend emulated"),
        (lambda: te("--precision.dtype fp32"), "precision.dtype (fp32) must be bf16"),
        (lambda: prepare("--parallel.zero_stage 3", 1), "parallel.zero_stage (3) must be less"),
        (lambda: prepare("", 1, fault="no-such"), "--fault no-such is not one of weight-scale-off-by-two"),
        (lambda: te(fault="not-in-fp8", recipes=("bf16",)), "--fault not-in-fp8 needs a recipe in FP8"),
        (lambda: prepare(f"{KEEP} [embedding,head,router]", 1, fault="gate-in-fp8"), "--fault gate-in-fp8 needs an elementwise gate"),
        (
            lambda: prepare("--model.moe.num_experts 0 --model.ffn_size 48", 1, fault="scale-of-another-expert"),
            "--fault scale-of-another-expert needs a mixture of experts",
        ),
        (
            lambda: prepare("--model.moe.num_experts 2 --model.moe.top_k 1 --parallel.ep 2", 2, fault="scale-of-another-expert"),
            "--fault scale-of-another-expert needs a mixture of experts, at least 2 of them on a rank; choose another",
        ),
        (lambda: prepare("--model.hidden_size 200 --precision.fp8.recipe current --precision.fp8.emulate true", 1), "hidden_size (200)"),
        (lambda: te("--precision.dtype fp32 --precision.backend te --precision.fp8.recipe current"), "precision.dtype (fp32) must be bf16"),
    ],
)
def test_what_cannot_be_compared_is_refused(ask: Callable[[], PrecisionOrder], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ask()
    assert told in str(refused.value)


@pytest.mark.parametrize(("run", "tp"), [(run, tp) for run in ("nano", "moe_15a2b", "dense_1p7b_28l") for tp in (1, 2, 4)] + [("tiny", 2)])
def test_a_shrunken_run_has_sizes_that_every_recipe_takes(run: str, tp: int) -> None:
    base = config(run)
    small = replace(base, parallel=replace(base.parallel, tp=tp, ep=1), precision=replace(base.precision, dtype="auto"))
    order = precision_order(small, world_size=4, gpu=True, examined="te")  # its rules are checked
    assert order.recipes == ("bf16", *RECIPES) and order.config.precision.dtype == "bf16"
    assert order.config.model.hidden_size == 256 and order.config.parallel.tp == tp
