"""Two models' logits on the same tokens: fixed tokens, how far apart, and whether a router's near-tie explains it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagate.nn.routes import SMALLEST_GAP

TOLERANCE = 1e-4
"""Between logits of two models in fp32; where all logits are smaller than 1, between shares of the largest."""
SEQUENCES, LENGTH = 3, 80
PROMPT, NEW_TOKENS = 24, 16
SEED = 20
_LEAST_COMPARED = 0.5
"""Of all positions: with fewer before the first near-tie there is too little to say that the models are the same."""


_OF_OURS = 4.0
"""How many times as far from fp64 as our own fp32 another fp32 may be, to count as rounding: other kernels sum in another order."""
_MOST_ROUNDING = 1e-4
"""Of fp32, as a share of the largest logit; beyond it our fp64 chose another route than our fp32, which says nothing of rounding."""


def fixed_tokens(vocab_size: int) -> Tensor:
    """The same tokens each time, spread evenly over the whole vocabulary, its ends among them, in random order; [3, 80]."""
    generator = torch.Generator().manual_seed(SEED)
    count = SEQUENCES * LENGTH
    inner = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * vocab_size / count
    tokens = inner.long().clamp_max(vocab_size - 1)
    tokens[0], tokens[-1] = 0, vocab_size - 1
    return tokens[torch.randperm(count, generator=generator)].view(SEQUENCES, LENGTH)


@dataclass(frozen=True)
class Rounding:
    """Differences beyond the tolerance that fp32 itself makes: where our own model in fp32 is as far from itself in fp64.

    Args:
        positions: How many there are.
        ours: The largest difference there between our logits in fp32 and in fp64.
        theirs: Between their logits in fp32 and ours in fp64.
    """

    positions: int
    ours: float
    theirs: float


@dataclass(frozen=True)
class Agreement:
    """How far apart two models' logits are.

    Args:
        max_error: The largest difference at the positions that were compared.
        at: Its sequence, position and token.
        largest: The largest logit, in size.
        positions: How many were compared.
        left_out: Positions behind the first in their sequence where the models differ and a router's choice is near a tie.
        flaw: What is wrong; None where nothing is.
        rounding: What of it is beyond the tolerance, and rounding all the same; None where nothing is.
    """

    max_error: float
    at: tuple[int, int, int]
    largest: float
    positions: int
    left_out: int
    flaw: str | None
    rounding: Rounding | None = None

    @property
    def tolerance(self) -> float:
        """The difference that is allowed."""
        return TOLERANCE * min(1.0, self.largest)


def agreement(ours: Tensor, theirs: Tensor, gaps: list[Tensor], *, wide: Callable[[], Tensor] | None = None) -> Agreement:
    """Compare logits.

    A router whose choice is nearly a tie may choose otherwise after a rounding, and then this position and those behind it differ by
    much more than one. Ties are rare, so a sequence that differs from such a position on is compared up to there; one that differs
    before its first near-tie is wrong, unless fp32 itself is as inexact there.

    Args:
        ours: [b, s, V].
        theirs: [b, s, V or more]: what is beyond V pads the vocabulary.
        gaps: Of each choice in our model, [b, s]: by how much it was made.
        wide: Our logits in fp64, asked for where something is beyond the tolerance; without it nothing counts as rounding.
    """
    theirs = theirs[..., : ours.shape[-1]]
    errors, tokens = _errors(ours, theirs)  # [b, s]
    largest = ours.abs().max().item()
    tolerance = TOLERANCE * min(1.0, largest)
    wrong, rounding = errors > tolerance, None
    if wide is not None and wrong.any():
        wrong, rounding = _without_rounding(wrong, ours, theirs, wide())
    compared = torch.ones_like(errors, dtype=torch.bool)
    nearest = torch.stack(gaps).amin(0) if gaps else torch.full_like(errors, float("inf"))
    for sequence, beyond in enumerate(wrong):
        first = int(beyond.nonzero()[0]) if beyond.any() else None
        if first is not None and nearest[sequence, first] < SMALLEST_GAP:
            compared[sequence, first:] = False
    wrong &= compared
    kept = errors.where(wrong if wrong.any() else compared, torch.zeros_like(errors))
    sequence, position = divmod(int(kept.argmax()), errors.shape[1])
    found = Agreement(
        max_error=kept[sequence, position].item(),
        at=(sequence, position, int(tokens[sequence, position])),
        largest=largest,
        positions=int(compared.sum()),
        left_out=int((~compared).sum()),
        flaw=None,
        rounding=rounding,
    )
    return replace(found, flaw=_flaw(found, wrong))


def _flaw(found: Agreement, wrong: Tensor) -> str | None:
    """In words; `wrong` are the positions [b, s] that differ by more than may be."""
    if wrong.any():
        return (
            f"logits differ by up to {found.max_error:.3g}, at position {found.at[1]} of sequence {found.at[0]} and token {found.at[2]}; "
            f"{found.tolerance:.1e} is allowed, {int(wrong.sum())} of {wrong.numel()} positions are beyond it, and the largest logit is "
            f"{found.largest:.3g}"
        )
    if found.positions < _LEAST_COMPARED * wrong.numel():
        return (
            f"logits differ from near-ties of routers on, and before them are no more than {found.positions} of {wrong.numel()} "
            "positions: too few to tell a flipped route from a wrong model"
        )
    return None


def _without_rounding(wrong: Tensor, ours: Tensor, theirs: Tensor, exact: Tensor) -> tuple[Tensor, Rounding | None]:
    """The positions [b, s] that rounding does not explain, and what it does.

    One position's own rounding may happen to be small: the median over all is what can be expected of any.
    """
    mine, other = (_errors(exact, logits)[0] for logits in (ours, theirs))
    usual = mine.clamp(min=mine.median())
    rounded = wrong & (other <= _OF_OURS * usual) & (usual <= _MOST_ROUNDING * ours.abs().max())
    if not rounded.any():
        return wrong, None
    return wrong & ~rounded, Rounding(int(rounded.sum()), mine[rounded].max().item(), other[rounded].max().item())


def _errors(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference at each position (infinite where a logit is not a number), and its token; [b, s], by sequences for memory."""
    each = []
    for mine, other in zip(ours, theirs, strict=True):
        difference = (mine - other).abs()
        each.append(difference.masked_fill_(difference.isnan(), float("inf")).max(-1))
    return torch.stack([one.values for one in each]), torch.stack([one.indices for one in each])
