"""The probe's figures are those of a dense reference that keeps every attention matrix, for every variant of gate and router."""

import itertools
import math

import pytest
import torch
from parity.sharded import BACKEND, clear_routes, fill
from parity.variants import VARIANTS
from probe.dense import DenseModel, assert_figures
from torch import Tensor

from megagate.backend.documents import Documents
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.probe import attention
from megagate.probe.attention import attention_rows, row_sums
from megagate.probe.figures import LayerFigures
from megagate.probe.probe import Probe
from megagate.probe.taps import Seen, taps

EOD, LENGTH = 3, 12
ALONE = ParallelMesh.single()


def model_of(config: ModelConfig, eod_id: int | None) -> LanguageModel:
    return fill(LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=ALONE, eod_id=eod_id))


def some_tokens(key: int = 0) -> Tensor:
    """Three rows: ends in the middle, two ends in a row, an end at the end; and none."""
    tokens = torch.randint(EOD + 1, 250, (3, LENGTH), generator=torch.Generator().manual_seed(key))
    tokens[0, [3, 7]] = EOD
    tokens[1, [0, 5, 6, LENGTH - 1]] = EOD
    return tokens


def look_at(model: LanguageModel, *batches: Tensor, queries: int = 0) -> dict[int, LayerFigures]:
    probe = Probe(model.config, ALONE, queries=queries)
    with torch.no_grad(), taps(dict(enumerate(model.layers)), probe.look), clear_routes(model):
        for tokens in batches:
            model(tokens, None)
    return probe.close()


def reference(model: LanguageModel, eod_id: int | None) -> DenseModel:
    return DenseModel(model.config, dict(model.named_parameters()) | dict(model.named_buffers()), eod_id)


@pytest.mark.parametrize("eod_id", [None, EOD], ids=["rows", "documents"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_figures_of_the_definitions(variant, eod_id):
    model = model_of(VARIANTS[variant], eod_id)
    with torch.no_grad():
        dense = reference(model, eod_id).blocks(some_tokens())
    for queries, rows in ((0, range(LENGTH)), (1, [11]), (5, [1, 3, 6, 8, 11]), (LENGTH, range(LENGTH)), (40, range(LENGTH))):
        figures = look_at(model, some_tokens(), queries=queries)
        assert list(figures) == [0, 1]
        for layer, expected in enumerate(dense):
            assert_figures(figures[layer], expected, queries=rows, what=f"block {layer}, {queries} queries")


def test_what_several_passes_show_is_joined():
    """Batches of other sizes and lengths: rows, tokens and sequences each count once."""
    model = model_of(VARIANTS["sandwich norm, mixture"], EOD)
    short, batches = some_tokens(1)[:, :8], (some_tokens(), some_tokens(2)[:1])
    with torch.no_grad():
        dense, of_short = (reference(model, EOD).blocks(tokens) for tokens in (torch.cat(batches), short))
    for layer, figures in look_at(model, *batches).items():
        assert_figures(figures, dense[layer], queries=range(LENGTH), what=f"block {layer}")
    whole, alone, both = look_at(model, *batches), look_at(model, short), look_at(model, *batches, short)
    for layer in both:
        assert_figures(alone[layer], of_short[layer], queries=range(8))
        rows, hidden = (4 * 4 * LENGTH, 4 * 3 * 8), (4, 3)  # 4 heads; 4 and 3 sequences
        for counts, figure in (
            (rows, lambda one: one.attention.first_token_with_0),
            (hidden, lambda one: one.hidden.mean_max_abs),
            ((4 * LENGTH, 3 * 8), lambda one: one.gate.mean),
            ((4 * LENGTH, 3 * 8), lambda one: one.router.entropy),
            ((4 * LENGTH, 3 * 8), lambda one: one.output.mean_abs[1]),
        ):
            joined = (counts[0] * figure(whole[layer]) + counts[1] * figure(alone[layer])) / sum(counts)
            assert figure(both[layer]) == pytest.approx(joined, rel=1e-12)
        assert both[layer].hidden.max_abs == max(whole[layer].hidden.max_abs, alone[layer].hidden.max_abs)
        assert both[layer].attention.rows == sum(rows)


def test_some_blocks_alone():
    model = model_of(VARIANTS["gate position G1"], None)
    probe = Probe(model.config, ALONE, layers=[1])
    with torch.no_grad(), taps({1: model.layers[1]}, probe.look):
        model(some_tokens(), None)
    assert probe.close() == {1: look_at(model, some_tokens())[1]}
    with torch.no_grad(), taps(dict(enumerate(model.layers)), probe.look), pytest.raises(ValueError, match=r"block 0 is none of \[1\]"):
        model(some_tokens(), None)
    with pytest.raises(ValueError, match=r"no forward pass of blocks \[0\] was seen"):
        Probe(model.config, ALONE, layers=[0]).close()


def test_a_pass_is_the_same_with_and_without_a_look_and_taps_leave_nothing_behind():
    model = model_of(VARIANTS["sandwich norm, mixture"], EOD)
    alone = model(some_tokens(), some_tokens())
    probe = Probe(model.config, ALONE)
    with taps(dict(enumerate(model.layers)), probe.look):
        looked_at = model(some_tokens(), some_tokens())  # with gradients, of which a probe keeps none
    assert torch.equal(alone.ce_sum, looked_at.ce_sum)
    assert not any(value.requires_grad for value in probe._sums.values())
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert hooks == []


def test_half_precision_is_measured_as_it_is():
    """bf16 numbers are exact in fp32: figures are those of the numbers themselves, bounds are not rounded to bf16 first."""
    bound = torch.tensor(1e-3).bfloat16()  # 9.995e-4: below 1e-3, though not below 1e-3 in bf16
    seen = a_look(attended=bound.expand(1, 4, 2, 8))
    assert figures_of(seen).output.below_0001 == (1.0, 1.0)
    assert figures_of(seen).output.mean_abs == (bound.item(), bound.item())


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_told_and_break_nothing(number):
    hidden = torch.ones(2, 4, 16)
    hidden[1, 2, 5] = number
    figures = figures_of(a_look(hidden=hidden)).hidden
    assert figures.channel == 5
    for value in (figures.max_abs, figures.mean_max_abs):
        assert value != value if number != number else value == torch.inf
    ordinary, names = a_look(), ("q", "k", "attended", "projected", "scores", "hidden")
    everywhere = {name: torch.full_like(getattr(ordinary, name), number) for name in names}
    broken = figures_of(a_look(**everywhere))
    assert broken.hidden.channel == 0
    assert broken.attention.first_token != broken.attention.first_token
    assert not math.isfinite(broken.gate.mean)
    assert sum(broken.gate.histogram) == (0 if number != number else 2 * 4 * 2 * 8)


def test_scores_beyond_the_histogram_lie_in_its_first_and_last_bin():
    scores = torch.tensor([-3.0, -1e-9, 0.0, 0.019, 0.021, 0.99, 1.0, 5.0]).expand(1, 4, 2, 8)
    figures = figures_of(a_look(scores=scores, batch=1)).gate
    assert figures.histogram == (4 * 8, 8, *[0] * 47, 3 * 8)
    assert (figures.below_01, figures.below_05) == (5 / 8, 5 / 8)


def test_heads_that_are_dead_or_saturated():
    scores = torch.tensor([0.005, 0.995]).view(1, 1, 2, 1).expand(2, 4, 2, 8)
    figures = figures_of(a_look(scores=scores)).gate
    assert (figures.dead_heads, figures.saturated_heads) == (1, 1)
    assert figures.head_means == pytest.approx((0.005, 0.995), rel=1e-6)
    assert figures.std == pytest.approx(0.495, rel=1e-6)


def test_of_channels_that_are_alike_the_first_is_told():
    hidden = torch.zeros(2, 4, 16)
    hidden[0, 1, 9], hidden[1, 3, 4] = 7.0, -7.0
    figures = figures_of(a_look(hidden=hidden)).hidden
    assert (figures.max_abs, figures.channel, figures.mean_max_abs) == (7.0, 4, 7.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_attention_are_those_of_the_whole_matrix(dtype):
    model = model_of(VARIANTS["gate position G1"], EOD)
    seen: list[Seen] = []
    with torch.no_grad(), taps({0: model.layers[0]}, lambda _, one: seen.append(one)):
        model(some_tokens(), None)
        (dense, _), (one,) = reference(model, EOD).blocks(some_tokens()), seen
    rows = torch.tensor([0, 5, 6, 11])
    found = attention_rows(one.q.to(dtype), one.k.to(dtype), rows, one.documents)
    expected = dense.logits.softmax(-1)[:, :, rows]
    assert (found.dtype, found.shape) == (dtype, (3, 4, 4, LENGTH))
    assert (found.double() - expected).abs().max() < 1e-6
    assert (found[expected == 0] == 0).all() and (expected == 0).any()


def test_blocks_of_rows_do_not_change_the_sums(monkeypatch):
    """Whatever is held at once: several sequences, one, some rows of one."""
    q, k = (torch.randn(3, 40, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    starts = torch.tensor([[0] * 40, [0] * 17 + [17] * 23, [0] + [1] * 30 + [31] * 9])
    documents = Documents(starts, torch.empty(0))
    for queries, split in itertools.product((0, 7), (None, documents)):
        whole = row_sums(q, k, queries, split)
        for elements in (1, 200, 1000, 3000, 7000):
            monkeypatch.setattr(attention, "BLOCK_ELEMENTS", elements)
            parts = row_sums(q, k, queries, split)
            monkeypatch.undo()
            assert [part.item() for part in parts] == pytest.approx([part.item() for part in whole], rel=1e-6)


def a_look(*, batch: int = 2, **tensors: Tensor) -> Seen:
    """Of a block with two heads, on short rows; what is not given is ordinary."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "q": torch.randn(batch, 4, 2, 8, generator=generator),
        "k": torch.randn(batch, 4, 2, 8, generator=generator),
        "attended": torch.randn(batch, 4, 2, 8, generator=generator),
        "scores": torch.rand(batch, 4, 2, 8, generator=generator),
        "hidden": torch.randn(batch, 4, 16, generator=generator),
    }
    values |= tensors
    return Seen(**{"documents": None, "shares": None, "projected": values["attended"]} | values)


def figures_of(seen: Seen) -> LayerFigures:
    heads = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, gate=GateConfig("G1"))
    probe = Probe(ModelConfig(hidden_size=16, num_layers=1, ffn_size=16, attention=heads), ALONE)
    probe.look(0, seen)
    return probe.close()[0]
