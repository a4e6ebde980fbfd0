"""A whole model under emulated FP8, in one process: recomputed, evaluated, with and without state."""

from dataclasses import replace

import pytest
import torch
from parity import engines
from parity.sharded import fill

from megagate.backend.base import KeepsState
from megagate.backend.build import build_backend
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.kept import put_back
from megagate.backend.native import NativeBackend
from megagate.config.run import Fp8Config, PrecisionConfig
from megagate.engine.reference import ReferenceEngine
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

CPU, MESH = torch.device("cpu"), ParallelMesh.single()
RECIPES = ("delayed", "current", "blockwise", "mxfp8")
FIRST = ("attention.q.weight", "attention.v.weight", "moe.experts.gate_up")
LAST = ("attention.o.weight", "moe.experts.down")
"""Weights of products in FP8: those that read the residual stream, and those that write to it."""


def an_engine(recipe: str, *, dtype: str = "bf16", recompute: bool = False, history: int = 3) -> ReferenceEngine:
    run = engines.Run(dtype=dtype, recompute=recompute)
    config = engines.run_config(run, engines.Layout())
    fp8 = Fp8Config(recipe, emulate=recipe != "none", amax_history=history)
    config = replace(config, precision=replace(config.precision, fp8=fp8))
    backend = build_backend(config.precision, device=CPU, mesh=MESH)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    return ReferenceEngine(fill(LanguageModel(config.model, dtype=kind, backend=backend, mesh=MESH, recompute=recompute)), config, MESH)


def state(engine: ReferenceEngine) -> dict[str, torch.Tensor]:
    """As a checkpoint names it."""
    sites = [(name, module) for name, module in engine.model.named_modules() if isinstance(module, KeepsState)]
    return {f"{name}.{kept.name}": kept.tensor.clone() for name, site in sites for kept in site.kept_state()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_blocks_give_the_same_bits(recipe: str) -> None:
    results = []
    for recompute in (False, True):
        engine = an_engine(recipe, recompute=recompute)
        steps = engines.train(engine, range(3), lr=0.5)
        results.append(([(s.loss, s.grad_norm) for s in steps], engine.masters, state(engine)))
    (losses, masters, kept), (again, masters_again, kept_again) = results
    assert losses == again and list(kept) == list(kept_again)
    assert all(torch.equal(masters[name], masters_again[name]) for name in masters)
    assert all(torch.equal(kept[name], kept_again[name]) for name in kept)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_shows_in_the_loss_and_stays_near(recipe: str) -> None:
    plain, rounded = (engines.train(an_engine(r, dtype="fp32"), range(2), lr=0.5) for r in ("none", recipe))
    for ours, exact in zip(rounded, plain, strict=True):
        assert 1e-5 < abs(ours.loss - exact.loss) < 0.05 * exact.loss
        assert abs(ours.grad_norm - exact.grad_norm) < 0.2 * exact.grad_norm


def test_an_evaluation_leaves_the_scales_and_training_moves_them() -> None:
    engine = an_engine("delayed")
    engines.train(engine, [0], lr=0.5)
    before = state(engine)
    assert any(tensor.any() for tensor in before.values())
    engine.evaluate([tuple(t[0] for t in engines.batch(7, MESH))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(engine).items())
    engines.train(engine, [1], lr=0.5)
    of_dense = {name: tensor for name, tensor in state(engine).items() if name.endswith("history") and "experts" not in name}
    assert of_dense and all(not torch.equal(tensor, before[name]) for name, tensor in of_dense.items())


def test_names_of_parameters_and_state_do_not_depend_on_precision() -> None:
    plain, delayed = an_engine("none").model, an_engine("delayed").model
    assert list(plain.state_dict()) == list(delayed.state_dict()) and not list(delayed.buffers())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in delayed.named_parameters()]
    names = list(state(an_engine("delayed")))
    kept = [f"{operand}.{what}" for operand in ("input", "weight", "grad") for what in ("history", "scale")]
    assert names[:6] == [f"layers.0.attention.project.{name}" for name in kept]
    assert "layers.1.moe.experts.out.grad.scale" in names and len(names) == len(set(names)) == 2 * 4 * 6
    assert not state(an_engine("blockwise"))


def test_a_config_names_the_backend() -> None:
    fp8 = Fp8Config("mxfp8", emulate=True, keep_high_precision=("embedding", "head", "router", "first_layers"))
    made = build_backend(PrecisionConfig(fp8=fp8), device=CPU, mesh=MESH)
    assert isinstance(made, EmulatedBackend) and made.config is fp8
    assert isinstance(build_backend(PrecisionConfig(), device=CPU, mesh=MESH), NativeBackend)


def test_what_sites_keep_can_be_put_back() -> None:
    engine = an_engine("delayed")
    engines.train(engine, [0], lr=0.5)
    before = state(engine)
    with put_back(engine.model):
        engines.train(engine, [1], lr=0.5)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in state(engine).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(engine).items())


def test_gradients_come_with_the_scales_of_delayed_scaling() -> None:
    """With scale 1 gradients of 1 / tokens vanish: a product has one once its scale has seen one, and two products follow each other."""
    engine = an_engine("delayed")
    model, (tokens, labels) = engine.model, (t[0] for t in engines.batch(0, MESH))
    shares = []
    for _ in range(3):
        model.zero_grad()
        (model(tokens, labels).ce_sum / 4e6).backward()
        model.backend.after_backward(model)
        grads = {name: (p.grad != 0).float().mean().item() for name, p in model.named_parameters()}
        shares.append([{grads[f"layers.1.{name}"] > 0.5 for name in names} for names in (LAST, FIRST)])
    assert shares == [[{False}, {False}], [{True}, {False}], [{True}, {True}]]
