"""Parameter and FLOP counts against numbers worked out by hand and the paper's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megagate.config.cli import parse
from megagate.config.count import count_parameters, flops_per_token, parameter_shapes
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
    assert count.gate == count.router == count.experts == count.active_experts == 0
    assert count.total == count.active == 60 + 60 + 288 + 180 + 38


def test_moe_by_hand() -> None:
    count = count_parameters(SMALL_MOE)
    assert count.router == 2 * 4 * 6
    assert count.experts == 2 * 4 * 3 * 18
    assert count.active_experts == 2 * 2 * 3 * 18
    assert count.ffn == 0
    assert count.total == 60 + 60 + 288 + 38 + 48 + 432
    assert count.active == count.total - 216


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


def test_names_and_shapes() -> None:
    shapes = parameter_shapes(gated(SMALL_MOE, "headwise"))
    assert shapes == {
        "embedding.weight": (128, 6),
        **{
            f"layers.{layer}.{name}": shape
            for layer in range(2)
            for name, shape in {
                "attention_norm.weight": (6,),
                "attention.q.weight": (8, 6),
                "attention.k.weight": (4, 6),
                "attention.v.weight": (4, 6),
                "attention.o.weight": (6, 8),
                "attention.q_norm.weight": (2,),
                "attention.k_norm.weight": (2,),
                "attention.gate.weight": (4, 6),
                "ffn_norm.weight": (6,),
                "moe.router.weight": (4, 6),
                "moe.experts.gate_up": (4, 6, 6),
                "moe.experts.down": (4, 6, 3),
            }.items()
        },
        "final_norm.weight": (6,),
        "head.weight": (128, 6),
    }
    dense = parameter_shapes(SMALL)
    assert dense["layers.1.ffn.gate.weight"] == dense["layers.1.ffn.up.weight"] == (5, 6)
    assert dense["layers.1.ffn.down.weight"] == (6, 5)


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
