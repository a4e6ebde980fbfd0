"""The language model: its names and shapes, initial weights, recomputation, sampling logits."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import ranks
import torch
import yaml
from parity.sharded import BACKEND, CPU, assert_all_close, assert_close, clear_routes, fill, full_gradients, full_weights
from parity.variants import VARIANTS
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megagate.config.cli import parse
from megagate.config.count import Part, count_parameters, flops_per_token, parameter_parts, parameter_shapes
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.model.lm import LanguageModel
from megagate.nn.base import named_labels
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
BASES = sorted(path.name for path in CONFIGS.glob("*.yaml") if "hidden_size" in yaml.safe_load(path.read_text())["model"])
DELTAS = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name not in BASES)

GATED = ModelConfig(
    vocab_size=200,
    hidden_size=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, gate=GateConfig("G1", "elementwise")),
    moe=MoEConfig(num_experts=4, top_k=2, ffn_size=16, shared_ffn_size=24),
)
UNGATED = dataclasses.replace(GATED, attention=dataclasses.replace(GATED.attention, gate=GateConfig("none")))
SHALLOW = dataclasses.replace(GATED, num_layers=1)
SHALLOW_UNSHARED = dataclasses.replace(SHALLOW, moe=dataclasses.replace(SHALLOW.moe, shared_ffn_size=0))
TIED_DENSE = dataclasses.replace(UNGATED, moe=MoEConfig(), ffn_size=48, tie_embeddings=True)


def build(config: ModelConfig, mesh: ParallelMesh | None = None, *, recompute: bool = False) -> LanguageModel:
    mesh = mesh or ParallelMesh.single()
    return LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=mesh, recompute=recompute)


def initial(config: ModelConfig, mesh: ParallelMesh | None = None, *, seed: int = 5) -> dict[str, Tensor]:
    mesh = mesh or ParallelMesh.single()
    return full_weights(build(config, mesh).initialize(seed=seed, device=CPU), mesh)


def sample(config: ModelConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, config.vocab_size, (2, 17), generator=generator)
    return text[:, :-1], text[:, 1:]


# ---- names and shapes


def test_every_example_config_is_tested():
    assert len(BASES) >= 5 and len(BASES) + len(DELTAS) == len(list(CONFIGS.glob("*.yaml")))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("delta", [None, *DELTAS])
def test_names_and_shapes_are_those_of_the_count(base, delta):
    files = [CONFIGS / name for name in (base, delta) if name]
    config = parse([word for path in files for word in ("--config", str(path))], prog="test").model
    model = build(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)
    assert {name: label.shard.full_shape for name, label in named_labels(model).items()} == parameter_shapes(config)
    assert all(p.is_meta for p in model.parameters()), "nothing is held before it gets its values"


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_of_every_variant_are_those_of_the_count(variant):
    labels = named_labels(build(VARIANTS[variant]))
    assert {name: label.shard.full_shape for name, label in labels.items()} == parameter_shapes(VARIANTS[variant])


def test_the_count_is_that_of_the_built_parts():
    """Of a model that has every part of a mixture of experts; the example configs have no shared expert."""
    built = {name: p.numel() for name, p in build(GATED).named_parameters()}
    parts, count = parameter_parts(GATED), count_parameters(GATED, padded=True)
    assert parts.keys() == built.keys(), "each parameter belongs to a part"
    by_part = {part: sum(size for name, size in built.items() if parts[name] == part) for part in get_args(Part)}
    assert by_part == {part: count.parts[part] for part in get_args(Part)}
    idle = 1 - GATED.moe.top_k / GATED.moe.num_experts
    assert count.active == count.total - idle * by_part["experts"] == sum(built.values()) - idle * by_part["experts"]


def test_operations_of_a_shared_expert_are_those_that_run():
    """Against PyTorch's own count. One layer: a second would route otherwise without a shared expert below."""
    tokens, labels = sample(SHALLOW)

    def counted(config: ModelConfig) -> int:
        model = fill(build(config))
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels).ce_sum.backward()
        return counter.get_total_flops()

    of_a_token = [flops_per_token(config, tokens.shape[1]) for config in (SHALLOW, SHALLOW_UNSHARED)]
    assert counted(SHALLOW) - counted(SHALLOW_UNSHARED) == tokens.numel() * (of_a_token[0] - of_a_token[1]) > 0


# ---- initial weights


def initial_under(context: RankContext, config: ModelConfig, tp: int, ep: int) -> dict[str, Tensor] | None:
    weights = initial(config, ParallelMesh.build(tp=tp, ep=ep))
    return weights if context.rank == context.world_size - 1 else None


@pytest.mark.parametrize(("world_size", "tp", "ep"), [(2, 1, 2), (2, 2, 1), (4, 2, 4), (4, 4, 2)])
def test_initial_weights_do_not_depend_on_the_layout(world_size, tp, ep):
    weights = ranks.run_ranks(initial_under, world_size, GATED, tp, ep)[-1]
    assert_all_close(weights, initial(GATED), to=0)


def test_a_gated_model_begins_as_its_baseline():
    gated, baseline = initial(GATED), initial(UNGATED)
    extra = set(gated) - set(baseline)
    assert extra == {"layers.0.attention.gate.weight", "layers.1.attention.gate.weight"}
    assert_all_close({name: value for name, value in gated.items() if name not in extra}, baseline, to=0)


def test_initial_weights_depend_on_the_seed_and_on_the_name():
    first, second = initial(GATED, seed=1), initial(GATED, seed=2)
    drawn = [name for name in first if "norm" not in name]
    assert all(not torch.isclose(first[name], second[name]).any(-1).all() for name in drawn)
    matrices = [m for name in drawn for m in (first[name] if first[name].ndim == 3 else [first[name]])]
    starts = {round(matrix.flatten()[0].item(), 9) for matrix in matrices}
    assert len(starts) == len(matrices), "no two matrices, and no two experts, have the same values"


def test_initial_spread():
    narrow = 0.02 / 2  # GPT-2's rule for the projections that write to the residual stream: / sqrt(2 num_layers), 2 layers
    for name, value in initial(dataclasses.replace(GATED, vocab_size=2000)).items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            output = name.endswith(("attention.o.weight", "experts.down", "shared_expert.down.weight"))
            assert value.std().item() == pytest.approx(narrow if output else 0.02, rel=0.1), name
            assert abs(value.mean().item()) < 0.1 * 0.02, name


# Sums of every parameter times cos(0), cos(1), ...: any change of any initial value shows here. Numbers rather than a hash of the bytes,
# because PyTorch's normal numbers differ in their last bit between kinds of processors.
PINNED = {
    "embedding.weight": 0.360845,
    "layers.0.attention.q.weight": 0.233040,
    "layers.0.attention.k.weight": 0.933263,
    "layers.0.attention.v.weight": 0.192194,
    "layers.0.attention.o.weight": -0.142625,
    "layers.0.attention.gate.weight": -0.001550,
    "layers.0.moe.router.weight": -0.132830,
    "layers.0.moe.experts.gate_up": -0.632710,
    "layers.0.moe.experts.down": 0.668450,
    "layers.0.moe.shared_expert.gate.weight": 0.500827,
    "layers.0.moe.shared_expert.up.weight": 0.153642,
    "layers.0.moe.shared_expert.down.weight": -0.093507,
    "head.weight": 1.070373,
}


def test_initial_values_never_change_silently():
    drawn = {name: value.flatten().double() for name, value in initial(SHALLOW).items() if "norm" not in name}
    sums = {name: (value * torch.arange(value.numel()).cos()).sum().item() for name, value in drawn.items()}
    assert sums == pytest.approx(PINNED, abs=2e-6), "runs of the past could not be repeated: is this change wanted?"


# ---- forward and backward


def loss_and_gradients(config: ModelConfig, mesh: ParallelMesh, *, recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Of an objective that uses all that the model returns, on a batch that all tp ranks share."""
    model = fill(build(config, mesh, recompute=recompute))
    with clear_routes(model):
        parts = model(*sample(config))
    extra = sum((s.prob_sums * torch.arange(s.prob_sums.numel()).view_as(s.prob_sums)).sum() + s.z_sum for s in parts.stats)
    (parts.ce_sum + 0.1 * extra).backward()
    return parts.ce_sum.detach(), full_gradients(model, mesh)


@pytest.mark.parametrize("config", [GATED, TIED_DENSE], ids=["gated moe", "tied dense"])
def test_recomputation_changes_nothing(config):
    kept, recomputed = (loss_and_gradients(config, ParallelMesh.single(), recompute=recompute) for recompute in (False, True))
    assert torch.equal(kept[0], recomputed[0])
    assert_all_close(recomputed[1], kept[1], to=0)


def test_recomputation_keeps_less():
    def kept_bytes(*, recompute: bool) -> int:
        model, kept = fill(build(GATED, recompute=recompute)), {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*sample(GATED))
        return sum(kept.values())

    assert kept_bytes(recompute=True) < 0.5 * kept_bytes(recompute=False)


def under_tp(context: RankContext, config: ModelConfig, recompute: bool) -> None:
    """Loss, gradients and logits of the same batch on all ranks."""
    mesh = ParallelMesh.build(tp=context.world_size, ep=context.world_size if config.is_moe else 1)
    expected = loss_and_gradients(config, ParallelMesh.single(), recompute=False)
    value, gradients = loss_and_gradients(config, mesh, recompute=recompute)
    assert_close(value, expected[0], to=1e-6, what="loss")
    assert_all_close(gradients, expected[1], to=1e-5)
    model, whole = fill(build(config, mesh)), fill(build(config))
    tokens, _ = sample(config)
    logits = model.logits(tokens)
    assert logits.shape == (*tokens.shape, config.vocab_size) and logits.dtype == torch.float32 and not logits.requires_grad
    assert_close(logits, whole.logits(tokens), to=5e-6, what="logits")


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [GATED, TIED_DENSE], ids=["gated moe", "tied dense"])
def test_loss_gradients_and_logits_under_tp(world_size, config, recompute):
    ranks.run_ranks(under_tp, world_size, config, recompute)


def test_logits_and_loss_agree():
    model = fill(build(GATED))
    tokens, labels = sample(GATED)
    logits = model.logits(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(model(tokens, labels).ce_sum, expected, to=1e-6)
