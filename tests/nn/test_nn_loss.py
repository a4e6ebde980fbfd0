"""Cross-entropy: equal to PyTorch's on the whole, under every cut of the vocabulary and of the rows."""

import pytest
import ranks
import torch
from parity.sharded import assert_close, random, take
from torch import Tensor
from torch.nn import functional as F

from megagate.nn import loss
from megagate.nn.loss import IGNORE_INDEX, cross_entropy_sum
from megagate.parallel.comm import gather
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

BATCH, SEQUENCE, HIDDEN, ROWS = 3, 20, 16, 64
# Rows of the padded vocabulary that are real. Of 64: all; the last rank partly padded; under tp 4 and 2 whole ranks of padding.
VOCABULARIES = [64, 63, 33, 30, 15]


def inputs(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, vocab_size, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(vocab_size))
    labels[0, :3] = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    labels[1, 4:11] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    weight = random("weight", ROWS, HIDDEN)
    weight[vocab_size:] += 5  # padding that would dominate the softmax if it took part
    return 2 * random("x", BATCH, SEQUENCE, HIDDEN), weight, labels


def expected(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's loss and gradients in fp64."""
    x, weight, labels = inputs(vocab_size)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ weight[:vocab_size].T).flatten(0, 1)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    (0.25 * total).backward()
    return total.detach(), x.grad, weight.grad


def check(context: RankContext, vocab_size: int, chunk: int) -> float:
    mesh = ParallelMesh.build(tp=context.world_size, ep=1)
    x, weight, labels = inputs(vocab_size)
    local_x, local_weight = take(x, mesh.tp, 1).requires_grad_(), take(weight, mesh.tp, 0).requires_grad_()
    before, loss.CHUNK_TOKENS = loss.CHUNK_TOKENS, chunk
    try:
        total = cross_entropy_sum(local_x, local_weight, labels, vocab_size=vocab_size, tp=mesh.tp)
        with torch.no_grad():
            again = cross_entropy_sum(local_x, local_weight, labels, vocab_size=vocab_size, tp=mesh.tp)
    finally:
        loss.CHUNK_TOKENS = before
    (0.25 * total).backward()
    assert torch.equal(total, again) and not again.requires_grad
    value, grad_x, grad_weight = expected(vocab_size)
    assert_close(total, value, to=1e-6, what="loss")
    assert_close(local_x.grad, take(grad_x, mesh.tp, 1), to=2e-6, what="gradient of x")
    whole = gather(local_weight.grad, mesh.tp, 0)
    assert_close(whole, grad_weight, to=2e-6, what="gradient of the weight")
    assert not whole[vocab_size:].any(), "padding has no gradient"
    return total.item()


@pytest.mark.parametrize("chunk", [1024, 7])  # one chunk; nine, the last one short
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_pytorch(world_size, vocab_size, chunk):
    values = ranks.run_ranks(check, world_size, vocab_size, chunk)
    assert values == values[:1] * world_size


def test_no_target_at_all_is_zero():
    x, weight, labels = inputs(33)
    x.requires_grad_()
    total = cross_entropy_sum(x, weight, torch.full_like(labels, IGNORE_INDEX), vocab_size=33, tp=ParallelMesh.single().tp)
    total.backward()
    assert total.item() == 0 and not x.grad.any()


def test_large_logits_do_not_overflow():
    x, weight, labels = inputs(33)
    total = cross_entropy_sum(100 * x, weight, labels, vocab_size=33, tp=ParallelMesh.single().tp)
    logits = (100 * x @ weight[:33].T).double().flatten(0, 1)
    assert_close(total, F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"), to=1e-6)


def test_bf16_is_summed_in_fp32(monkeypatch):
    """The only roundings are those of the logits, of their gradients and of what leaves: not of a sum over many chunks."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    x, weight = random("x", 1, 4096, HIDDEN).bfloat16(), (0.1 * random("weight", ROWS, HIDDEN)).bfloat16()
    labels = torch.randint(0, ROWS, (1, 4096), generator=torch.Generator().manual_seed(3))
    x.requires_grad_(), weight.requires_grad_()
    total = cross_entropy_sum(x, weight, labels, vocab_size=ROWS, tp=ParallelMesh.single().tp)
    total.backward()
    assert total.dtype == torch.float32 and weight.grad.dtype == x.grad.dtype == torch.bfloat16
    wide = F.linear(x.detach(), weight.detach()).double().flatten(0, 1).requires_grad_()
    value = F.cross_entropy(wide, labels.flatten(), reduction="sum")
    value.backward()
    assert_close(total, value, to=1e-6)
    grad_weight = wide.grad.T @ x.detach().double().flatten(0, 1)
    assert (weight.grad.double() - grad_weight).norm() / grad_weight.norm() < 4e-3
