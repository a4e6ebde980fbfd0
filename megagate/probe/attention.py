"""Rows of attention, computed again from rotated q and k: the kernels of the forward pass keep none."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from megagate.backend.documents import Documents

BLOCK_ELEMENTS = 2**22
"""Logits of a block: 16 MB in fp32, so that a block, its mask and what a reduction makes of it stay far below 64 MB."""


class RowSums(NamedTuple):
    """Sums over rows that were looked at, over sequences and, where not said otherwise, heads; scalars in fp64.

    Args:
        first: Shares of the first token, without queries 0.
        first_with_0: The same with them.
        uniform: 1 / (position + 1), without queries 0.
        uniform_with_0: The same with them.
        rows: Rows without queries 0.
        rows_with_0: All rows.
        max_logit: No sum: the largest visible q k / sqrt(d).
    """

    first: Tensor
    first_with_0: Tensor
    uniform: Tensor
    uniform_with_0: Tensor
    rows: Tensor
    rows_with_0: Tensor
    max_logit: Tensor


def attention_rows(q: Tensor, k: Tensor, rows: Tensor, documents: Documents | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) of some queries, 0 at keys that they do not see.

    Shapes: q [b, s, n, d], k [b, s, g, d], rows [R] int64 -> [b, n, R, s] fp32 (fp64 of fp64).

    Args:
        q: Queries as they meet the keys, normed and rotated; consecutive n/g of them share a key.
        k: Keys, likewise.
        rows: Places of queries in the sequence.
        documents: Within which attention stays; None for whole rows.
    """
    logits = _logits(q.index_select(1, rows), _by_head(k), rows, None if documents is None else documents.starts)
    return logits.softmax(-1).flatten(1, 2)


def row_sums(q: Tensor, k: Tensor, queries: int, documents: Documents | None = None) -> RowSums:
    """Sums over the rows of attention of some queries, see `looked_at`; block by block, so that little of it is held at once.

    Shapes: q [b, s, n, d], k [b, s, g, d].

    Args:
        q: As in `attention_rows`.
        k: As there.
        queries: How many of each sequence; 0 is all.
        documents: As there.
    """
    blocks = [_block_sums(*block) for block in _blocks(q, k, queries, None if documents is None else documents.starts)]
    *sums, max_logits = (torch.stack(of_blocks) for of_blocks in zip(*blocks, strict=True))
    return RowSums(*(of_blocks.sum(0) for of_blocks in sums), max_logits.amax())


def looked_at(queries: int, length: int, device: torch.device) -> Tensor:
    """Places of the queries that are looked at, [R] int64: (i + 1) * length // queries - 1, so the last of equal shares; 0 is all."""
    count = queries if 0 < queries < length else length
    return torch.arange(1, count + 1, device=device) * length // count - 1


class _Block(NamedTuple):
    """Some queries of some sequences and heads, and all keys that any of them sees.

    Args:
        q: [b, R, n, d].
        k: [b, g, keys, d], wide.
        rows: [R], the queries' places.
        starts: [b, s], the places of their documents' first tokens; None for whole rows.
    """

    q: Tensor
    k: Tensor
    rows: Tensor
    starts: Tensor | None


def _blocks(q: Tensor, k: Tensor, queries: int, starts: Tensor | None) -> Iterator[_Block]:
    """Blocks of as many sequences, heads and queries as fit, in this order: keys are made wide once."""
    batch, length, groups, width = k.shape
    of_group = q.shape[2] // groups
    rows, fit = looked_at(queries, length, q.device), BLOCK_ELEMENTS // length
    some_groups = min(groups, max(1, fit // max(of_group, width)))
    sequences = min(batch, max(1, fit // (groups * max(of_group, width))))
    count = max(1, fit // (sequences * some_groups * of_group))
    for sequence, group in product(range(0, batch, sequences), range(0, groups, some_groups)):
        some = slice(sequence, sequence + sequences)
        wide_k = _by_head(k[some, :, group : group + some_groups])
        some_q = q[some, :, group * of_group : (group + some_groups) * of_group]
        for start in range(0, len(rows), count):
            of_block = rows[start : start + count]
            keys = (start + len(of_block)) * length // len(rows)  # the last of these queries sees this many
            yield _Block(some_q.index_select(1, of_block), wide_k[:, :, :keys], of_block, None if starts is None else starts[some])


def _block_sums(q: Tensor, k: Tensor, rows: Tensor, starts: Tensor | None) -> RowSums:
    logits = _logits(q, k, rows, starts)  # [b, g, n/g, R, keys]
    largest = logits.amax(-1, keepdim=True)
    firsts = rows.new_zeros(1, len(rows)) if starts is None else starts.index_select(1, rows)  # [b or 1, R]
    at_first = firsts[:, None, None, :, None].expand(*logits.shape[:-1], 1)
    first = (logits.gather(-1, at_first) - largest).exp()
    share = (first / logits.sub_(largest).exp_().sum(-1, keepdim=True)).squeeze(-1).double()  # [b, g, n/g, R]
    position = (rows - firsts).expand(len(q), -1)
    later, uniform = (position > 0).double(), (position + 1).double().reciprocal()  # [b, R]
    heads = q.shape[2]
    sums = (share.sum((1, 2)) * later).sum(), share.sum(), (uniform * later).sum() * heads, uniform.sum() * heads
    return RowSums(*sums, later.sum() * heads, torch.ones_like(later).sum() * heads, largest.amax())


def _logits(q: Tensor, k: Tensor, rows: Tensor, starts: Tensor | None) -> Tensor:
    """q k / sqrt(d), -inf at keys that a query does not see: q [b, R, n, d], k [b, g, keys, d] -> [b, g, n/g, R, keys]."""
    by_group = _wide(q).unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4)  # [b, g, n/g, R, d]
    left = (by_group * q.shape[-1] ** -0.5).flatten(2, 3).flatten(0, 1)
    logits = torch.bmm(left, k.flatten(0, 1).transpose(1, 2)).view(*by_group.shape[:-1], -1)
    keys = torch.arange(k.shape[2], device=k.device)
    hidden = keys > rows[:, None]  # [R, keys]
    if starts is not None:
        hidden = hidden | (keys < starts.index_select(1, rows)[..., None])[:, None, None]
    return logits.masked_fill_(hidden, -torch.inf)


def _by_head(k: Tensor) -> Tensor:
    """[b, s, g, d] -> [b, g, s, d], wide, each head's keys together."""
    return _wide(k).transpose(1, 2).contiguous()


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
