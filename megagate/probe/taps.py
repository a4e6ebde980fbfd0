"""Hooks on a model's blocks: what a forward pass shows of each, for whoever looks at it. Layers know nothing of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megagate.backend.documents import Documents
from megagate.model.block import Block


class Seen(NamedTuple):
    """What one forward pass of a block showed, of this rank.

    Args:
        q: [b, s, n/tp, d], normed and rotated as they meet the keys.
        k: [b, s, g/tp, d], likewise.
        documents: Within which attention stays; None for whole rows.
        attended: [b, s, n/tp, d], softmax(q k^T / sqrt(d)) v.
        projected: [b, s, n/tp, d], what the output projection gets: the former, or, with a gate at G1, the gated.
        scores: [b, s, heads/tp, d or 1] fp32, the gate's, at G5 [b, s/tp, 1, h]; a parameter's are repeated for every token, shared ones
            are of one head, which all tp ranks have; of key/value heads that several tp ranks have, each has them. None where nothing is
            scored.
        shares: [b, s/tp, E] fp32, the router's scores of all experts, as shares of 1; None in a dense block.
        hidden: [b, s/tp, h], what the block gives on.
    """

    q: Tensor
    k: Tensor
    documents: Documents | None
    attended: Tensor
    projected: Tensor
    scores: Tensor | None
    shares: Tensor | None
    hidden: Tensor


Look = Callable[[int, Seen], None]
"""Called with a block's number, counted from 0, and what its forward pass showed, at its end."""


@contextmanager
def taps(blocks: Mapping[int, Block], look: Look) -> Iterator[None]:
    """Inside the context `look` is called after each forward pass of a block, without gradients.

    Until then the block's q, k, scores and outputs of its heads stay in memory. A block that a backward pass computes again is looked at
    again, so passes should keep no gradients.

    Args:
        blocks: By their number in the model.
        look: See `Look`.
    """
    with ExitStack() as stack:
        for layer, block in blocks.items():
            for handle in _tapped(layer, block, look):
                stack.callback(handle.remove)
        yield


def _tapped(layer: int, block: Block, look: Look) -> Iterator[Any]:
    """The hooks of one block. What needs weights is computed before a part runs: ZeRO-3 has given them away when it is done."""
    caught: dict[str, Any] = {"scores": None, "shares": None}

    def attended(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        q, k, _, documents = args
        caught.update(q=q, k=k, documents=documents, attended=out, projected=out)

    @torch.no_grad()
    def before_gate(gate: nn.Module, args: tuple[Any, ...]) -> None:
        caught["scores"] = _by_head(gate.scores(*args), args[0])

    def gated(_: nn.Module, __: object, out: Tensor) -> None:
        caught["projected"] = out

    @torch.no_grad()
    def before_router(router: nn.Module, args: tuple[Any, ...]) -> None:
        caught["shares"] = router.shares(*args)

    @torch.no_grad()
    def done(_: nn.Module, __: object, out: tuple[Tensor, Any]) -> None:
        look(layer, Seen(**caught, hidden=out[0]))
        caught.clear()
        caught.update(scores=None, shares=None)

    attention = block.attention
    yield attention.attend.register_forward_hook(attended)
    if attention.gate is not None:
        if attention.gate.config.score in ("input", "parameter"):
            yield attention.gate.register_forward_pre_hook(before_gate)
        if attention.gate.config.position == "G1":
            yield attention.gate.register_forward_hook(gated)
    if block.is_moe:
        yield block.moe.router.register_forward_pre_hook(before_router)
    yield block.register_forward_hook(done)


def _by_head(scores: Tensor, y: Tensor) -> Tensor:
    """As `Seen.scores` has them."""
    if scores.dim() == 2:
        return scores.expand(*y.shape[:2], *scores.shape)
    return scores.unsqueeze(-2) if scores.dim() == 3 else scores
