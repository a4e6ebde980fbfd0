"""Delayed scaling over ranks: the amaxes, and so the scales, are those of one process that sees everything."""

from typing import NamedTuple

import pytest
import ranks
import torch
from torch import Tensor, nn

from megagate.backend.base import Part
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.native import NativeBackend
from megagate.config.run import Fp8Config
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.shard import Shard
from megagate.parallel.spawn import RankContext
from megagate.parallel.traffic import Traffic

BATCH, SEQUENCE, WIDTH, INNER, EXPERTS, ROWS, STEPS = 4, 8, 64, 96, 4, 128, 3
CPU = torch.device("cpu")
State = dict[str, Tensor]


def numbers(key: str, step: int, *shape: int) -> Tensor:
    """Normal, but for one number that decides the amax and lies elsewhere in each step."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, key)))
    x = torch.randn(shape, generator=generator)
    x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = 10.0 + step + 0.1 * sum(map(ord, key)) % 7
    return x


def a_model(mesh: ParallelMesh) -> nn.Module:
    backend = EmulatedBackend(NativeBackend(CPU), Fp8Config("delayed", emulate=True, amax_history=4), device=CPU, mesh=mesh)
    model = nn.Module()
    model.backend = backend
    model.columns = backend.column_linears(WIDTH, [Part("q", INNER // mesh.tp.size)], tp=mesh.tp)
    model.row = backend.row_linear(INNER // mesh.tp.size, WIDTH, tp=mesh.tp)
    model.experts = backend.grouped_linear(WIDTH, INNER, num_experts=EXPERTS, mesh=mesh)
    return model


class Seen(NamedTuple):
    """One rank's part of three micro-steps of three sites.

    Args:
        state: What is kept.
        shards: Which part of the logical tensor that is, as its label says.
        sent: Collectives that closed each micro-step.
        grad: Of the row-parallel product's input, in the last.
        places: This rank's on dp, tp and ep.
    """

    state: State
    shards: dict[str, Shard]
    sent: list[dict]
    grad: Tensor
    places: tuple[int, int, int]


def run_sites(context: RankContext | None, tp: int, ep: int) -> Seen:
    traffic = Traffic()
    mesh = ParallelMesh.single() if context is None else ParallelMesh.build(tp=tp, ep=ep, traffic=traffic)
    model, sent = a_model(mesh), []

    def gradient(x: Tensor, *axes_and_dims) -> Tensor:
        """As a backward pass carries it (engine/zero.py)."""
        return mesh.dp.size * cut(x, *axes_and_dims).detach()

    def cut(x: Tensor, *axes_and_dims) -> Tensor:
        for axis, dim in axes_and_dims:
            x = Shard.of(tuple(x.shape), axis, dim).take(x)
        return x.contiguous().requires_grad_()

    for step in range(STEPS):
        of_batch = (mesh.dp, 0)
        x = cut(numbers("x", step, BATCH, SEQUENCE, WIDTH), of_batch, (mesh.tp, 1))
        weight = cut(numbers("w", step, INNER, WIDTH), (mesh.tp, 0))
        (out,), _ = model.columns(x, [weight])
        out.backward(gradient(numbers("dy", step, BATCH, SEQUENCE, INNER), of_batch, (mesh.tp, 2)))
        x = cut(numbers("x2", step, BATCH, SEQUENCE, INNER), of_batch, (mesh.tp, 2))
        weight = cut(numbers("w2", step, WIDTH, INNER), (mesh.tp, 1))
        model.row(x, weight).backward(gradient(numbers("dy2", step, BATCH, SEQUENCE, WIDTH), of_batch, (mesh.tp, 1)))
        rows = cut(numbers("x3", step, EXPERTS, ROWS, WIDTH), (mesh.ep, 0), (mesh.edp, 1)).detach()
        weight = cut(numbers("w3", step, EXPERTS, INNER, WIDTH), (mesh.ep, 0))
        grad = gradient(numbers("dy3", step, EXPERTS, ROWS, INNER), (mesh.ep, 0), (mesh.edp, 1))
        if step == 2:  # an expert of this rank without rows, in the first of those that have it
            ends = [0 if i == 0 and mesh.edp.rank == 0 else rows.shape[1] for i in range(len(rows))]
        else:
            ends = [rows.shape[1]] * len(rows)
        kept = torch.cat([each[:end] for each, end in zip(rows, ends, strict=True)]).requires_grad_()
        grad = torch.cat([each[:end] for each, end in zip(grad, ends, strict=True)])
        model.experts(kept, weight, torch.tensor(ends).cumsum(0).to(torch.int32)).backward(grad)
        traffic.clear()
        model.backend.after_backward(model)
        sent.append({key: value.calls for key, value in traffic.sent.items()})
    kept = {f"{n}.{k.name}": k for n, m in model.named_modules() if m is not model for k in m.kept_state()}
    state, shards = ({name: getattr(k, what) for name, k in kept.items()} for what in ("tensor", "shard"))
    return Seen(state, shards, sent, x.grad / mesh.dp.size, (mesh.dp.rank, mesh.tp.rank, mesh.ep.rank))


@pytest.mark.parametrize(("world", "tp", "ep"), [(2, 1, 1), (2, 2, 2), (2, 1, 2), (4, 2, 2), (4, 1, 4), (4, 4, 2)])
def test_scales_are_of_all_ranks_numbers(world: int, tp: int, ep: int) -> None:
    alone = run_sites(None, 1, 1)
    assert all(state.any() for state in alone.state.values())
    for seen in ranks.run_ranks(run_sites, world, tp, ep):
        dp_rank, tp_rank, ep_rank = seen.places
        assert list(seen.state) == list(alone.state)
        for name, whole in alone.state.items():
            mine, got = whole.chunk(ep)[ep_rank] if name.startswith("experts") else whole, seen.state[name]
            assert seen.shards[name].full_shape == tuple(whole.shape) and torch.equal(seen.shards[name].take(whole), mine)
            if name.startswith(("experts.input", "experts.grad")):
                # The expert that lost its rows in the last step lost different ones: it is told by the others' numbers.
                mine, got = mine[1:], got[1:]
            assert torch.equal(got, mine), name
        wanted = alone.grad.chunk(world // tp)[dp_rank].chunk(tp, dim=2)[tp_rank]
        torch.testing.assert_close(seen.grad, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        expected = {("world", "all_reduce", "maximum"): 1} | ({("edp", "all_reduce", "maximum"): 1} if world > ep else {})
        assert seen.sent == [expected] * STEPS, "one collective for each axis in a micro-step"


def run_model(context: RankContext, tp: int, ep: int) -> tuple[State, int]:
    """Two steps of a small model under DeepSpeed."""
    from dataclasses import replace

    from parity import engines
    from parity.sharded import fill

    from megagate.engine.zero import ZeroEngine
    from megagate.model.lm import LanguageModel

    mesh = ParallelMesh.build(tp=tp, ep=ep)
    run, layout = engines.Run(dtype="bf16"), engines.Layout(context.world_size, tp=tp, ep=ep)
    config = engines.run_config(run, layout)
    config = replace(config, precision=replace(config.precision, fp8=Fp8Config("delayed", emulate=True, amax_history=4)))
    backend = EmulatedBackend(NativeBackend(CPU), config.precision.fp8, device=CPU, mesh=mesh)
    model = fill(LanguageModel(config.model, dtype=torch.bfloat16, backend=backend, mesh=mesh))
    engine = ZeroEngine(model, config, mesh)
    engines.train(engine, [0], lr=0.1)
    with engine.recorded_gradients() as gradients:
        engines.train(engine, [1], lr=0.1)
    for piece in gradients:
        assert piece.tensor.dtype == torch.float32
        if piece.tensor.numel() > 500:
            mantissas = piece.tensor[piece.tensor != 0].frexp().mantissa.unique().numel()
            assert mantissas > 64, f"{piece.name}: {mantissas} mantissas; FP8 has 8"
    masters = [piece.tensor for piece in engine.state_pieces() if piece.name.startswith("master/")]
    assert all(t.dtype == torch.float32 for t in masters) and any((t != t.bfloat16()).any() for t in masters)
    state = {f"{n}.{k.name}": k.tensor for n, m in model.named_modules() if hasattr(m, "kept_state") for k in m.kept_state()}
    return state, mesh.ep.rank


def test_a_model_in_fp8_keeps_fp32_masters_unrounded_gradients_and_the_same_scales_on_all_ranks() -> None:
    results = ranks.run_ranks(run_model, 4, 2, 2, timeout=120)
    first = {}
    for state, ep_rank in results:
        assert len(state) == 2 * (2 + 2) * 3 * 2, "two layers, products of attention and of experts, three operands, history and scale"
        for name, tensor in state.items():
            of_experts = ".experts." in name
            assert tensor.isfinite().all() and (of_experts or tensor.any()), name
            assert torch.equal(tensor, first.setdefault((name, ep_rank if of_experts else 0), tensor)), name
