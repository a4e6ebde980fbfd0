"""Parameter and FLOP counts against numbers worked out by hand and the paper's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megagate.config.cli import parse
from megagate.config.count import count_parameters, flops_per_token, parameter_parts, parameter_shapes
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

SMALL = ModelConfig(
    vocab_size=10,
    hidden_size=6,
    num_layers=2,
    ffn_size=5,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=2),
)
SMALL_MOE = replace(SMALL, moe=MoEConfig(num_experts=4, top_k=2, ffn_size=3))
SMALL_SHARED = replace(SMALL_MOE, moe=replace(SMALL_MOE.moe, shared_ffn_size=5))


def gated(model: ModelConfig, granularity: str) -> ModelConfig:
    gate = GateConfig(position="G1", granularity=granularity)  # type: ignore[arg-type]
    return replace(model, attention=replace(model.attention, gate=gate))


def preset(*names: str, overrides: tuple[str, ...] = ()) -> ModelConfig:
    argv = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return parse([*argv, *overrides], prog="megagate").model


def test_dense_by_hand() -> None:
    count = count_parameters(SMALL)
    assert count.embedding == count.head == 60
    assert count.attention == 2 * (48 + 24 + 24 + 48)
    assert count.ffn == 2 * 3 * 30
    assert count.norms == 2 * (6 + 6 + 2 + 2) + 6
    assert count.gate == count.router == count.experts == count.active_experts == count.shared_expert == 0
    assert count.total == count.active == 60 + 60 + 288 + 180 + 38


def test_moe_by_hand() -> None:
    count = count_parameters(SMALL_MOE)
    assert count.router == 2 * 4 * 6
    assert count.experts == 2 * 4 * 3 * 18
    assert count.active_experts == 2 * 2 * 3 * 18
    assert count.ffn == 0
    assert count.total == 60 + 60 + 288 + 38 + 48 + 432
    assert count.active == count.total - 216


def test_a_shared_expert_by_hand() -> None:
    """Every token passes it: all its parameters are active and work."""
    count, without = count_parameters(SMALL_SHARED), count_parameters(SMALL_MOE)
    assert count.shared_expert == 2 * 3 * 5 * 6 and without.shared_expert == 0
    assert replace(count, shared_expert=0) == without
    assert count.total - without.total == count.active - without.active == 180
    assert flops_per_token(SMALL_SHARED, 7) - flops_per_token(SMALL_MOE, 7) == 6 * 180


def test_gate_tied_head_and_norms_by_hand() -> None:
    assert count_parameters(gated(SMALL, "elementwise")).gate == 2 * 8 * 6
    assert count_parameters(gated(SMALL, "headwise")).gate == 2 * 4 * 6
    tied = replace(SMALL, tie_embeddings=True)
    assert count_parameters(tied).total == count_parameters(SMALL).total - 60
    assert "head.weight" not in parameter_shapes(tied)
    plain = replace(SMALL, attention=replace(SMALL.attention, qk_norm=False))
    assert count_parameters(plain).norms == 2 * 12 + 6


def test_padding_counts_only_on_request() -> None:
    padded = count_parameters(SMALL_MOE, padded=True)
    assert padded.total - count_parameters(SMALL_MOE).total == 2 * (128 - 10) * 6
    assert padded.total == sum(math.prod(shape) for shape in parameter_shapes(SMALL_MOE).values())


def test_names_shapes_and_parts() -> None:
    model = gated(SMALL_SHARED, "headwise")
    expected = {
        "embedding.weight": ((128, 6), "embedding"),
        **{
            f"layers.{layer}.{name}": shape_and_part
            for layer in range(2)
            for name, shape_and_part in {
                "attention_norm.weight": ((6,), "norms"),
                "attention.q.weight": ((8, 6), "attention"),
                "attention.k.weight": ((4, 6), "attention"),
                "attention.v.weight": ((4, 6), "attention"),
                "attention.o.weight": ((6, 8), "attention"),
                "attention.q_norm.weight": ((2,), "norms"),
                "attention.k_norm.weight": ((2,), "norms"),
                "attention.gate.weight": ((4, 6), "gate"),
                "ffn_norm.weight": ((6,), "norms"),
                "moe.router.weight": ((4, 6), "router"),
                "moe.experts.gate_up": ((4, 6, 6), "experts"),
                "moe.experts.down": ((4, 6, 3), "experts"),
                "moe.shared_expert.gate.weight": ((5, 6), "shared_expert"),
                "moe.shared_expert.up.weight": ((5, 6), "shared_expert"),
                "moe.shared_expert.down.weight": ((6, 5), "shared_expert"),
            }.items()
        },
        "final_norm.weight": ((6,), "norms"),
        "head.weight": ((128, 6), "head"),
    }
    assert parameter_shapes(model) == {name: shape for name, (shape, _) in expected.items()}
    assert parameter_parts(model) == {name: part for name, (_, part) in expected.items()}
    dense, parts = parameter_shapes(SMALL), parameter_parts(SMALL)
    assert dense["layers.1.ffn.gate.weight"] == dense["layers.1.ffn.up.weight"] == (5, 6)
    assert dense["layers.1.ffn.down.weight"] == (6, 5)
    assert {parts[f"layers.1.ffn.{name}.weight"] for name in ("gate", "up", "down")} == {"ffn"}


def test_flops_by_hand() -> None:
    matrices = 288 + 48 + 216 + 60
    scores_and_values = 2 * 7 * 4 * 2
    assert flops_per_token(SMALL_MOE, 7) == 6 * matrices + 6 * scores_and_values
    tied = replace(SMALL_MOE, tie_embeddings=True)
    assert flops_per_token(tied, 7) == flops_per_token(SMALL_MOE, 7), "a tied head is a matrix product all the same"


def test_the_papers_moe() -> None:
    baseline = count_parameters(preset("moe_15a2b", "gate_none"))
    assert baseline.total / 1e9 == pytest.approx(15.577, abs=5e-4)
    elementwise = count_parameters(preset("moe_15a2b", "gate_elementwise"))
    headwise = count_parameters(preset("moe_15a2b", "gate_headwise"))
    assert (elementwise.total - baseline.total) / 1e6 == pytest.approx(201, abs=0.5)
    assert (headwise.total - baseline.total) / 1e6 == pytest.approx(1.6, abs=0.05)
    assert count_parameters(preset("moe_15a2b")) == elementwise, "the headline gate is the preset's"


@pytest.mark.parametrize(("name", "narrow"), [("dense_1p7b_28l", 5461), ("dense_1p7b_48l", 3925)])
def test_the_papers_dense_models(name: str, narrow: int) -> None:
    baseline = count_parameters(preset(name))
    assert baseline.total / 1e9 == pytest.approx(1.7, abs=0.05)
    assert f"--model.ffn_size {narrow}." in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    gated_width = preset(name, "gate_elementwise", overrides=("--model.ffn_size", str(narrow)))
    per_column = 3 * gated_width.hidden_size * gated_width.num_layers
    assert abs(count_parameters(gated_width).total - baseline.total) <= per_column / 2
