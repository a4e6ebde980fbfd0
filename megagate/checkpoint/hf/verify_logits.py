"""Two models' logits on the same tokens: fixed tokens, how far apart, and whether a router's near-tie explains it."""

from dataclasses import dataclass

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


def fixed_tokens(vocab_size: int) -> Tensor:
    """The same tokens each time, spread evenly over the whole vocabulary, its ends among them, in random order; [3, 80]."""
    generator = torch.Generator().manual_seed(SEED)
    count = SEQUENCES * LENGTH
    inner = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * vocab_size / count
    tokens = inner.long().clamp_max(vocab_size - 1)
    tokens[0], tokens[-1] = 0, vocab_size - 1
    return tokens[torch.randperm(count, generator=generator)].view(SEQUENCES, LENGTH)


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
    """

    max_error: float
    at: tuple[int, int, int]
    largest: float
    positions: int
    left_out: int
    flaw: str | None

    @property
    def tolerance(self) -> float:
        """The difference that is allowed."""
        return TOLERANCE * min(1.0, self.largest)


def agreement(ours: Tensor, theirs: Tensor, gaps: list[Tensor]) -> Agreement:
    """Compare logits.

    A router whose choice is nearly a tie may choose otherwise after a rounding, and then this position and those behind it differ by
    much more than one. Ties are rare, so a sequence that differs from such a position on is compared up to there; one that differs
    before its first near-tie is wrong.

    Args:
        ours: [b, s, V].
        theirs: [b, s, V or more]: what is beyond V pads the vocabulary.
        gaps: Of each choice in our model, [b, s]: by how much it was made.
    """
    errors, tokens = _errors(ours, theirs[..., : ours.shape[-1]])  # [b, s]
    largest = ours.abs().max().item()
    tolerance = TOLERANCE * min(1.0, largest)
    compared = torch.ones_like(errors, dtype=torch.bool)
    nearest = torch.stack(gaps).amin(0) if gaps else torch.full_like(errors, float("inf"))
    for sequence, wrong in enumerate(errors > tolerance):
        first = int(wrong.nonzero()[0]) if wrong.any() else None
        if first is not None and nearest[sequence, first] < SMALLEST_GAP:
            compared[sequence, first:] = False
    kept = errors.where(compared, torch.zeros_like(errors))
    place = int(kept.argmax())
    sequence, position = divmod(place, errors.shape[1])
    worst = kept[sequence, position].item()
    outcome = {
        "max_error": worst,
        "at": (sequence, position, int(tokens[sequence, position])),
        "largest": largest,
        "positions": int(compared.sum()),
        "left_out": int((~compared).sum()),
    }
    if not worst <= tolerance:
        flaw = (
            f"logits differ by up to {worst:.3g}, at position {position} of sequence {sequence} and token {outcome['at'][2]}; "
            f"{tolerance:.1e} is allowed, {int((errors > tolerance).sum())} of {errors.numel()} positions are beyond it, and the largest "
            f"logit is {largest:.3g}"
        )
    elif outcome["positions"] < _LEAST_COMPARED * errors.numel():
        flaw = (
            f"logits differ from near-ties of routers on, and before them are no more than {outcome['positions']} of {errors.numel()} "
            "positions: too few to tell a flipped route from a wrong model"
        )
    else:
        flaw = None
    return Agreement(**outcome, flaw=flaw)


def _errors(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference at each position (infinite where a logit is not a number), and its token; [b, s], by sequences for memory."""
    each = []
    for mine, other in zip(ours, theirs, strict=True):
        difference = (mine - other).abs()
        each.append(difference.masked_fill_(difference.isnan(), float("inf")).max(-1))
    return torch.stack([one.values for one in each]), torch.stack([one.indices for one in each])
