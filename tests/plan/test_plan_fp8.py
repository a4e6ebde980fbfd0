"""What FP8 products keep, from the config alone, against the built model and what autograd keeps of the emulation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.sharded import CPU
from parity.variants import VARIANTS
from test_plan_activations import MOE, TEXT, kept_bytes

from megagate.backend.base import ColumnLinears, Part
from megagate.backend.build import build_backend
from megagate.backend.native import NativeBackend
from megagate.config.keys import from_dict
from megagate.config.model import GateConfig, ModelConfig, SwitchConfig
from megagate.config.paper import presets
from megagate.config.precision_rules import fp8_heads
from megagate.config.run import Fp8Config, ParallelConfig, PrecisionConfig, RunConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import Axis, ParallelMesh, grid
from megagate.plan.activations import Micro, kept_by_forward
from megagate.plan.fp8 import _products, fp8_copies, memory_notes
from megagate.plan.memory import estimate

KEPT = ("embedding", "head", "router")
SWITCHED = replace(MOE.attention, gate=GateConfig(), switch=SwitchConfig("kv", 3, 2))
MODELS = {
    "mixture": replace(MOE, attention=replace(MOE.attention, gate=GateConfig("G1"))),
    "shared expert after a dense block": replace(MOE, moe=replace(MOE.moe, shared_ffn_size=48, first_dense_layers=1), ffn_size=80),
    "switch heads": replace(MOE, attention=SWITCHED),
}


def fp8(recipe: str, *, keep: Sequence[str] = KEPT, model: ModelConfig = MOE, tp: int = 1) -> RunConfig:
    precision = PrecisionConfig(dtype="bf16", fp8=Fp8Config(recipe, emulate=True, keep_high_precision=tuple(keep)))
    return RunConfig(model=model, precision=precision, parallel=ParallelConfig(tp=tp))


class Asked(NativeBackend):
    """Remembers the parts of every product of several weights."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.parts: list[tuple[Part, ...]] = []

    def column_linears(self, width: int, parts: Sequence[Part], **how: Any) -> ColumnLinears:
        self.parts.append(tuple(parts))
        return super().column_linears(width, parts, **how)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_in_fp8_are_those_that_the_attention_asks_for(name: str) -> None:
    """Of every variant, the gate rounded or not, cut or not; of four ranks there are more than key/value heads."""
    for tp in (1, 2, 4):
        table = grid(tp, tp=tp, ep=1)
        assert_asked_for(VARIANTS[name], ParallelMesh(**{axis: Axis(axis, tuple(ranks[0])) for axis, ranks in table.items()}))


def assert_asked_for(model: ModelConfig, mesh: ParallelMesh) -> None:
    LanguageModel(model, dtype=torch.bfloat16, backend=(backend := Asked(CPU)), mesh=mesh)
    parts = next(parts for parts in backend.parts if parts[0].name == "q")
    for roles, keep in ((("projection",), (*KEPT, "gate")), (("projection", "gate"), KEPT)):
        rows = sum(part.rows for part in parts if part.role in roles)
        assert sum(fp8_heads(fp8("current", keep=keep, model=model, tp=mesh.tp.size)).values()) * model.attention.head_dim == rows


@pytest.mark.parametrize("keep", [KEPT, (*KEPT, "gate", "first_layers")], ids=["all", "less"])
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
@pytest.mark.parametrize("name", MODELS)
def test_an_emulation_keeps_less_than_is_told(name: str, recipe: str, keep: Sequence[str]) -> None:
    """Of each product the bytes of its weights and input, once; all in all no more than bf16's activations and the copies."""
    config = fp8(recipe, keep=keep, model=MODELS[name])
    mesh = ParallelMesh.single()
    backend = build_backend(config.precision, device=CPU, mesh=mesh)
    micro = Micro(*TEXT, element=2, core="blockwise", row_multiple=backend.row_multiple)
    real = kept_bytes(config.model, micro, mesh, recompute=False, backend=backend)
    micro = replace(micro, expert_rows=real.rows)
    first = "first_layers" in keep
    products = [product for layer in range(first, 2) for product in _products(config, layer, micro)]
    in_bytes = sum(size for what, size in real.sizes.items() if "float8" in what)
    exact = sum(map(sum, products))
    assert in_bytes == exact or (recipe == "blockwise" and exact < in_bytes < 1.3 * exact), "it fills blocks of 128 that are cut short"
    plain = sum(kept_by_forward(config.model, micro, recompute=False).values())
    copies = fp8_copies(config, micro, recompute=False)
    assert in_bytes < copies < 2.1 * in_bytes
    assert real.sizes.total() <= plain + copies
    assert real.sizes.total() > plain - 2 * sum(inputs + weights for weights, inputs in products), "what is saved is that input in bf16"


def test_copies_of_one_block_are_there_at_a_time_where_blocks_are_recomputed() -> None:
    micro = Micro(*TEXT)
    config = fp8("current", model=MODELS["shared expert after a dense block"])
    (dense, mixture) = (
        fp8_copies(fp8("current", keep=(*KEPT, kept), model=config.model), micro, recompute=False)
        for kept in ("last_layers", "first_layers")
    )
    assert fp8_copies(config, micro, recompute=False) == pytest.approx(dense + mixture, abs=2)
    assert fp8_copies(config, micro, recompute=True) == max(dense, mixture)
    assert fp8_copies(RunConfig(model=MOE), micro, recompute=False) == fp8_copies(RunConfig(model=MOE), micro, recompute=True) == 0


def test_an_estimate_has_them_and_says_so() -> None:
    paper = {**presets()["paper/table1/row05"].settings, "parallel.ep": 8}
    bf16, te = from_dict(paper), from_dict({**paper, "precision.fp8.recipe": "blockwise", "precision.backend": "te"})
    plain, rounded = (estimate(config, world_size=8) for config in (bf16, te))
    micro = Micro(bf16.micro_batch(8), bf16.train.seq_len, 1, 8)
    weights_of_products = sum(weights for layer in range(24) for weights, _ in _products(te, layer, micro))
    assert 2 * weights_of_products < rounded.kept - plain.kept < 4 * weights_of_products
    assert rounded.kept - plain.kept == fp8_copies(te, micro, recompute=False)
    assert rounded.recomputed - plain.recomputed == fp8_copies(te, micro, recompute=True)
    assert rounded.kept_if_twice - rounded.kept > plain.kept_if_twice - plain.kept
    assert (rounded.weights, rounded.masters, rounded.moments) == (plain.weights, plain.masters, plain.moments)
    assert memory_notes(bf16) == ()
    of_recipe, of_te = memory_notes(te)
    assert "blockwise are an upper bound" in of_recipe and "was not measured" in of_te
    _, of_emulation = memory_notes(fp8("current"))
    assert "fp32 temporaries are not counted" in of_emulation


def test_experts_rows_are_padded_as_the_recipe_needs() -> None:
    """Each expert gets 16 rows, which MXFP8 fills up to 32."""
    few = {**presets()["paper/table1/row05"].settings, "parallel.ep": 8, "train.seq_len": 32, "train.micro_batch_size": 1}
    recipes = {"precision.backend": "te", "precision.fp8.recipe": "current"}, {"precision.backend": "te", "precision.fp8.recipe": "mxfp8"}
    current, mxfp8 = (estimate(from_dict({**few, **recipe}), world_size=8).kept for recipe in recipes)
    more_rows = 24 * 16 * 16  # layers, local experts, rows more of each
    hidden, width = 2048, 768
    assert mxfp8 - current == pytest.approx(more_rows * (2 * (hidden + 3 * width) + 33 / 32 * (hidden + width)), rel=0.02)
