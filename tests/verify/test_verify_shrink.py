"""The small run that stands for a user's: the same layout and the same kinds of layers, options and numbers, and little work."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from verify_runs import CONFIGS, config

from megagate.config.count import count_parameters, parameter_parts
from megagate.config.model import VOCAB_MULTIPLE
from megagate.config.rules import check
from megagate.config.run import RunConfig
from megagate.errors import ConfigError
from megagate.verify.doctor import order
from megagate.verify.shrink import fit_layout, shrink

BASES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("gate_"))
GATES = sorted(path.stem for path in CONFIGS.glob("gate_*.yaml"))
SIX_HEADS = "--model.attention.num_heads 6 --model.attention.num_kv_heads 1 --train.seq_len 48 --model.vocab_size 768"
SWITCH = "--model.attention.switch"
EXAMPLES = [*BASES, *(f"{base}+{gate}" for base in BASES for gate in GATES if base.startswith("moe"))]
ODD = {
    "one kv head of six": f"nano {SIX_HEADS}",
    "three kv heads of six": f"nano {SIX_HEADS} --model.attention.num_kv_heads 3",
    "dense": "nano --model.moe.num_experts 0 --model.ffn_size 48",
    "dense in stage 0": "nano --model.moe.num_experts 0 --model.ffn_size 48 --parallel.zero_stage 0",
    "twelve experts": "nano --model.moe.num_experts 12 --model.moe.shared_ffn_size 96",
    "every expert": "nano --model.moe.num_experts 4 --model.moe.top_k 4",
    "one expert": "nano --model.moe.num_experts 1 --model.moe.top_k 1",
    "padded vocabulary": "nano --model.vocab_size 300 --model.tie_embeddings true",
    "small": "nano --model.num_layers 1 --model.attention.head_dim 4 --model.moe.ffn_size 4 --model.attention.num_kv_heads 4",
    "kept": "nano --optim.grad_clip 0 --train.recompute true --precision.dtype bf16 --precision.grad_dtype model --parallel.zero_stage 3",
    "loss": "nano --model.moe.balance_scope sequence --model.moe.balance_coef 0.2 --model.moe.z_loss_coef 0 --model.moe.renormalize false",
    "norms": "nano --model.attention.qk_norm false --model.norm_eps 1e-3 --model.attention.rope.base 500",
    "router": "nano --model.moe.score sigmoid --model.moe.bias_update_rate 0.01 --model.moe.z_loss_coef 0",
    "shared gate": "nano --model.moe.shared_ffn_size 96 --model.moe.shared_gate true",
    "dense first": "nano --model.num_layers 6 --model.moe.first_dense_layers 3 --model.ffn_size 96",
    "switch": f"nano {SWITCH}.projections kv {SWITCH}.num_experts 8 {SWITCH}.top_k 8 --model.attention.gate.position none",
    "few of a switch": f"nano {SWITCH}.projections v {SWITCH}.num_experts 8 {SWITCH}.top_k 5 --model.sandwich_norm true",
    "clipped": "nano --model.residual_clip 300 --model.attention.gate.position G3 --model.attention.gate.head_shared true",
}
WORLDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SMALL = 2e6
"""Parameters of a shrunken model for up to 16 ranks."""


def layouts(base: RunConfig) -> Iterator[tuple[int, RunConfig]]:
    """(world, run) for every layout up to 64 ranks that the rules allow, with two micro-steps and with one."""
    for world in WORLDS:
        for tp in range(1, world + 1):
            for ep in range(1, world + 1):
                if world % tp or world % ep:
                    continue
                for micro_steps in (2, 1):
                    train = replace(base.train, global_batch_size=3 * micro_steps * (world // tp), micro_batch_size=3)
                    run = replace(base, train=train, parallel=replace(base.parallel, tp=tp, ep=ep))
                    if is_allowed(run, world):
                        yield world, run


def is_allowed(run: RunConfig, world: int) -> bool:
    try:
        check(run, world_size=world)
    except ConfigError:
        return False
    return True


def kinds(run: RunConfig, world: int) -> dict[str, Any]:
    """All that a shrunken run has to have in common with the run itself."""
    model, tp = run.model, run.parallel.tp
    attention, moe = model.attention, model.moe
    dp = world // tp
    return {
        "parallel": run.parallel,
        "precision": run.precision,
        "recompute": run.train.recompute,
        "accumulation": run.train.global_batch_size > dp * run.micro_batch(dp),
        "clipping": run.optim.grad_clip > 0,
        "parts": set(parameter_parts(model).values()),  # tied, gate, shared expert, dense or not
        "last layer": model.num_layers > 1,
        "gate": attention.gate,
        "qk_norm": attention.qk_norm,
        "rope": attention.rope,
        "kv heads on several ranks": tp > attention.num_kv_heads,
        "ranks of a kv head": max(1, tp // attention.num_kv_heads),
        "several queries of a kv head": attention.num_heads > attention.num_kv_heads,
        "padded": model.padded_vocab_size != model.vocab_size,
        "norm_eps": model.norm_eps,
        "scope": moe.balance_scope,
        "losses": (moe.balance_coef, moe.z_loss_coef),
        "renormalize": moe.renormalize,
        "moe": model.is_moe,
        "one choice": moe.top_k == 1,
        "router": (moe.score, moe.bias_update_rate, moe.shared_gate),
        "dense first": moe.first_dense_layers > 0,
        "switch": (attention.switch.projections, attention.switch.num_experts > 1, attention.switch.top_k == attention.switch.num_experts),
        "residual": (model.sandwich_norm, model.residual_clip > 0),
    }


@pytest.mark.parametrize("words", [*EXAMPLES, *ODD.values()], ids=[*EXAMPLES, *ODD])
def test_a_small_run_is_the_same_kind_of_run_under_every_layout(words: str) -> None:
    base, count = config(words), 0
    for world, run in layouts(base):
        small, where = shrink(run, world_size=world), (world, run.parallel)
        check(small, world_size=world)
        assert kinds(small, world) == kinds(run, world), where
        assert (small.optim.name, small.optim.weight_decay) == ("sgd", 0.0), "Adam hides errors of scale"
        if world <= 16:
            assert count_parameters(small.model, padded=True).total < SMALL, where
            assert small.train.global_batch_size * small.train.seq_len <= 1024, where
        count += 1
    assert count >= 10, "the rules leave too little to look at"


def test_layouts_of_three_and_of_six_are_among_them() -> None:
    """Where powers of two would do by accident."""
    seen = {(world, run.parallel.tp) for world, run in layouts(config(ODD["one kv head of six"]))}
    assert {(3, 3), (6, 3), (6, 6), (12, 6)} <= seen
    assert any(run.parallel.ep == 12 for _, run in layouts(config(ODD["twelve experts"])))


def test_experts_are_enough_and_no_more_than_there_were() -> None:
    for world, run in layouts(config(ODD["twelve experts"])):
        small = shrink(run, world_size=world)
        assert small.model.moe.num_experts <= 12 and small.model.moe.num_experts % run.parallel.ep == 0
    every = shrink(config(ODD["every expert"]), world_size=1).model.moe
    assert every.num_experts == 4 and every.top_k == 3


def test_a_small_run_shrinks_to_itself() -> None:
    for words in ODD.values():
        for world, run in layouts(config(words)):
            small = shrink(run, world_size=world)
            assert shrink(small, world_size=world) == small


# ---- layouts that need more ranks


def with_layout(tp: int, ep: int, words: str = "moe_15a2b") -> RunConfig:
    run = config(words)
    return replace(run, parallel=replace(run.parallel, tp=tp, ep=ep))


@pytest.mark.parametrize(
    ("tp", "ep", "world", "expected"),
    [
        (1, 8, 4, (1, 4)),
        (8, 1, 4, (4, 1)),
        (8, 8, 4, (4, 4)),
        (8, 64, 16, (8, 16)),
        (4, 32, 6, (2, 2)),  # 6 ranks: tp 2, and of 32 only 1 and 2 divide them
        (8, 8, 1, (1, 1)),
        (4, 16, 3, (1, 1)),
        (2, 8, 4, (2, 4)),
        (16, 2, 8, (8, 2)),
    ],
)
def test_a_layout_shrinks_to_its_largest_divisors(tp: int, ep: int, world: int, expected: tuple[int, int]) -> None:
    fitted = fit_layout(with_layout(tp, ep), world_size=world)
    assert (fitted.parallel.tp, fitted.parallel.ep) == expected
    assert replace(fitted, parallel=with_layout(tp, ep).parallel) == with_layout(tp, ep), "nothing else changes"


def test_a_fitted_layout_is_always_one_that_the_grid_allows() -> None:
    powers = [2**n for n in range(6)]
    for tp in powers:
        for ep in powers:
            for world in range(1, 33):
                fitted = fit_layout(with_layout(tp, ep), world_size=world).parallel
                if math.lcm(tp, ep) <= world:
                    assert (fitted.tp, fitted.ep) == (tp, ep), "left alone, also where the number of ranks is no multiple"
                    continue
                assert tp % fitted.tp == ep % fitted.ep == world % fitted.tp == world % fitted.ep == 0
                assert fitted.tp % fitted.ep == 0 or fitted.ep % fitted.tp == 0
                assert not any(tp % d == world % d == 0 for d in range(fitted.tp + 1, world + 1)), "tp could have been larger"


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize(
    ("tp", "ep", "word"),
    [
        (64, 1, "model.attention.num_heads (32) must be divisible by parallel.tp (64)"),
        (1, 256, "model.moe.num_experts (128) must be divisible by parallel.ep (256)"),
        (12, 8, "parallel.tp (12) must divide parallel.ep (8)"),
        (-8, 1, "parallel.tp (-8) must be at least 1"),
        (1, 0, "parallel.ep (0) must be at least 1"),
    ],
)
def test_a_layout_that_cannot_exist_is_not_made_smaller(tp: int, ep: int, world: int, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        order(with_layout(tp, ep), world_size=world, gpu=False)
    assert word in str(caught.value)


# ---- the order


def test_an_order_says_whether_the_layout_was_reduced() -> None:
    whole, part = (order(with_layout(2, 4), world_size=world, gpu=False) for world in (4, 2))
    assert not whole.reduced and part.reduced
    assert (part.asked, part.config.parallel.tp, part.config.parallel.ep) == ((2, 4), 2, 2)


@pytest.mark.parametrize(
    ("dtype", "gpu", "expected"), [("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16"), ("fp32", True, "fp32")]
)
def test_an_order_resolves_the_precision(dtype: str, gpu: bool, expected: str) -> None:
    run = config(f"nano --precision.dtype {dtype}")
    assert order(run, world_size=2, gpu=gpu).config.precision.dtype == expected


def test_the_vocabulary_keeps_its_padding_for_any_tp() -> None:
    for vocab, padded in ((VOCAB_MULTIPLE * 6, False), (VOCAB_MULTIPLE * 6 - 1, True)):
        for tp in (1, 2, 3, 6):
            run = config(f"nano {SIX_HEADS} --model.vocab_size {vocab} --parallel.tp {tp}")
            model = shrink(run, world_size=tp).model
            assert (model.padded_vocab_size > model.vocab_size) == padded
            assert model.padded_vocab_size % tp == 0
