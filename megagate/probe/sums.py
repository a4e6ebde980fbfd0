"""Sums over tensors of a forward pass, in fp64 and in chunks: none of them makes a wide copy of a whole tensor or waits for a GPU."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megagate.probe.figures import GATE_BINS

CHUNK_ELEMENTS = 2**19
"""Numbers that are made wide at once: 4 MB in fp64."""


class Fields:
    """Named numbers that lie one after the other in a vector, so that one collective carries them all.

    Args:
        sizes: How many of each name.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = dict(sizes)
        self.width = sum(self.sizes.values())

    def join(self, values: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """[width] fp64; what is not given is 0.

        Raises:
            ValueError: A name that is none of the fields.
        """
        if unknown := values.keys() - self.sizes.keys():
            raise ValueError(f"{sorted(unknown)} are no fields of {list(self.sizes)}")
        zeros = torch.zeros(self.width, dtype=torch.float64, device=device)
        return torch.cat([values[name].double().reshape(size) if name in values else zeros[:size] for name, size in self.sizes.items()])

    def split(self, vector: Tensor) -> dict[str, list[float]]:
        """The numbers of each name; waits for the device."""
        parts = vector.cpu().split(list(self.sizes.values()))
        return {name: part.tolist() for name, part in zip(self.sizes, parts, strict=True)}


def gate_sums(scores: Tensor) -> dict[str, Tensor]:
    """Of a gate's scores [b, s, heads, channels] fp32: what `GateFigures` need, the sums by head as `gate_heads` [heads]."""
    parts = [_gate_chunk(chunk) for chunk in _chunks(scores)]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def _gate_chunk(scores: Tensor) -> dict[str, Tensor]:
    wide = scores.double()
    return {
        "gate_heads": wide.sum((0, 1, 3)),
        "gate_squares": wide.square_().sum(),
        "gate_below_01": torch.count_nonzero(scores < 0.1).double(),
        "gate_below_05": torch.count_nonzero(scores < 0.5).double(),
        "gate_histogram": torch.histc(scores.clamp(0, 1), GATE_BINS, 0, 1).double(),
    }


def output_sums(attended: Tensor, projected: Tensor) -> dict[str, Tensor]:
    """Of the attention's heads before and after the gate, [b, s, n, d] each: what `OutputFigures` need, [2] each."""
    before = _absolute_sums(attended)
    after = before if projected is attended else _absolute_sums(projected)
    names = ("output_abs", "output_below_001", "output_below_0001")
    return {name: torch.stack(pair) for name, pair in zip(names, zip(before.unbind(), after.unbind(), strict=True), strict=True)}


def _absolute_sums(x: Tensor) -> Tensor:
    """[3] fp64: the sum of absolute values, how many are below 1e-2, and below 1e-3."""
    parts = []
    for chunk in _chunks(x):
        size = chunk.abs().to(torch.promote_types(x.dtype, torch.float32))  # bf16 would round 1e-3
        counts = [torch.count_nonzero(size < bound) for bound in (1e-2, 1e-3)]
        parts.append(torch.stack([size.sum(dtype=torch.float64), *(count.double() for count in counts)]))
    return torch.stack(parts).sum(0)


def entropy_sum(shares: Tensor) -> Tensor:
    """The sum over tokens of -sum_e p_e ln p_e; shares [b, s, E]."""
    return torch.stack([torch.special.entr(chunk).sum(dtype=torch.float64) for chunk in _chunks(shares)]).sum()


def largest(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute values of hidden states [b, s, h]: of each sequence [b], and of each channel [h]; fp64."""
    of_both = torch.maximum(hidden.amax(1), -hidden.amin(1)).double()  # [b, h]
    return of_both.amax(1), of_both.amax(0)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Tensors [b, s, ...] cut along s, whose strides may be any: joining dimensions first might copy the whole."""
    step = max(1, CHUNK_ELEMENTS * x.shape[1] // max(1, x.numel()))
    return iter(x.split(step, dim=1))
