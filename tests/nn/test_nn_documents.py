"""Windows cut into documents: attention, positions and loss are those of each document run alone, under every layout."""

from dataclasses import replace

import pytest
import ranks
import torch
from parity.sharded import BACKEND, CPU, assert_all_close, assert_close, clear_routes, fill, full_gradients, random
from parity.variants import VARIANTS
from torch import Tensor

from megagate.backend.blockwise import BLOCK, _blocks, causal_attention
from megagate.backend.documents import Documents, squared_lengths
from megagate.backend.native import attend, flash_takes
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.data.loader import IGNORE_INDEX
from megagate.model.lm import LanguageModel
from megagate.nn.rope import at_positions, rope_table, rotate
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

EOD = 3
CUTS = {
    "one document": [[], []],
    "an end at the end": [[191], [191]],
    "ends of blocks": [[63, 127], [0, 63, 64]],
    "many": [[0, 1, 2, 70, 150], [5, 66, 140, 141, 190]],
    "blocks that no query sees": [[130], [100, 135]],
}
"""Places of ends in two rows of 192 tokens, three blocks of queries."""
DENSE = ModelConfig(
    vocab_size=100,
    hidden_size=32,
    num_layers=2,
    ffn_size=48,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, gate=GateConfig("G1")),
)
MOE = replace(DENSE, ffn_size=0, moe=MoEConfig(num_experts=8, top_k=2, ffn_size=16, shared_ffn_size=24))
MODELS = {"dense": DENSE, "moe": MOE}
TIGHT = 1e-5


def tokens_with(ends: list[list[int]], length: int) -> Tensor:
    """Rows of tokens above EOD, and EOD at the given places."""
    tokens = torch.randint(EOD + 1, 100, (len(ends), length), generator=torch.Generator().manual_seed(5))
    for row, places in zip(tokens, ends, strict=True):
        row[places] = EOD
    return tokens


def parts(tokens: Tensor) -> list[tuple[int, slice]]:
    """(row, place) of every document, by reading along the rows."""
    found = []
    for row, ids in enumerate(tokens.tolist()):
        first = 0
        for place, token in enumerate(ids):
            if token == EOD or place == len(ids) - 1:
                found.append((row, slice(first, place + 1)))
                first = place + 1
    return found


# ---- where they lie


def test_documents_begin_after_each_end():
    x, e = 9, EOD
    documents = Documents.of(torch.tensor([[x, x, e, x, e, e], [e, x, x, x, x, x], [x, x, x, x, x, e]]), eod_id=EOD)
    assert documents.starts.tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1], [0] * 6]
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 6, 7, 12, 18], "the end of a row ends its last document"
    assert documents.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("ends", CUTS.values(), ids=list(CUTS))
def test_squared_lengths_are_those_of_the_documents(ends):
    tokens = tokens_with(ends, 192)
    expected = sum((place.stop - place.start) ** 2 for _, place in parts(tokens))
    assert squared_lengths(tokens, eod_id=EOD) == squared_lengths(tokens.view(2, 1, 192), eod_id=EOD) == expected


def test_positions_turn_as_in_a_document_alone():
    tokens = tokens_with([[3, 9], [0, 12]], 16)
    table, x = rope_table(16, 8, base=100.0, device=CPU), random("x", 2, 16, 3, 8)
    turned = rotate(x, at_positions(table, Documents.of(tokens, eod_id=EOD).positions))
    for row, place in parts(tokens):
        alone = x[row : row + 1, place]
        assert torch.equal(turned[row : row + 1, place], rotate(alone, table[:, : alone.shape[1]]))


# ---- the kernel


def attended(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """Each document alone."""
    out = torch.empty_like(q)
    for row, place in parts(tokens):
        out[row : row + 1, place] = causal_attention(*(t[row : row + 1, place] for t in (q, k, v)))
    return out


@pytest.mark.parametrize("ends", CUTS.values(), ids=CUTS)
def test_attention_in_blocks_is_that_of_each_document_alone(ends):
    tokens = tokens_with(ends, 3 * BLOCK)
    q, k, v, grad = (random(name, 2, 3 * BLOCK, heads, 8, dtype=torch.float64) for name, heads in zip("qkvg", (4, 2, 2, 4), strict=True))
    qkv = [t.requires_grad_() for t in (q, k, v)]
    ours, alone = causal_attention(*qkv, Documents.of(tokens, eod_id=EOD)), attended(*qkv, tokens)
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-13)
    for mine, other in zip(torch.autograd.grad(ours, qkv, grad), torch.autograd.grad(alone, qkv, grad), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_blocks_of_keys_that_nobody_sees_are_left_out():
    starts = Documents.of(tokens_with(CUTS["blocks that no query sees"], 3 * BLOCK), eod_id=EOD).starts
    assert [(block.first, block.start, block.hidden is None) for block in _blocks(3 * BLOCK, starts)] == [
        (0, 0, True),
        (0, 64, False),
        (0, 128, False),  # its first queries go on with documents of before
    ]
    late = Documents.of(tokens_with([[63, 127], [100, 127]], 3 * BLOCK), eod_id=EOD).starts
    assert [block.first for block in _blocks(3 * BLOCK, late)] == [0, 0, 128]


@pytest.mark.parametrize(
    ("dtype", "width", "taken"),
    [
        (torch.bfloat16, 256, True),
        (torch.float16, 8, True),
        (torch.bfloat16, 264, False),
        (torch.bfloat16, 20, False),
        (torch.float32, 64, False),
    ],
)
def test_heads_that_the_kernel_of_gpus_refuses_go_in_blocks(dtype: torch.dtype, width: int, taken: bool):
    assert flash_takes(dtype, width) is taken


def test_the_kernel_of_gpus_takes_what_it_is_given_and_has_a_gradient():
    """Shapes alone, on PyTorch's device for that; its numbers are a matter of `tests/gpu`."""
    meta = torch.device("meta")
    starts, borders = torch.empty(2, 48, dtype=torch.int64, device=meta), torch.empty(6, dtype=torch.int32, device=meta)
    projected = torch.empty(2, 48, 8, 16, dtype=torch.bfloat16, device=meta, requires_grad=True)  # as one GEMM yields them
    q, k, v = projected.split([4, 2, 2], dim=2)
    out = attend(q, k, v, Documents(starts, borders))
    assert out.shape == q.shape and out.dtype == q.dtype
    flash = out.grad_fn.next_functions[0][0]
    assert flash.name() == "FlashAttentionBackward0" and flash._saved_is_causal and flash._saved_cum_seq_q is not None
    (grad,) = torch.autograd.grad(out, projected, torch.empty_like(out))
    assert grad.shape == projected.shape


# ---- the model


def build(config: ModelConfig, mesh: ParallelMesh | None = None, *, recompute: bool = False, eod_id: int | None = None) -> LanguageModel:
    mesh = mesh or ParallelMesh.single()
    return fill(LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=mesh, recompute=recompute, eod_id=eod_id))


def sample(length: int) -> tuple[Tensor, Tensor]:
    """Several documents in each row, and the labels that `data/loader.py` gives them."""
    text = tokens_with([[0, 4, 5, 13], [9]], length + 1)
    tokens, labels = text[:, :-1].clone(), text[:, 1:].clone()
    labels[tokens == EOD] = IGNORE_INDEX
    return tokens, labels


def each_alone(config: ModelConfig, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums over all documents, each a batch of its own to a model that knows of none."""
    model, mesh = build(config), ParallelMesh.single()
    with clear_routes(model):
        loss = sum(model(tokens[row : row + 1, place], labels[row : row + 1, place]).ce_sum for row, place in parts(tokens))
    loss.backward()
    return loss.detach(), full_gradients(model, mesh)


def assert_each_alone(config: ModelConfig, mesh: ParallelMesh, *, recompute: bool) -> None:
    tokens, labels = sample(16)
    model = build(config, mesh, recompute=recompute, eod_id=EOD)
    loss = model(tokens, labels).ce_sum
    loss.backward()
    expected, gradients = each_alone(config, tokens, labels)
    assert_close(loss.detach(), expected, to=1e-6, what="loss")
    assert_all_close(full_gradients(model, mesh), gradients, to=TIGHT)
    logits, alone = model.logits(tokens), build(config)
    for row, place in parts(tokens):
        assert_close(logits[row : row + 1, place], alone.logits(tokens[row : row + 1, place]), to=TIGHT, what="logits")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_window_is_its_documents_each_run_alone(config, recompute):
    assert_each_alone(config, ParallelMesh.single(), recompute=recompute)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_its_documents_each_run_alone(variant):
    assert_each_alone(VARIANTS[variant], ParallelMesh.single(), recompute=False)


def under_tp(context: RankContext, config: ModelConfig, recompute: bool) -> None:
    size = context.world_size
    assert_each_alone(config, ParallelMesh.build(tp=size, ep=size if config.is_moe else 1), recompute=recompute)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_window_is_its_documents_each_run_alone_under_tp(world_size, config, recompute):
    """Borders fall inside the ranks' parts of the sequence and between them; four ranks are more than the key/value heads."""
    ranks.run_ranks(under_tp, world_size, config, recompute)


def test_blocks_are_given_the_positions_of_documents():
    """RoPE is relative: inside a document other positions would change no more than rounding, which no comparison of losses shows."""
    model, tokens = build(DENSE, eod_id=EOD), sample(16)[0]
    given = []
    model.layers[1].register_forward_pre_hook(lambda _, args: given.append(args[1]))
    model.logits(tokens)
    table = rope_table(16, 8, base=DENSE.attention.rope.base, device=CPU)
    for row, place in parts(tokens):
        assert torch.equal(given[0][:, row, place], table[:, : place.stop - place.start])


def test_a_document_knows_nothing_of_the_others():
    tokens, _ = sample(16)
    changed = tokens.clone()
    changed[:, 6:9] = 50  # in the third document of the first row, the first of the second
    model, blind = build(DENSE, eod_id=EOD), build(DENSE)
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, 14:], after[:, 14:]) and torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 8], after[:, 8]).all(-1).any()
    assert not torch.isclose(blind.logits(tokens)[:, 14:], blind.logits(changed)[:, 14:]).all(-1).any()


def test_a_window_without_ends_is_one_document():
    tokens = tokens_with([[], []], 16)
    assert torch.equal(build(DENSE, eod_id=EOD).logits(tokens), build(DENSE).logits(tokens))
