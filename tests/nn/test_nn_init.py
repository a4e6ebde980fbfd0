"""Initial values: what two models share begins with the same bits, and what is narrower is the leading part of what is wider."""

from dataclasses import replace

import pytest
import ranks
import torch
from parity.sharded import BACKEND, CPU, full_weights
from parity.variants import DENSE, MOE, VARIANTS
from torch import Tensor

from megagate.config.model import GateConfig, ModelConfig
from megagate.model.lm import LanguageModel
from megagate.nn.base import Label
from megagate.nn.init import _draw
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.shard import Shard
from megagate.parallel.spawn import RankContext


def ungated(model: ModelConfig) -> ModelConfig:
    return replace(model, attention=replace(model.attention, gate=GateConfig()))


def initial(model: ModelConfig, mesh: ParallelMesh | None = None) -> dict[str, Tensor]:
    mesh = mesh or ParallelMesh.single()
    built = LanguageModel(model, dtype=torch.float32, backend=BACKEND, mesh=mesh).initialize(seed=5, device=CPU)
    return full_weights(built, mesh)


def leading(wide: Tensor, shape: torch.Size) -> Tensor:
    return wide[tuple(slice(0, size) for size in shape)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_begins_as_its_baseline(variant):
    """All that is named alike has the same bits, whatever else the variant has."""
    values, baseline = initial(VARIANTS[variant]), initial(ungated(MOE if VARIANTS[variant].is_moe else DENSE))
    shared = values.keys() & baseline.keys()
    assert len(shared) >= len(baseline) - 6, "a block at most is another one"  # a dense first layer instead of a mixture
    assert all(torch.equal(values[name], baseline[name]) for name in shared)


@pytest.mark.parametrize("narrow", [40, 24, 5])
def test_a_narrowed_feed_forward_is_the_leading_part(narrow):
    wide, thin = initial(DENSE), initial(replace(DENSE, ffn_size=narrow))
    assert thin["layers.1.ffn.down.weight"].shape == (32, narrow)
    assert all(torch.equal(value, leading(wide[name], value.shape)) for name, value in thin.items())


def test_fewer_heads_are_the_leading_ones():
    """q=48 and k=8 of the paper's Table 1 begin with the heads of its baseline."""
    wide = initial(replace(ungated(DENSE), attention=replace(ungated(DENSE).attention, num_heads=8, num_kv_heads=4)))
    thin = initial(ungated(DENSE))
    assert wide["layers.0.attention.o.weight"].shape == (32, 64) and thin["layers.0.attention.o.weight"].shape == (32, 32)
    assert all(torch.equal(value, leading(wide[name], value.shape)) for name, value in thin.items())


def under_tp(context: RankContext, model: ModelConfig) -> dict[str, Tensor] | None:
    weights = initial(model, ParallelMesh.build(tp=context.world_size, ep=1))
    return weights if context.rank == 0 else None


def test_narrowed_under_tp_too():
    thin = ranks.run_ranks(under_tp, 2, replace(DENSE, ffn_size=24))[0]
    wide = initial(DENSE)
    assert all(torch.equal(value, leading(wide[name], value.shape)) for name, value in thin.items())


@pytest.mark.parametrize("init", ["normal", "output"])
def test_draws_of_any_size_are_leading_parts(init):
    """Also where a size is no multiple of what PyTorch draws together."""
    widths = [1, 2, 3, 15, 16, 17, 100]
    draws = []
    for width in widths:
        shape = (7, width) if init == "output" else (width, 7)
        draws.append(_draw(Label(Shard(shape), init), shape, "key", 1.0))
    assert all(torch.equal(draw, leading(draws[-1], draw.shape)) for draw in draws)
    assert draws[-1].unique().numel() == 700
