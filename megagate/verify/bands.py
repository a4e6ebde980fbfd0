"""How far a product in FP8 may be from the same product in full: derived from the formats, for the numbers that it was given.

A number x in a binary format whose mantissa has m bits is rounded to the nearest multiple of its binade's step, 2^-m of the power of two
below x. The error is spread evenly over one step (what is multiplied in training has more bits than that), so its root mean square is
step / sqrt(12): relative to x between 2^-m / sqrt(12) / 2 (just below the next power of two) and 2^-m / sqrt(12) (at a power of two),
whatever the scale is. With m = 3 (e4m3) that is 1.8 % to 3.6 %, with m = 2 (e5m2) 3.6 % to 7.2 %.

A product y = sum_k a_k b_k of two rounded operands whose errors are independent is off by a variance of sum_k a_k^2 b_k^2 (r_a^2 + r_b^2):
the same product *of the squares*. So every product is made once more of squares, forward and backward, collectives included, and its sums
over a tensor give the band of the tensor's relative error: sqrt((r_a^2 + r_b^2) sum(squares) / sum(y^2)). Random terms give
sqrt(r_a^2 + r_b^2), for two of e4m3 2.6 % to 5.1 %, terms that add up less, terms that cancel more.

What is too small for its scale's normal numbers is rounded to the format's smallest step: s = amax / largest * smallest, twice that where a
scale is a power of two. The upper edge counts s^2 / 12 for every number of an operand.

Results are rounded to the run's dtype on both sides, and so are, before, normed inputs and partial sums over tp: that is all that a
product in high precision may differ by (no lower edge). Kernels that make no product of weights (attention, norms) are told in units of
what PyTorch's own kernel in that dtype is off from itself in fp32.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megagate.backend.base import Backend
from megagate.config.run import Fp8Recipe
from megagate.nn.norm import RMSNorm
from megagate.parallel.comm import total
from megagate.verify.products import Call, Kind, Passed, through


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Args:
        mantissa: Its bits after the leading one.
        largest: Its largest number; 0 where the run's scales are not needed.
        smallest: Its smallest step, of denormal numbers.
    """

    mantissa: int
    largest: float = 0.0
    smallest: float = 0.0

    @property
    def high(self) -> float:
        """Root mean square of the relative rounding error, at the most."""
        return 2.0**-self.mantissa / math.sqrt(12)

    @property
    def low(self) -> float:
        """And at the least."""
        return self.high / 2

    @property
    def usual(self) -> float:
        """Of numbers whose logarithms are spread evenly: step^2 / 12 over the mean square of a binade, 3 / (2 ln 2)."""
        return self.high / math.sqrt(1.5 / math.log(2))

    def floor(self, x: Tensor) -> float:
        """Variance of what is rounded to the smallest step, relative to `high`."""
        if not self.largest or x.numel() == 0:
            return 0.0
        step = 2 * x.abs().max().item() / self.largest * self.smallest
        return step**2 / 12 / self.high**2


E4M3, E5M2 = Format(3, 448.0, 2.0**-9), Format(2, 57344.0, 2.0**-16)
DTYPES: Mapping[torch.dtype, Format] = MappingProxyType({torch.bfloat16: Format(7), torch.float32: Format(23)})
OF_GRADIENTS: Mapping[Fp8Recipe, Format] = MappingProxyType({"delayed": E5M2, "current": E5M2, "blockwise": E4M3, "mxfp8": E4M3})
"""Of the gradients that go into products; inputs and weights are e4m3 in all recipes."""
MARGIN = 1.25
"""Sums of squares of few errors (one expert's rows) are off their mean. Measured: `tests/verify/test_verify_precision.py`."""
TINY = torch.finfo(torch.float32).tiny
SUMMED = 16.0
"""Units in fp32 that sums in another order may differ by, where roundings of results alone are far below."""
TIMES_OWN = 3.0
"""Of a kernel's own rounding: two kernels' are independent, so sqrt(2) times one, and a margin of 2."""


@dataclass(frozen=True)
class Band:
    """Sums of squares over a tensor of the difference that is expected, at the least and at the most."""

    low: float
    high: float


Bands = tuple[dict[str, Band], dict[str, Band], dict[str, Band]]
"""As `Passed`."""


def of_product(
    kind: Kind, site: Any, call: Call, *, backend: Backend, recipe: Fp8Recipe, quantised: Collection[str], norm: RMSNorm | None = None
) -> Bands:
    """The bands of a product of weights. Collective.

    Args:
        kind: Of product.
        site: The reference's.
        call: What went through it.
        backend: The reference's.
        recipe: `none` where nothing is in FP8.
        quantised: Names of the weights that are in FP8.
        norm: The norm that the product takes along.
    """
    unit = _unit(call.x.dtype)
    made = through(kind, site, call, backend=backend, norm=norm)
    gradients = OF_GRADIENTS.get(recipe, E4M3)
    every = _squares(kind, site, call, backend, norm, set(call.weights), None)
    fp8 = floored = Passed(*({name: torch.zeros(()) for name in one} for one in made))
    if recipe != "none" and quantised:
        fp8, floored = (_squares(kind, site, call, backend, norm, quantised, how) for how in (None, gradients))
    operands = ((E4M3, E4M3), (gradients, E4M3), (gradients, E4M3))
    bands = []
    for number, (a, b) in enumerate(operands):
        own = {}
        for name, result in made[number].items():
            rounded = 2 * unit**2 * (_sum(result.double().square()) + 2 * _sum(every[number][name]))
            least = most = 1.0
            if name == "norm":  # every token's share is off by the same error of a weight
                together = _of_gain(call, made.weights, norm, quantised) / max(_sum(fp8[number][name]), TINY)
                least, most = min(1.0, together), max(1.0, together)
            low = (a.low**2 + b.low**2 * least) * _sum(fp8[number][name])
            high = (a.high**2 + b.high**2 * most) * _sum(floored[number][name])
            own[name] = Band(low / MARGIN**2, (high + rounded) * MARGIN**2)
        bands.append(own)
    return tuple(bands)


def of_kernel(kind: Kind, site: Callable, call: Call, *, backend: Backend) -> Bands:
    """The bands of attention, or of a norm: by what PyTorch's own kernel is off, in bf16, from itself in fp32. Collective."""
    made = through(kind, site, call, backend=backend)
    if call.x.dtype == torch.float32:
        limit = (2 * TIMES_OWN * _unit(torch.float32)) ** 2
        return tuple({name: Band(0.0, limit * _sum(t.double().square())) for name, t in one.items()} for one in made)
    wide = replace(call, x=call.x.float(), weights={name: w.float() for name, w in call.weights.items()})
    exact = through(kind, site, wide, backend=backend)
    bands = []
    for ours, theirs in zip(made, exact, strict=True):
        own = {}
        for name, result in ours.items():
            off = _sum((result.double() - theirs[name].double()).square())
            own[name] = Band(0.0, TIMES_OWN**2 * (off + _unit(torch.bfloat16) ** 2 * _sum(result.double().square())))
        bands.append(own)
    return tuple(bands)


def _unit(dtype: torch.dtype) -> float:
    return DTYPES[dtype].high * (SUMMED if dtype == torch.float32 else 1.0)


def _squares(
    kind: Kind, site: Any, call: Call, backend: Backend, norm: RMSNorm | None, weights: Collection[str], gradients: Format | None
) -> Passed:
    """The product of the squares, of the weights that are named, with floors where the gradients' format is given.

    A norm's backward pass is taken as what it does to independent errors: each times w / rms.
    """
    x = call.x if call.normed is None else call.normed
    floors = (E4M3.floor(x), gradients.floor(_joined(call.grads))) if gradients is not None else (0.0, 0.0)
    squared = Call(
        x=_square(x, floors[0]),
        weights={
            name: _square(w, E4M3.floor(w) if gradients is not None else 0.0) * (name in weights) for name, w in call.weights.items()
        },
        grads=[_square(grad, floors[1]) for grad in call.grads],
        ends=call.ends,
    )
    passed = through(kind, site, squared, backend=backend)
    if kind == "column":  # a product that is not in FP8 gets no error from its input's either
        for store in (passed.outputs, passed.weights):
            for name in set(call.weights) - set(weights):
                store[name] = torch.zeros_like(store[name])
    if norm is None:
        return passed
    wide = call.x.float()
    scale = wide.square().mean(-1, keepdim=True).add(norm.eps).rsqrt()
    error = passed.inputs[""].float()
    of_weight = total((error * (wide * scale).square()).flatten(0, -2).sum(0), norm.tp)
    return Passed(passed.outputs, {"": error * (scale * norm.weight.float()).square()}, {**passed.weights, "norm": of_weight})


def _of_gain(call: Call, gradients: Mapping[str, Tensor], norm: RMSNorm, quantised: Collection[str]) -> float:
    """What errors of weights, each the same for all tokens, come to in the gradient of a norm's gain: sum_n (w_nk dW_nk / gain_k)^2."""
    shares = sum((call.weights[name].double() * gradients[name].double()).square().sum(0) for name in quantised)
    return _sum(total(shares / norm.weight.double().square(), norm.tp)) if quantised else 0.0


def _square(x: Tensor, floor: float) -> Tensor:
    return (x.float().square() + floor).to(x.dtype)


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _sum(x: Tensor) -> float:
    return x.double().sum().item()
