"""Probes under every kind of layout: the figures of the dense reference, alike on all ranks, by three messages."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import ranks
import torch
from parity.matrix import Case
from parity.sharded import BACKEND, clear_routes, fill
from parity.variants import VARIANTS
from probe.dense import Dense, DenseModel, assert_figures
from torch import Tensor

from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.parallel.traffic import Traffic
from megagate.probe.figures import LayerFigures
from megagate.probe.probe import Probe
from megagate.probe.taps import Seen, taps

EOD, LENGTH, BATCH = 3, 12, 4
EACH = {0: range(LENGTH), 5: (1, 3, 6, 8, 11)}
"""How many queries are looked at, and which."""
LAYOUTS = {"tp2": (2, 2, 1), "tp4": (4, 4, 1), "ep2": (2, 1, 2), "dp2 tp2 ep4": (4, 2, 4), "dp4 ep2": (4, 1, 2)}
"""World, tp and ep. Four tensor-parallel ranks are more than the model's two key/value heads."""
Figures = dict[int, LayerFigures]


def some_tokens() -> Tensor:
    tokens = torch.randint(EOD + 1, 250, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[0, [3, 7]] = EOD
    tokens[1, [0, 5, 6, LENGTH - 1]] = EOD
    return tokens


def of_rank(mesh: ParallelMesh) -> Iterator[Tensor]:
    """Its share of the sequences, in two batches where it can be cut."""
    mine = some_tokens().chunk(mesh.dp.size)[mesh.dp.rank]
    yield from mine.split(max(1, len(mine) // 2))


def build(variant: str, mesh: ParallelMesh, *, recompute: bool = False) -> LanguageModel:
    return fill(LanguageModel(VARIANTS[variant], dtype=torch.float32, backend=BACKEND, mesh=mesh, recompute=recompute, eod_id=EOD))


def look_at(model: LanguageModel, run: Callable[[Tensor], object]) -> list[Figures]:
    """By one probe for each number of queries."""
    probes = [Probe(model.config, model.mesh, queries=queries) for queries in EACH]

    def look(layer: int, seen: Seen) -> None:
        for probe in probes:
            probe.look(layer, seen)

    with torch.no_grad(), taps(dict(enumerate(model.layers)), look):
        for tokens in of_rank(model.mesh):
            run(tokens)
    return [probe.close() for probe in probes]


@lru_cache
def reference(variant: str) -> list[Dense]:
    model = build(variant, ParallelMesh.single())
    with clear_routes(model), torch.no_grad():
        model(some_tokens(), None)
        return DenseModel(model.config, dict(model.named_parameters()) | dict(model.named_buffers()), EOD).blocks(some_tokens())


def assert_same(found: list[Figures], variant: str, *, what: str) -> None:
    expected = reference(variant)
    for (queries, places), figures in zip(EACH.items(), found, strict=True):
        assert list(figures) == list(range(len(expected)))
        for layer, dense in enumerate(expected):
            assert_figures(figures[layer], dense, queries=places, what=f"{variant}, {what}, block {layer}, {queries} queries")


def every_variant(context: RankContext, tp: int, ep: int) -> dict[str, list[Figures]]:
    mesh = ParallelMesh.build(tp=tp, ep=ep)
    models = {variant: build(variant, mesh) for variant in VARIANTS}
    return {variant: look_at(model, lambda tokens, model=model: model(tokens, None)) for variant, model in models.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_variant_has_the_figures_of_the_definitions_under_every_layout(layout):
    world, *sizes = LAYOUTS[layout]
    first, *others = ranks.run_ranks(every_variant, world, *sizes)
    assert all(other == first for other in others)
    assert set(first) == set(VARIANTS)
    for variant, found in first.items():
        assert_same(found, variant, what=layout)


def sent(context: RankContext, variant: str) -> tuple[int, int, int]:
    """Calls of collectives: in forward passes alone, in those that are looked at, in closing."""
    mesh = ParallelMesh.build(tp=2, ep=1, traffic=Traffic())
    model, calls = build(variant, mesh), []
    probe = Probe(model.config, mesh)
    for look in (lambda *_: None, probe.look):
        mesh.world.traffic.clear()
        with torch.no_grad(), taps(dict(enumerate(model.layers)), look):
            model(some_tokens(), None)
        calls.append(sum(sent.calls for sent in mesh.world.traffic.sent.values()))
    mesh.world.traffic.clear()
    probe.close()
    return *calls, sum(sent.calls for sent in mesh.world.traffic.sent.values())


@pytest.mark.parametrize("variant", ["gate position G1", "gate position G5", "sandwich norm, mixture"])
def test_looking_sends_nothing_and_closing_three_messages(variant):
    for alone, looked_at, closing in ranks.run_ranks(sent, 2, variant):
        assert looked_at == alone > 0
        assert closing == 3


def under_zero(context: RankContext, case: Case) -> list[Figures]:
    from megagate.engine.zero import ZeroEngine

    mesh = ParallelMesh.build(tp=case.tp, ep=case.ep)
    model = build(case.model, mesh, recompute=case.recompute)
    engine = ZeroEngine(model, case.config, mesh)
    return look_at(model, lambda tokens: engine.evaluate([(tokens, tokens)]))


@pytest.mark.parametrize("variant", ["gate score parameter", "gate G5 parameter", "gate G2 head-shared", "router sigmoid with bias"])
@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_zero_gives_away_are_looked_at_in_time(variant, stage):
    """With parameters that a gate or a router reads outside its forward pass, in blocks that training recomputes."""
    case = Case(4, tp=2, ep=4 if VARIANTS[variant].is_moe else 1, stage=stage, model=variant, recompute=True, seq_len=LENGTH)
    for found in ranks.run_ranks(under_zero, 4, case):
        assert_same(found, variant, what=str(case))


def with_a_number(context: RankContext, number: float) -> Figures:
    """One number that the last block gives on is another on the last rank."""
    model = build("gate position G1", ParallelMesh.build(tp=2, ep=1))
    probe = Probe(model.config, model.mesh)

    def look(layer: int, seen: Seen) -> None:
        if layer == 1 and context.rank == context.world_size - 1:
            seen.hidden[-1, 2, 7] = number
        probe.look(layer, seen)

    with torch.no_grad(), taps(dict(enumerate(model.layers)), look):
        model(some_tokens(), None)
    return probe.close()


@pytest.mark.parametrize("number", [torch.nan, -torch.inf, 1e9])
def test_a_number_on_one_rank_is_told_on_all(number):
    for figures in ranks.run_ranks(with_a_number, 4, number):
        assert 0 < figures[0].hidden.max_abs < 100
        hidden = figures[1].hidden
        assert hidden.channel == 7
        if number != number:
            assert hidden.max_abs != hidden.max_abs and hidden.mean_max_abs != hidden.mean_max_abs
        else:
            assert hidden.max_abs == abs(number)
            assert hidden.mean_max_abs == pytest.approx(abs(number) / 8, rel=1e-6)  # of two data-parallel ranks' four sequences each
