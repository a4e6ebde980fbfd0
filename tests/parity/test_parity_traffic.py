"""Communication is minimal: the bytes that one step sends, by axis and collective, equal a formula, and nothing else is sent.

Counted twice: by the recorder in `parallel/comm.py`, and below everything by a mode that sees every collective of the process. The formula
for our layers is the docstring of `verify.minimum.step_terms`; DeepSpeed's part is `deepspeed_terms` here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import ranks
import torch
import torch.distributed as dist
from parity.variants import MOE, VARIANTS

from megagate.backend.build import build_backend
from megagate.config.model import BalanceScope, ModelConfig, MoEConfig
from megagate.config.run import Fp8Config, Fp8Recipe, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megagate.model.lm import LanguageModel
from megagate.nn import loss
from megagate.nn.base import named_labels
from megagate.parallel import comm
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext, RankError
from megagate.parallel.traffic import Kind, Largest, Sent, Traffic, bytes_sent
from megagate.verify.minimum import StepShape, Term, step_terms, total_by_axis, zero_terms
from megagate.verify.wire import AXES, RoutedRows, WireCounter, axis_names

BATCH, SEQUENCE, MICRO_STEPS = 8, 16, 2
PLAIN_MOE = replace(MOE, moe=replace(MOE.moe, shared_ffn_size=0))
DENSE = replace(MOE, moe=MoEConfig(), ffn_size=48, attention=replace(MOE.attention, qk_norm=False))
TIED = replace(DENSE, tie_embeddings=True)


@dataclass(frozen=True)
class Case:
    """One step of a model under a layout."""

    world: int
    tp: int
    ep: int
    model: ModelConfig = MOE
    scope: BalanceScope = "global_batch"
    recompute: bool = False
    dtype: str = "fp32"
    stage: int = 1
    chunk: int = loss.CHUNK_TOKENS
    fp8: Fp8Recipe = "none"

    def __str__(self) -> str:
        kind = "dense" if not self.model.is_moe else "shared" if self.model.moe.shared_ffn_size else "moe"
        extra = " recompute" * self.recompute + f" chunks of {self.chunk}" * (self.chunk != loss.CHUNK_TOKENS)
        extra += f" fp8 {self.fp8}" * (self.fp8 != "none")
        return f"{self.world} ranks tp{self.tp} ep{self.ep} zero{self.stage} {kind} {self.scope} {self.dtype}{extra}"

    @property
    def config(self) -> RunConfig:
        model = replace(self.model, moe=replace(self.model.moe, balance_scope=self.scope))
        micro = BATCH // MICRO_STEPS // (self.world // self.tp)
        return RunConfig(
            model=model,
            train=TrainConfig(global_batch_size=BATCH, micro_batch_size=micro, seq_len=SEQUENCE, recompute=self.recompute),
            optim=OptimConfig(name="sgd", lr=0.1),
            parallel=ParallelConfig(tp=self.tp, ep=self.ep, zero_stage=self.stage),
            precision=PrecisionConfig(dtype=self.dtype, fp8=Fp8Config(self.fp8, emulate=self.fp8 != "none")),
        )

    def step(self, *, rows_out: int, rows_in: int) -> StepShape:
        return StepShape(
            world=self.world,
            tp=self.tp,
            ep=self.ep,
            batch=self.config.train.micro_batch_size,
            seq_len=SEQUENCE,
            micro_steps=MICRO_STEPS,
            dtype_bytes=2 if self.dtype == "bf16" else 4,
            recompute=self.recompute,
            rows_out=rows_out,
            rows_in=rows_in,
            norm_over_tp=self.stage == 0,
            chunk_tokens=self.chunk,
            dense_amaxes=self.delayed(2 * self.model.num_layers * (1 + bool(not self.model.is_moe or self.model.moe.shared_ffn_size))),
            expert_amaxes=self.delayed(2 * self.model.num_moe_layers * self.model.moe.num_experts // self.ep),
        )

    def delayed(self, products: int) -> tuple[int, ...]:
        """Each has an input, a weight and a gradient."""
        return (3 * products * (self.fp8 == "delayed"),)


class Group(NamedTuple):
    """One group of the optimizer: elements that this rank holds, and the axis over which they are replicated."""

    axis: str
    elements: int


class Seen(NamedTuple):
    """One rank's step.

    Args:
        sent: By our recorder.
        largest: By our recorder.
        wire: By the counter below everything; (joined axes, kind, module that sent).
        names: Joined axes by axis.
        rows: Routed rows to other ranks and from other ranks.
        groups: Of the optimizer.
    """

    sent: dict[tuple[str, Kind, str], Sent]
    largest: dict[Kind, Largest]
    wire: dict[tuple[str, Kind, str], Sent]
    names: dict[str, str]
    rows: tuple[int, int]
    groups: list[Group]


def run_step(context: RankContext, case: Case) -> Seen:
    """Two steps under DeepSpeed, of which the second is counted."""
    from megagate.engine.zero import ZeroEngine

    traffic = Traffic()
    mesh, config = ParallelMesh.build(tp=case.tp, ep=case.ep, traffic=traffic), case.config
    cpu, dtype = torch.device("cpu"), torch.bfloat16 if case.dtype == "bf16" else torch.float32
    backend = build_backend(config.precision, device=cpu, mesh=mesh)
    model = LanguageModel(config.model, dtype=dtype, backend=backend, mesh=mesh, recompute=case.recompute)
    engine = ZeroEngine(model.initialize(seed=1, device=cpu), config, mesh)
    generator = torch.Generator().manual_seed(mesh.dp.rank)
    tokens = torch.randint(0, config.model.vocab_size, (MICRO_STEPS, config.train.micro_batch_size, SEQUENCE + 1), generator=generator)
    wire = WireCounter(mesh)
    with patch.object(loss, "CHUNK_TOKENS", case.chunk):
        engine.train_step(tokens[..., :-1], tokens[..., 1:], lr=0.1)
        traffic.clear()
        routed = RoutedRows(engine.model, mesh.ep)
        with wire:
            engine.train_step(tokens[..., :-1], tokens[..., 1:], lr=0.1)
    routed.close()
    sent, largest = dict(traffic.sent), dict(traffic.largest)
    return Seen(sent, largest, wire.traffic.sent, axis_names(mesh), routed.exchange(), optimizer_groups(model, mesh))


def optimizer_groups(model: LanguageModel, mesh: ParallelMesh) -> list[Group]:
    """Matrices and vectors; experts apart where they differ between ranks."""
    apart, sizes = mesh.tp.size * mesh.ep.size > 1, {}
    for (_, parameter), label in zip(model.named_parameters(), named_labels(model).values(), strict=True):
        key = ("edp" if label.shard.axis == "ep" and apart else "dp", parameter.ndim > 1)
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    return [Group(axis, elements) for (axis, _), elements in sizes.items()]


def deepspeed_terms(case: Case, groups: list[Group]) -> list[Term]:
    """What DeepSpeed 0.19.8 sends in a step at ZeRO 1 and 2 in fp32, all gradients in one bucket.

    gradients: R AR(4 x) over dp, of experts over edp; R = 1 at stage 1, M at stage 2. ZeRO needs a reduce-scatter, half of it.
    weights: AG(4 x / n) over dp or edp for each group, x padded to a multiple of 2 n.
    norm: for each group one fp32 scalar, AR(4) over dp, then AR(4) over tp; of each group of experts AR(4) over edp once more.
    """
    step = case.step(rows_out=0, rows_in=0)
    reductions, terms = (MICRO_STEPS if case.stage == 2 else 1), []
    for axis, elements in groups:
        n = step.size(axis)
        padded = -(-elements // (2 * n)) * 2 * n
        terms += [Term("gradients", axis, "all_reduce", 1, bytes_sent("all_reduce", 4 * elements, n))] * reductions
        terms.append(Term("weights", axis, "all_gather", 1, bytes_sent("all_gather", 4 * padded // n, n)))
        for over in ["dp", "tp"] + ["edp"] * (axis == "edp"):
            terms.append(Term("norm", over, "all_reduce", 1, bytes_sent("all_reduce", 4, step.size(over))))
    return terms


def by_sender(seen: Seen, sender: str) -> dict[tuple[str, Kind], Sent]:
    """What one package sent, by joined axes."""
    traffic = Traffic()
    traffic.sent = {key: sent for key, sent in seen.wire.items() if key[2].partition(".")[0] == sender}
    return traffic.by_axis()


def by_axis(seen: Seen) -> dict[tuple[str, Kind], Sent]:
    """What our recorder saw, by axis."""
    traffic = Traffic()
    traffic.sent = seen.sent
    return traffic.by_axis()


def bytes_of(sums: dict[tuple[str, Kind], Sent]) -> dict[tuple[str, Kind], int]:
    """Bytes alone; DeepSpeed also calls collectives of one rank, which send none."""
    return {key: sent.bytes for key, sent in sums.items() if sent.bytes}


def rename(sums: dict[tuple[str, Kind], Sent], names: dict[str, str]) -> dict[tuple[str, Kind], Sent]:
    """Axes that are the same group of ranks, joined."""
    joined: dict[tuple[str, Kind], Sent] = {}
    for (axis, kind), sent in sums.items():
        joined[names[axis], kind] = joined.get((names[axis], kind), Sent()).plus(sent)
    return joined


def logits_elements(case: Case) -> int:
    """Of one chunk on one rank."""
    tokens = min(case.chunk, case.config.train.micro_batch_size * SEQUENCE)
    return tokens * case.model.padded_vocab_size // case.tp


CASES = [
    Case(4, 2, 4),
    Case(4, 2, 4, recompute=True, scope="sequence"),
    Case(4, 2, 4, PLAIN_MOE, recompute=True),
    Case(4, 2, 4, dtype="bf16", recompute=True),
    Case(4, 4, 2, scope="sequence"),
    Case(4, 4, 2, recompute=True, chunk=40),
    Case(4, 1, 4),
    Case(4, 1, 4, PLAIN_MOE, scope="sequence", recompute=True),
    Case(4, 2, 2, scope="micro_batch"),
    Case(2, 2, 1, DENSE),
    Case(2, 2, 1, TIED, recompute=True, dtype="bf16", stage=2),
    Case(4, 4, 1, DENSE, recompute=True),
    Case(4, 2, 1, DENSE, stage=0),
    Case(4, 1, 2, recompute=True, stage=3),
    Case(4, 2, 2, dtype="bf16", fp8="delayed", recompute=True),
    Case(2, 2, 1, DENSE, fp8="delayed"),
    Case(4, 2, 4, fp8="blockwise"),
    Case(2, 1, 1),
    Case(4, 1, 1, DENSE),
    Case(1, 1, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_sends_what_the_formula_says_and_nothing_else(case):
    check_case(case)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_sends_what_the_formula_says(variant, tp):
    """Four tensor-parallel ranks are more than key/value heads."""
    check_case(Case(tp, tp, tp if VARIANTS[variant].is_moe else 1, VARIANTS[variant], recompute=tp == 4))


def check_case(case: Case) -> None:
    sizes = {"tp": case.tp, "dp": case.world // case.tp, "ep": case.ep, "edp": case.world // case.ep, "world": case.world}
    for seen in ranks.run_ranks(run_step, case.world, case):
        rows_out, rows_in = seen.rows
        assert by_axis(seen) == total_by_axis(step_terms(case.config.model, case.step(rows_out=rows_out, rows_in=rows_in)))
        assert all(sizes[axis] > 1 for axis, _, _ in seen.sent), "an axis of size 1 sends nothing"
        assert by_sender(seen, "megagate") == rename(by_axis(seen), seen.names), "all that our layers send goes through parallel/comm.py"
        assert {sender for _, _, sender in seen.wire if not sender.startswith("deepspeed.")} <= {"megagate.parallel.comm"}
        assert all(torch.Size(tensor.shape).numel() < logits_elements(case) for tensor in seen.largest.values())
        assert bool(seen.sent) == any(sent.bytes for sent in seen.wire.values()) == (case.world > 1)


def test_routing_sends_something():
    """The rows of the formula come from the routers: they are many, and not the same on all ranks."""
    rows = [seen.rows for seen in ranks.run_ranks(run_step, 4, Case(4, 1, 4))]
    assert sum(out for out, _ in rows) == sum(into for _, into in rows)
    assert len(set(rows)) > 1 and min(min(pair) for pair in rows) > 100


def test_a_step_by_hand():
    """One layout with the numbers worked out by hand: 4 ranks, tp2 ep4, fp32, every token to all 8 experts.

    Sizes: M = 2 micro-steps, L = 2 layers, b = 8 / 2 / 2 = 2, s = 16, h = 32, V = 256, E = 8. A shard of activations has 2 * 8 * 32 * 4 =
    2,048 bytes, all of them 4,096.
    tp: all-gathers per micro-step 1 embedding + 2 * 2 attention + 2 * 2 shared expert + 1 head = 10, each 2,048 bytes;
        reduce-scatters as many, each 4,096 / 2 = 2,048: 2 * 10 * 2,048 = 40,960 each, in 20 calls.
        all-reduces over 2 ranks send what they are given: head maximum 32 * 4 = 128, head sums 33 * 4 = 132; enter(w) per layer
        (2 * 32 norms + 2 * 8 q and k norms + 8 * 32 router) * 4 = 1,344, in 5 calls, and 32 * 4 = 128 for the final norm:
        128 + 132 + 2 * 1,344 + 128 = 3,076 per micro-step in 13 calls, 6,152 in 26 per step.
    ep: a rank has 2 * 8 = 16 tokens, so 16 * 8 = 128 rows, three quarters of them, 96, for other ranks, and gets as many. Per layer and
        micro-step: split sizes 3 * 2 * 8 = 48 in 1 call; rows 96 * 32 * 4 = 12,288 four times (there and back, forward and backward) in 4
        calls; weights 96 * 4 = 384 twice in 2 calls. 48 + 49,152 + 768 = 49,968; four times 199,872 in 28 calls.
    world: counts 2 * 8 * 4 = 64 bytes, over 4 ranks 2 * 64 * 3 / 4 = 96, twice; logged (16 + 1) * 4 = 68, 102. 294 in 3 calls.
    dp: targets 8 bytes over 2 ranks 8, loss 4: 12 in 2 calls.
    """
    expected = {
        ("tp", "all_gather"): Sent(20, 40_960),
        ("tp", "reduce_scatter"): Sent(20, 40_960),
        ("tp", "all_reduce"): Sent(26, 6_152),
        ("ep", "all_to_all"): Sent(28, 199_872),
        ("world", "all_reduce"): Sent(3, 294),
        ("dp", "all_reduce"): Sent(2, 12),
    }
    case = Case(4, 2, 4, replace(MOE, moe=replace(MOE.moe, top_k=8)))
    for seen in ranks.run_ranks(run_step, 4, case):
        assert by_axis(seen) == expected
        assert seen.rows == (384, 384)


UNDER_ZERO = [Case(2, 1, 1, DENSE), Case(2, 1, 1), Case(4, 2, 2), Case(4, 1, 2), Case(4, 2, 4)]


@pytest.mark.parametrize("case", [*UNDER_ZERO, Case(2, 1, 1, DENSE, stage=2), Case(4, 1, 2, stage=2)], ids=str)
def test_what_deepspeed_sends_is_known(case):
    for seen in ranks.run_ranks(run_step, case.world, case):
        actual = bytes_of(by_sender(seen, "deepspeed"))
        assert actual == bytes_of(total_by_axis(deepspeed_terms(case, seen.groups), seen.names))
        least = least_of_zero(case, seen.groups)
        axes = {seen.names[axis] for axis in ("dp", "edp") if least["gradients", axis]}
        scalars = 8 * 4 * len(seen.groups)  # of norms, at the most
        for axis in axes:
            merged = [name for name in ("dp", "edp") if seen.names[name] == axis]
            weights, gradients = (sum(least[what, name] for name in merged) for what in ("weights", "gradients"))
            assert actual[axis, "all_gather"] == weights, "the minimum: these sizes need no padding"
            assert 2 * gradients < actual[axis, "all_reduce"] <= 2 * gradients + scalars


def least_of_zero(case: Case, groups: Iterable[Group]) -> dict[tuple[str, str], int]:
    """The terms of `zero_terms` by (what, axis)."""
    dense, experts = (sum(elements for axis, elements in groups if axis == wanted) for wanted in ("dp", "edp"))
    reductions = MICRO_STEPS if case.stage == 2 else 1
    terms = zero_terms(case.step(rows_out=0, rows_in=0), dense=dense, experts=experts, grad_bytes=4, reductions=reductions)
    return {(term.what, term.axis): term.bytes for term in terms}


# ---- the counters themselves


def call_everything(context: RankContext) -> tuple[dict, dict, dict, dict]:
    """Every function of comm once, forward and backward, on an axis of 2 ranks; then the same of c10d's other operators."""
    traffic = Traffic()
    mesh = ParallelMesh.build(tp=2, ep=1, traffic=traffic)
    tp, x = mesh.tp, torch.ones(4, 6, dtype=torch.bfloat16, requires_grad=True)
    wire = WireCounter(mesh)
    with wire:
        for dim in (None, 0):
            comm.enter(x, tp, dim).sum().backward()
            comm.leave(x, tp, dim).sum().backward()
        comm.total(x, tp), comm.maximum(x, tp), comm.gather(x, tp, 1), comm.broadcast(x, tp)
        send = [1, 3] if context.rank == 0 else [2, 2]
        comm.all_to_all(x, tp, send=send, receive=[send[0], 2] if context.rank == 0 else [3, 2]).sum().backward()
        comm.gather_objects("text", ParallelMesh.single().tp), comm.barrier(tp)
        comm.total(x, mesh.dp), comm.enter(x, mesh.ep, 0)
    direct, parts = WireCounter(mesh), [torch.zeros(3), torch.zeros(3)]
    with direct:
        y = torch.ones(3)
        dist.all_gather(parts, y), dist.all_to_all_single(torch.ones(6), torch.ones(6)), dist.reduce(y, 1)
    return traffic.sent, traffic.by_axis(), wire.traffic.by_axis(), direct.traffic.by_axis()


def test_every_function_reports_what_it_sends():
    """x has 4 * 6 * 2 = 48 bytes, a row 12. Over 2 ranks an all_reduce and an all_gather of it send 48, a reduce_scatter 24."""
    for rank, (sent, by_axis, wire, direct) in enumerate(ranks.run_ranks(call_everything, 2)):
        out, into = (3, 2) if rank == 0 else (2, 3)
        assert {(kind, what): (calls, nbytes) for (axis, kind, what), (calls, nbytes) in sent.items() if axis == "tp"} == {
            ("all_reduce", "enter backward"): (1, 48),
            ("all_gather", "enter"): (1, 48),
            ("reduce_scatter", "enter backward"): (1, 48),
            ("all_reduce", "leave"): (1, 48),
            ("reduce_scatter", "leave"): (1, 24),
            ("all_gather", "leave backward"): (1, 24),
            ("all_reduce", "total"): (1, 48),
            ("all_reduce", "maximum"): (1, 48),
            ("all_gather", "gather"): (1, 48),
            ("broadcast", "broadcast"): (1, 48 if rank == 0 else 0),
            ("all_to_all", "all_to_all"): (2, 12 * (out + into)),
        }
        assert {axis for axis, _, _ in sent} == {"tp"}
        assert wire == {("tp=edp=world", kind): value for (_, kind), value in by_axis.items()}
        assert direct == {
            ("tp=edp=world", "all_gather"): Sent(1, 12),
            ("tp=edp=world", "all_to_all"): Sent(1, 12),
            ("tp=edp=world", "reduce"): Sent(1, 12 if rank == 0 else 0),
        }


def call_unknown(context: RankContext) -> None:
    with WireCounter(ParallelMesh.build(tp=2, ep=1)):
        dist.scatter(torch.ones(1), [torch.ones(1)] * 2 if context.rank == 0 else None)


def test_the_wire_counter_refuses_a_collective_that_it_cannot_count():
    with pytest.raises(RankError, match="does not know the collective scatter_"):
        ranks.run_ranks(call_unknown, 2)


@pytest.mark.parametrize(("kind", "expected"), [("all_gather", 300), ("reduce_scatter", 75), ("all_reduce", 150), ("all_to_all", 100)])
def test_bytes_of_a_collective_over_4_ranks(kind, expected):
    assert bytes_sent(kind, 100, 4) == expected
    assert bytes_sent("all_reduce", 5, 4) == 8, "7.5 in whole bytes"
    assert bytes_sent("all_reduce", 100, 1) == bytes_sent("all_gather", 100, 1) == bytes_sent("reduce_scatter", 100, 1) == 0


def test_a_recorder_is_no_part_of_what_an_axis_is():
    with_one, without = ParallelMesh.single(traffic=Traffic()), ParallelMesh.single()
    assert with_one == without and repr(with_one) == repr(without)
    assert all(getattr(with_one, axis).traffic is with_one.tp.traffic is not None for axis in AXES)
