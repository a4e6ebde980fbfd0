"""The backend of Transformer Engine (TE) through TE's real Python layer, over kernels of our own (`stub_extension.py`).

In fp32, with TE's router and permutation and without its attention, which has none, it computes what the native backend does, under every
layout (`test_te_shim_model.py` compares in bf16). With FP8: its state, the regions of its amaxes, and what stays out.
"""

import dataclasses
from typing import Any

import pytest
import torch
from parity.sharded import CPU, assert_all_close, assert_close, fill, random
from te.te_ranks import needs_te, run
from torch import Tensor, nn

from megagate.backend.base import Backend, KeepsState, Part
from megagate.backend.documents import Documents
from megagate.backend.native import NativeBackend, attend
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import Fp8Config, PrecisionConfig
from megagate.model.lm import LanguageModel
from megagate.nn.base import named_labels
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

pytestmark = needs_te
MOE = MoEConfig(num_experts=4, top_k=2, ffn_size=32, shared_ffn_size=32, shared_gate=True, first_dense_layers=1)
BASE = ModelConfig(
    vocab_size=200,
    hidden_size=64,
    num_layers=2,
    ffn_size=64,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, gate=GateConfig("G1", "elementwise")),
    moe=MOE,
)
BATCH, LENGTH, EOD = 2, 16, 7


MODELS = {
    "renormalised": BASE,
    "not renormalised": dataclasses.replace(BASE, moe=dataclasses.replace(MOE, renormalize=False)),
    "sigmoid with bias": dataclasses.replace(BASE, moe=dataclasses.replace(MOE, score="sigmoid", bias_update_rate=1e-3, z_loss_coef=0.0)),
}


def te_backend(mesh: ParallelMesh, **fp8: Any) -> Backend:
    from megagate.backend.te import TransformerEngineBackend

    keep = fp8.pop("keep", ())
    config = Fp8Config(**fp8, keep_high_precision=("embedding", "head", "router", *keep))
    return TransformerEngineBackend(PrecisionConfig(backend="te", fp8=config), device=CPU, mesh=mesh, norm=NativeBackend(CPU).norm)


def model_of(config: ModelConfig, backend: Backend, mesh: ParallelMesh, *, dtype=torch.float32, **options: Any) -> LanguageModel:
    return fill(LanguageModel(config, dtype=dtype, backend=backend, mesh=mesh, **options))


def step(model: LanguageModel, mesh: ParallelMesh, *, key: str = "tokens") -> dict[str, Tensor]:
    """Loss and gradients of one micro-step, this rank's."""
    text = (100 + 40 * random(f"{key}/{mesh.dp.rank}", BATCH, LENGTH + 1)).long().clamp(0, 199)
    text[:, ::9] = EOD
    model.zero_grad()
    parts = model(text[:, :-1], text[:, 1:])
    weights = torch.arange(1.0, 1 + model.config.moe.num_experts)
    (parts.ce_sum + sum((stats.prob_sums * weights).sum() + stats.z_sum for stats in parts.stats)).backward()
    return {"loss": parts.ce_sum.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- without FP8


@pytest.mark.parametrize("name", MODELS)
def test_fp32_is_the_native_backend(name):
    (found,) = run(both, 1, MODELS[name], 1, 1, {})
    assert_all_close(found[0], found[1], to=2e-5)


@pytest.mark.parametrize(("world", "tp", "ep"), [(2, 2, 1), (4, 2, 2)])
def test_fp32_is_the_native_backend_under_every_layout(world, tp, ep):
    for found in run(both, world, BASE, tp, ep, {"recompute": True, "eod_id": EOD}):
        assert_all_close(found[0], found[1], to=2e-5)


def both(context: RankContext, config: ModelConfig, tp: int, ep: int, options: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = ParallelMesh.build(tp=tp, ep=ep) if context.world_size > 1 else ParallelMesh.single()
    ours, native = (model_of(config, backend, mesh, **options) for backend in (te_backend(mesh), NativeBackend(CPU)))
    assert list(ours.state_dict()) == list(native.state_dict())
    assert named_labels(ours) == named_labels(native)
    assert not [module for module in ours.modules() if type(module).__module__.startswith("transformer_engine")]
    return step(ours, mesh), step(native, mesh)


# ---- with FP8


def make(
    context: RankContext, fp8: dict, *, ep: int = 1, tp: int = 1, single: bool = False, **options: Any
) -> tuple[LanguageModel, ParallelMesh]:
    mesh = ParallelMesh.single() if single or context.world_size == 1 else ParallelMesh.build(tp=tp, ep=ep)
    backend, native = te_backend(mesh, **fp8), NativeBackend(CPU)
    backend.permute, backend.unpermute = native.permute, native.unpermute  # Triton's interpreter takes its time
    return model_of(BASE, backend, mesh, dtype=torch.bfloat16, **options), mesh


def kept(model: nn.Module) -> dict[str, Tensor]:
    """All state, by its name in a checkpoint."""
    sites = {name: module for name, module in model.named_modules() if isinstance(module, KeepsState)}
    return {f"{name}.{one.name}": one.tensor for name, site in sites.items() for one in site.kept_state()}


DELAYED = {"recipe": "delayed", "amax_history": 4}


def test_state_is_there_before_the_first_step_and_live():
    (found,) = run(states, 1)
    before, after, shapes, loaded = found
    assert list(before) == list(after)
    assert all(bool((value == (1 if name.endswith("scale") else 0)).all()) for name, value in before.items())
    grown = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert grown == list(after)
    assert shapes["layers.1.moe.experts.project.input.history"] == (4, 4)
    assert shapes["layers.1.moe.experts.out.weight.scale"] == (4,)
    assert shapes["layers.0.attention.project.grad.history"] == (4,)
    assert shapes["layers.0.attention.out.grad.scale"] == (1,)
    assert loaded["same"] and not loaded["another"]


def states(context: RankContext) -> tuple:
    model, mesh = make(context, DELAYED)
    before = {name: value.clone() for name, value in kept(model).items()}
    step(model, mesh)
    after = {name: value.clone() for name, value in kept(model).items()}
    following = step(model, mesh)
    other, _ = make(context, DELAYED)
    fresh = step(other, mesh)
    for name, value in kept(other).items():
        value.copy_(after[name])
    again = step(other, mesh)
    loaded = {
        "same": all(torch.equal(again[name], following[name]) for name in again),
        "another": torch.equal(fresh["loss"], following["loss"]),
    }
    return before, after, {name: tuple(value.shape) for name, value in after.items()}, loaded


def test_a_first_block_in_high_precision_keeps_nothing_and_disturbs_nothing():
    (found,) = run(without_the_first, 1)
    assert found and not [name for name in found if name.startswith("layers.0")]
    # One entry a step: TE's first FP8 module, whose backward pass updates those of gradients, is one of the second block.
    assert {name: int((history != 0).sum(-1).max()) for name, history in found.items()} == dict.fromkeys(found, 2)


def without_the_first(context: RankContext) -> dict[str, Tensor]:
    model, mesh = make(context, DELAYED | {"keep": ("gate", "first_layers")})
    for key in "ab":
        step(model, mesh, key=key)
    return {name: value for name, value in kept(model).items() if name.endswith("history")}


def test_amaxes_are_of_the_world_and_of_experts_over_edp():
    found = run(histories, 4)
    for name, first in found[0].items():
        same = [torch.equal(first, other[name]) for other in found]
        # With ep 2 ranks 0 and 2 have the same experts.
        assert same == ([True, False, True, False] if ".experts." in name else [True] * 4), (name, same)


def histories(context: RankContext) -> dict[str, Tensor]:
    model, mesh = make(context, DELAYED, ep=2)
    for key in "ab":
        step(model, mesh, key=key)
    return {name: value for name, value in kept(model).items() if name.endswith(("input.history", "grad.history"))}


def test_experts_of_one_rank_keep_their_own_scales():
    first, second = run(alone, 2)
    differing = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert differing == [name for name in first if ".experts." in name]


def alone(context: RankContext) -> dict[str, Tensor]:
    model, mesh = make(context, DELAYED, ep=2)
    step(model, mesh)
    return {name: value for name, value in kept(model).items() if name.endswith("input.history")}


def test_a_process_that_stands_for_itself_waits_for_nobody():
    first, second = run(one_and_both, 2, timeout=60)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def one_and_both(context: RankContext) -> dict[str, Tensor]:
    """The first rank trains a model of its own, as a reference does; then all train another."""
    if context.rank == 0:
        step(*make(context, DELAYED, single=True))
    return together(*make(context, DELAYED))


def together(model: LanguageModel, mesh: ParallelMesh) -> dict[str, Tensor]:
    step(model, mesh)
    return {name: value for name, value in kept(model).items() if name.endswith("input.history")}


def test_a_pass_that_fails_tells_why_and_leaves_no_trace():
    untroubled = run(failing, 2, False)
    for (error, found), (_, expected) in zip(run(failing, 2, True, timeout=60), untroubled, strict=True):
        assert error == "no memory is left"
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def failing(context: RankContext, fails: bool) -> tuple[str, dict[str, Tensor]]:
    """One rank after the other has an error in a pass with gradients, while the other goes on; then both train."""
    model, mesh = make(context, DELAYED)
    error = ""
    for rank in range(2):
        if fails and context.rank == rank:
            error = failed(model)
        torch.distributed.barrier()
    return error, together(model, mesh)


def failed(model: LanguageModel) -> str:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory is left")

    hook = model.layers[1].register_forward_pre_hook(fail)
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    try:
        model(tokens, tokens)
    except RuntimeError as raised:
        assert torch.is_grad_enabled()
        return str(raised)
    finally:
        hook.remove()
    return ""


def test_a_validation_leaves_no_trace():
    (found,) = run(validated, 1)
    assert found == (True, True)


def validated(context: RankContext) -> tuple[bool, bool]:
    model, mesh = make(context, DELAYED)
    step(model, mesh)
    before = {name: value.clone() for name, value in kept(model).items()}
    with torch.no_grad():
        model(torch.full((BATCH, LENGTH), 3), None)
    same = all(torch.equal(value, before[name]) for name, value in kept(model).items())
    other, _ = make(context, DELAYED)
    step(other, mesh)
    after, undisturbed = step(model, mesh, key="next"), step(other, mesh, key="next")
    return same, all(torch.equal(after[name], undisturbed[name]) for name in after)


@pytest.mark.parametrize(("recipe", "abandoned"), [("delayed", False), ("current", False), ("delayed", True)])
def test_recomputation_changes_neither_gradients_nor_histories(recipe, abandoned):
    # One model a call: TE updates the histories of all modules of a process at once.
    plain, again = (run(trained, 1, {"recipe": recipe, "amax_history": 4}, recompute, abandoned)[0] for recompute in (False, True))
    assert list(plain) == list(again)
    assert [name for name, value in plain.items() if not torch.equal(value, again[name])] == []


def trained(context: RankContext, fp8: dict, recompute: bool, abandoned: bool) -> dict[str, Tensor]:
    model, mesh = make(context, fp8, recompute=recompute)
    step(model, mesh)
    if abandoned:  # a pass with gradients that gets no backward pass
        tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
        model(tokens, tokens)
        step(model, mesh, key="another")
    return step(model, mesh, key="next") | kept(model)


def test_what_stays_in_high_precision():
    (found,) = run(outside, 1)
    assert found == {
        "q": False,
        "k": False,
        "gate": False,
        "kept gate": True,
        "logits": True,
        "kept layer": True,
        "last layer": False,
    }


def outside(_context: RankContext) -> dict[str, bool]:
    """Which products are PyTorch's bit for bit."""
    mesh = ParallelMesh.single()
    backend, keeps = te_backend(mesh, recipe="current"), te_backend(mesh, recipe="current", keep=("gate", "first_layers"))
    parts = [Part("q", 32), Part("gate", 32, "gate"), Part("k", 16), Part("k_router", 16, "logits")]
    x = random("x", 2, 16, 64, dtype=torch.bfloat16)
    weights = [random(part.name, part.rows, 64, dtype=torch.bfloat16) for part in parts]
    exact = [nn.functional.linear(x, weight) for weight in weights]

    def same(one: Backend) -> list[bool]:
        with one.running():
            made, _ = one.column_linears(64, parts, tp=mesh.tp)(x, weights)
        return [torch.equal(a, b) for a, b in zip(made, exact, strict=True)]

    q, gate, k, logits = same(backend)
    _, kept_gate, _, _ = same(keeps)
    with keeps.running():
        layers = [keeps.of_layer(i, 2).row_linear(64, 32, tp=mesh.tp)(x, weights[0]) for i in range(2)]
    first, last = (torch.equal(layer, exact[0]) for layer in layers)
    return {"q": q, "k": k, "gate": gate, "kept gate": kept_gate, "logits": logits, "kept layer": first, "last layer": last}


def test_norms_are_fused_where_tp_is_1_alone():
    assert run(fused, 2) == [(False, True)] * 2


def fused(_context: RankContext) -> tuple[bool, bool]:
    mesh, single = ParallelMesh.build(tp=2, ep=1), ParallelMesh.single()
    return tuple(
        te_backend(one).column_linears(64, [Part("q", 32)], tp=one.tp, eps=1e-6).linear.module.__class__.__name__ == "LayerNormLinear"
        for one in (mesh, single)
    )


@pytest.mark.parametrize("documents", [False, True], ids=["whole rows", "documents"])
def test_heads_that_flash_attention_does_not_take_are_pytorchs(documents):
    (found,) = run(attended, 1, documents)
    assert found == {"16 in bf16": False, "12 in bf16": True, "264 in bf16": True, "16 in fp32": True}


def attended(_context: RankContext, documents: bool) -> dict[str, bool]:
    """Whose attention is PyTorch's bit for bit."""
    backend, found = te_backend(ParallelMesh.single()), {}
    tokens = torch.full((BATCH, LENGTH), 3)
    tokens[:, ::5] = EOD
    borders = Documents.of(tokens, eod_id=EOD) if documents else None
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for width, name in ((16, "bf16"), (12, "bf16"), (264, "bf16"), (16, "fp32")):
        dtype = dtypes[name]
        q, k, v = (random(f"{part}/{width}", BATCH, LENGTH, heads, width, dtype=dtype) for part, heads in (("q", 4), ("k", 2), ("v", 2)))
        out = backend.attention_core(4, 2, width)(q, k, v, borders)
        found[f"{width} in {name}"] = torch.equal(out, attend(q, k, v, borders))
    return found


# ---- routing


def test_rows_are_permuted_as_by_a_stable_sort():
    (found,) = run(permuted, 1)
    for name, (ours, native) in found.items():
        assert_close(ours, native, to=1e-6, what=name)


def permuted(_context: RankContext) -> dict[str, tuple[Tensor, Tensor]]:
    backends = te_backend(ParallelMesh.single()), NativeBackend(CPU)
    ids = random("ids", 24, 6).topk(2, dim=-1).indices
    results = []
    for backend in backends:
        x, probs = random("x", 24, 16).requires_grad_(), random("probs", 24, 2).requires_grad_()
        rows = backend.permute(x, probs, ids, num_experts=6)
        back = backend.unpermute(rows.x * rows.probs, rows.restore)
        grads = torch.autograd.grad(back, (x, probs), random("grad", 24, 16))
        results.append({"rows": rows.x, "probs": rows.probs, "back": back, "grad_x": grads[0], "grad_probs": grads[1]})
    return {name: (results[0][name].detach(), results[1][name].detach()) for name in results[0]}


def test_no_parameter_notices_that_rows_of_probability_0_are_zeros():
    (found,) = run(underflown, 1)
    ours, native = found
    assert (ours.pop("rows") == 0).all() and (native.pop("rows") != 0).all()
    assert_all_close(ours, native, to=1e-6)


def underflown(_context: RankContext) -> list[dict[str, Tensor]]:
    """A router's logits so far apart that one of two probabilities is 0, and what goes backward through rows and a weight."""
    results = []
    for backend in (te_backend(ParallelMesh.single()), NativeBackend(CPU)):
        logits, x, weight = random("logits", 1, 6, 4), random("x", 6, 16).requires_grad_(), random("weight", 16, 16).requires_grad_()
        logits[0, 0] = torch.tensor([120.0, 1.0, 0.0, -1.0])
        # Natively for both: of experts with probability 0 any may be chosen.
        chosen = NativeBackend(CPU).choose(logits.requires_grad_(), MoEConfig(num_experts=4, top_k=2), bias=None)
        rows = backend.permute(x, chosen.probs[0], chosen.ids[0], num_experts=4)
        of_row = torch.arange(1.0, 13.0).unsqueeze(1)  # else experts would be alike, and a token's sum the same whatever its probabilities
        back = backend.unpermute((rows.x @ weight) * of_row * rows.probs, rows.restore)
        grads = torch.autograd.grad(back, (x, weight, logits), random("grad", 6, 16))
        unlikely = rows.x[(rows.probs == 0).squeeze(1)]
        assert len(unlikely) == 1
        results.append({"rows": unlikely.detach(), "back": back.detach()} | dict(zip(("x", "weight", "logits"), grads, strict=True)))
    return results


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_are_chosen_as_natively(score, top_k, renormalize, biased):
    (found,) = run(chosen, 1, MoEConfig(num_experts=8, top_k=top_k, score=score, renormalize=renormalize), biased)
    for name, (ours, native) in found.items():
        assert_close(ours, native, to=1e-5, what=name)


def chosen(_context: RankContext, config: MoEConfig, biased: bool) -> dict[str, tuple[Tensor, Tensor]]:
    bias = random("bias", 8) if biased else None
    results = []
    for backend in (te_backend(ParallelMesh.single()), NativeBackend(CPU)):
        logits = random("logits", 2, 12, 8).requires_grad_()
        ids, probs, shares = backend.choose(logits, config, bias=bias)
        of_all = torch.zeros_like(logits).scatter(-1, ids, probs)  # the order of the k does not matter
        (grad,) = torch.autograd.grad((of_all * random("a", 2, 12, 8)).sum() + (shares * random("b", 2, 12, 8)).sum(), logits)
        results.append({"probs": of_all.detach(), "shares": shares.detach(), "grad": grad})
    return {name: (results[0][name], results[1][name]) for name in results[0]}
