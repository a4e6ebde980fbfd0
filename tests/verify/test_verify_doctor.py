"""The doctor finds nothing where there is nothing, tells the true numbers, and names what differs before, between and after the steps."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from verify_runs import diagnose, prepare, wrong

from megagate.backend.native import NativeBackend
from megagate.engine.reference import ReferenceEngine
from megagate.errors import ConfigError
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify import doctor
from megagate.verify.diagnosis import Diagnosis
from megagate.verify.doctor import Order
from megagate.verify.report import record, render, verdict
from megagate.verify.routes import watched_routes
from megagate.verify.trial import Outcome, batch, build_model, reference_config, run_trial

CPU = torch.device("cpu")
TP2_EP4, TP1_EP4, TP4_EP2, TP2 = (
    f"--parallel.tp {tp} --parallel.ep {ep}" for tp, ep in ((2, 4), (1, 4), (4, 2), (2, 1))
)
DENSE = "--model.moe.num_experts 0 --model.ffn_size 48"
MOE_PARTS = ["embedding", "norms", "attention", "gate", "router", "experts", "head", "auxiliary losses"]


# ---- nothing to find


WELL = {
    "tp2 ep4 zero1": (4, TP2_EP4),
    "tp2 ep4 zero2": (4, f"{TP2_EP4} --parallel.zero_stage 2"),
    "tp2 ep4 zero3": (4, f"{TP2_EP4} --parallel.zero_stage 3"),
    "more ranks than kv heads, shared expert": (4, f"{TP4_EP2} --model.moe.shared_ffn_size 48 --parallel.zero_stage 2"),
    "tp1 ep4, balance per sequence": (4, f"{TP1_EP4} --model.moe.balance_scope sequence"),
    "dense tp2 stage 0": (4, f"{TP2} {DENSE} --parallel.zero_stage 0"),
    "one rank": (1, ""),
    "documents": (4, f"{TP2_EP4} --data.attention document --parallel.zero_stage 3"),
    "documents, dense, recompute": (2, f"{DENSE} --data.attention document --train.recompute true"),
    "bf16 zero1": (4, f"{TP2_EP4} --precision.dtype bf16"),
    "bf16 zero2": (2, f"{TP2} --precision.dtype bf16 --precision.grad_dtype model --parallel.zero_stage 2"),
    "bf16 zero3": (4, f"{TP1_EP4} --precision.dtype bf16 --parallel.zero_stage 3"),
    "recompute, ungated, tied, padded": (
        2,
        "--train.recompute true --model.attention.gate.position none --model.tie_embeddings true --model.vocab_size 300 --parallel.ep 2",
    ),
    "headwise, one layer, one kv head, no clipping, per micro-batch": (
        2,
        "--model.attention.gate.granularity headwise --model.num_layers 1 --model.attention.num_kv_heads 1 --optim.grad_clip 0 "
        f"--model.attention.qk_norm false --model.moe.balance_scope micro_batch {TP2}",
    ),
    "losses larger than cross-entropy": (2, "--model.moe.balance_coef 10 --model.moe.z_loss_coef 10 --parallel.ep 2"),
    "no losses, every expert, no accumulation": (
        2,
        "--model.moe.balance_coef 0 --model.moe.z_loss_coef 0 --model.moe.num_experts 2 --model.moe.top_k 2 --train.global_batch_size 2",
    ),
    "a router whose gradient is nothing but rounding": (
        2,
        f"--model.moe.top_k 1 --model.moe.balance_coef 0 --model.moe.z_loss_coef 0 {TP2}",
    ),
    "the same in bf16": (
        2,
        f"--model.moe.top_k 1 --model.moe.z_loss_coef 0 --model.moe.balance_scope sequence --precision.dtype bf16 {TP2}",
    ),
}


@pytest.mark.parametrize(("world", "words"), WELL.values(), ids=WELL)
def test_nothing_is_found_where_nothing_is_wrong(world: int, words: str) -> None:
    found = diagnose(f"nano {words}", world)
    assert found.causes == [] and wrong(found) == [], render(prepare(f"nano {words}", world), found)
    assert not any(row.factor for row in (*found.gradients, *found.outputs))
    assert all(row.bytes == row.minimum for row in found.sent if row.sender == "model"), render(prepare(f"nano {words}", world), found)


# ---- the numbers


@pytest.fixture(scope="module")
def well() -> Diagnosis:
    return diagnose(f"nano {TP2_EP4}", 4)


@pytest.fixture(scope="module")
def reference() -> Outcome:
    """The same steps by the reference engine in this process."""
    config = reference_config(prepare(f"nano {TP2_EP4}", 4).config, dp=2)
    mesh = ParallelMesh.single()
    for seed in range(100):
        model = build_model(config, mesh, backend=NativeBackend(CPU), device=CPU, seed=seed)
        with watched_routes(model) as gaps:
            outcome = run_trial(ReferenceEngine(model, config, mesh), seed=seed, device=CPU)
        if min(gaps) > 1e-5:
            return outcome
    raise AssertionError("no seed without near ties")


def test_the_expected_numbers_are_the_reference_engine_s(well: Diagnosis, reference: Outcome) -> None:
    expected = {"loss of one more batch": reference.val_loss}
    for number, step in enumerate(reference.steps, 1):
        expected |= {f"loss, step {number}": step.loss, f"gradient norm, step {number}": step.grad_norm}
        expected |= {f"balance loss, step {number}": step.aux.balance, f"z-loss, step {number}": step.aux.z}
    told = {number.what: number.reference for number in well.numbers}
    norms = {what: told.pop(what) for what in list(told) if what.startswith("norm of the gradients")}
    assert told == pytest.approx(expected, rel=1e-6)
    assert list(norms.values()) == pytest.approx([step.grad_norm for step in reference.steps], rel=1e-5)


def test_the_numbers_say_what_happened(well: Diagnosis) -> None:
    """Not one process beside itself: other orders of summation leave other roundings."""
    assert [row.what for row in well.gradients] == MOE_PARTS
    assert [row.what for row in well.outputs] == [
        "embedding",
        *(f"layers.{layer}.{part}" for layer in (0, 1) for part in ("attention", "feed_forward")),
        "final_norm",
    ]
    assert all(0 < row.error < 5e-6 and row.ratio == pytest.approx(1, abs=1e-6) for row in well.gradients)
    assert (well.initial.error, well.initial.ratio) == (0.0, pytest.approx(1))
    assert 0 < well.updates.error < 1e-3
    losses = [number.ours for number in well.numbers if number.what.startswith("loss")]
    assert all(abs(loss - math.log(256)) < 1 for loss in losses) and len(set(losses)) == 4
    assert all(number.ours > 0.1 for number in well.numbers if number.what.startswith("gradient norm")), "clipping is active"


def test_a_run_in_bf16_is_measured_by_bf16_s_own_rounding() -> None:
    found = diagnose("nano --precision.dtype bf16", 1)
    assert all(row.error < 0.2 for row in (*found.gradients, *found.outputs)), "one process beside itself"
    assert [row.what for row in found.gradients] == MOE_PARTS


@pytest.mark.parametrize(
    ("world", "words"), [(4, TP2_EP4), (4, f"{TP4_EP2} --model.moe.shared_ffn_size 48 --train.recompute true"), (2, TP2)]
)
def test_what_the_model_sends_is_the_minimum(world: int, words: str, well: Diagnosis) -> None:
    found = well if words == TP2_EP4 else diagnose(f"nano {words}", world)
    model = [row for row in found.sent if row.sender == "model"]
    zero = [row for row in found.sent if row.sender == "ZeRO"]
    assert {row.kind for row in model} >= {"all_gather", "reduce_scatter", "all_reduce"}
    assert all(row.bytes == row.minimum > 0 and row.calls > 0 for row in model)
    assert any(row.kind == "all_to_all" for row in model) == ("ep 1" not in words)
    assert all(row.bytes >= row.minimum for row in zero)
    assert sum(row.bytes for row in zero) < 5 * sum(row.minimum for row in zero) + 1000


def test_one_rank_sends_nothing() -> None:
    found = diagnose("nano", 1)
    assert found.sent == []
    assert "nothing is sent" in render(prepare("nano", 1), found)


def test_each_data_parallel_rank_has_its_samples_and_no_two_the_same() -> None:
    config = prepare("nano --parallel.ep 4", 4).config
    whole = batch(reference_config(config, dp=4), ParallelMesh.single(), seed=0, step=0, device=CPU)[0]
    targets = (batch(reference_config(config, dp=4), ParallelMesh.single(), seed=0, step=0, device=CPU)[1] >= 0).sum(-1).flatten()
    assert len({tuple(sample.tolist()) for sample in whole.flatten(0, 1)}) == config.train.global_batch_size
    assert targets.min() == 0 and targets.unique().numel() > 2, "unequal numbers of targets, and none in one sample"


# ---- what else may differ


def examine_spoiled(context: RankContext, order: Order, rank: int, how: str, name: str) -> Any:
    """As `examine_local`, with one thing changed on one rank."""
    build, run = doctor.build_model, doctor.run_trial

    def spoiled_model(config: Any, mesh: ParallelMesh, **kwargs: Any) -> Any:
        model = build(config, mesh, **kwargs)
        parameters = dict(model.named_parameters())
        if how in ("add", "nan") and mesh.world.size > 1:  # not the reference
            with torch.no_grad():
                parameters[name].view(-1)[3] += 0.01 if how == "add" else math.nan
        if how == "inf" and mesh.world.size > 1:
            parameters[name].register_hook(lambda grad: grad + math.inf)
        return model

    def spoiled_trial(engine: Any, **kwargs: Any) -> Outcome:
        outcome = run(engine, **kwargs)
        if how == "loss" and not isinstance(engine, ReferenceEngine):
            outcome.steps[1] = outcome.steps[1]._replace(loss=outcome.steps[1].loss + 0.1)
        if how == "validation" and not isinstance(engine, ReferenceEngine):
            outcome.val_loss += 0.1
        return outcome

    if context.rank != rank:
        return doctor.examine_local(context, order)
    with patch.object(doctor, "build_model", spoiled_model), patch.object(doctor, "run_trial", spoiled_trial):
        return doctor.examine_local(context, order)


def spoiled(world: int, words: str, rank: int, how: str, name: str = "") -> Diagnosis:
    return diagnose(f"nano {words}", world, examine=examine_spoiled, args=(rank, how, name))


@pytest.mark.parametrize(
    ("world", "words", "rank", "name"),
    [
        (2, TP2, 1, "layers.1.attention.q.weight"),
        (4, f"{TP2_EP4} --parallel.zero_stage 2", 3, "layers.0.moe.experts.down"),
        (2, f"{TP2} --parallel.zero_stage 3 --precision.dtype bf16", 0, "embedding.weight"),
    ],
)
def test_other_initial_weights_on_one_rank_are_told(world: int, words: str, rank: int, name: str) -> None:
    found = spoiled(world, words, rank, "add", name)
    assert not found.initial.ok and found.initial.where == name
    (cause,) = found.causes
    assert cause.startswith("initial weights differ by ") and cause.endswith(f" in {name}")


def test_another_copy_of_a_replicated_weight_is_told() -> None:
    """Masters are written by one rank; the others' copies show in what they compute."""
    found = spoiled(2, TP2, 1, "add", "layers.0.attention_norm.weight")
    assert found.causes, "not even in the outputs"
    assert "layers.0.attention" in found.causes[0] or "initial weights" in found.causes[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_skipped_step_is_told(stage: int) -> None:
    found = spoiled(2, f"{TP2} --parallel.zero_stage {stage}", 1, "nan", "layers.0.attention.o.weight")
    assert found.causes == ["a step was skipped because a gradient is not finite"]
    assert "nan" in render(prepare(f"nano {TP2}", 2), found)


def test_a_step_that_is_skipped_for_a_gradient_alone_is_told() -> None:
    """The step of the auxiliary losses alone, which does not reach the head's gradient, is not skipped."""
    found = spoiled(2, TP2, 1, "inf", "head.weight")
    assert found.causes == ["a step was skipped because a gradient is not finite"]


@pytest.mark.parametrize("how", ["loss", "validation"])
def test_ranks_that_tell_different_losses_are_told(how: str) -> None:
    found = spoiled(2, "--parallel.ep 2", 1, how)
    assert found.causes == ["ranks tell different losses or norms for the same step"]
    assert wrong(found) == [], "the first rank's own are right"


def test_a_wrong_number_is_told_with_what_it_should_be() -> None:
    found = spoiled(2, "--parallel.ep 2", 0, "loss")
    (number,) = [number for number in found.numbers if not number.ok]
    assert number.what == "loss, step 2" and number.ours == pytest.approx(number.reference + 0.1, rel=1e-5)
    assert found.causes == [f"loss, step 2: {number.ours:.7g}, expected {number.reference:.7g} ({number.ours / number.reference:.4f} x)"]
    assert verdict(prepare("nano --parallel.ep 2", 2), found) == f"FAIL: {found.causes[0]}"


# ---- FP8, which is not part of it


EMULATED = "--precision.fp8.emulate true --precision.fp8.keep_high_precision [embedding,head,router]"


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_a_recipe_is_left_out_aloud(recipe: str) -> None:
    """Shrunken models are too small for it, and by its steps two sound layouts drift apart."""
    words = f"nano {TP2} --precision.fp8.recipe {recipe} {EMULATED} --model.attention.head_dim 32 --train.seq_len 64"
    told = prepare(words, 2)
    assert told == replace(prepare(f"nano {TP2} --model.attention.head_dim 32 --train.seq_len 64", 2), left_out=recipe)
    found = diagnose(words, 2)
    assert found.causes == []
    lines = render(told, found).splitlines()
    assert f"precision.fp8 ({recipe}) is not part of this: `--backend emulated` looks at it, product by product" in lines
    assert lines[-1] == verdict(told, found) == "PASS (without FP8)"
    assert record(told, found)["left_out"] == {"precision.fp8.recipe": recipe}


def test_other_kernels_stay_where_their_recipe_is_left_out() -> None:
    settings = "--precision.backend te --precision.dtype bf16 --model.attention.head_dim 32 --train.seq_len 64"
    told, plain = prepare(f"nano {settings} --precision.fp8.recipe current", 2), prepare(f"nano {settings}", 2)
    assert told == replace(plain, left_out="current") and told.config.precision.backend == "te"
    assert record(plain, diagnose("nano", 2))["left_out"] == {}


def test_a_recipe_that_the_run_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.seq_len \(8\) must be a multiple of 16 where precision.fp8.recipe is current"):
        prepare(f"nano --precision.fp8.recipe current {EMULATED} --train.seq_len 8", 2)
