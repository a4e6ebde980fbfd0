"""Faults of kernels and scales, put around products on purpose, to see that the doctor finds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagate.config.run import Fp8Config, RunConfig
from megagate.errors import ConfigError
from megagate.model.lm import LanguageModel
from megagate.nn.attention import GatedAttention
from megagate.nn.moe.experts import Experts
from megagate.parallel.comm import leave


@dataclass(frozen=True)
class PrecisionFault:
    """One fault.

    Args:
        text: What is wrong.
        inject: Puts it into a model; also given what of it is kept out of FP8.
        needs: Of the run, with its words.
    """

    text: str
    inject: Callable[[LanguageModel, Fp8Config], None]
    needs: str = ""


def check_precision_fault(name: str, config: RunConfig, recipes: tuple[str, ...], *, world_size: int) -> None:
    """Refuse a fault that could not show.

    Args:
        name: Of the fault.
        config: The shrunken run.
        recipes: It is shown in these.
        world_size: Number of ranks.

    Raises:
        ConfigError: There is no such fault, or it cannot show in this run.
    """
    if name not in PRECISION_FAULTS:
        raise ConfigError(f"--fault {name} is not one of {', '.join(PRECISION_FAULTS)}; choose one of these")
    model, ep = config.model, config.parallel.ep
    kept = not config.precision.fp8.rounds("gate")
    fits = {
        "": True,
        "a mixture of experts, at least 2 of them on a rank": model.is_moe and model.moe.num_experts // ep > 1,
        "a recipe in FP8": recipes != ("bf16",),
        "an elementwise gate of the input at G1 to G4, kept in high precision": model.attention.gate.rides and kept,
    }
    if not fits[PRECISION_FAULTS[name].needs]:
        raise ConfigError(f"--fault {name} needs {PRECISION_FAULTS[name].needs}; choose another fault, or another run")


def inject_precision_fault(name: str, model: LanguageModel, fp8: Fp8Config) -> None:
    """Put the named fault into the model."""
    PRECISION_FAULTS[name].inject(model, fp8)


def _replace(module: nn.Module, name: str, site: Any) -> None:
    """Put something else, which may be no module, in the place of a site."""
    delattr(module, name)
    object.__setattr__(module, name, site)


def _attention(model: LanguageModel, fp8: Fp8Config) -> GatedAttention:
    """Of the last block in FP8; without any, of the last."""
    layers = len(model.layers)
    return model.layers[max((i for i in range(layers) if not fp8.keeps_block(i, layers)), default=-1)].attention


def _as_if(value: Tensor, source: Tensor) -> Tensor:
    """`value`, with the gradient of `source`."""
    return source + (value - source).detach()


def _weight_scale_off_by_two(model: LanguageModel, fp8: Fp8Config) -> None:
    attention = _attention(model, fp8)
    site = attention.out
    _replace(attention, "out", lambda x, weight: site(x, _as_if(2 * weight, weight)))


def _dgrad_of_wrong_operand(model: LanguageModel, fp8: Fp8Config) -> None:
    attention = _attention(model, fp8)
    site = attention.out

    def product(x: Tensor, weight: Tensor) -> Tensor:
        turned = weight.detach().t().reshape(weight.shape)  # the transposed copy, read as if it were none
        back = site(x, turned)
        return site(x.detach(), weight) + (back - back.detach())

    _replace(attention, "out", product)


def _wgrad_of_stale_input(model: LanguageModel, fp8: Fp8Config) -> None:
    attention = _attention(model, fp8)
    site = attention.out

    def product(x: Tensor, weight: Tensor) -> Tensor:
        stale = site(x.detach().roll(1, 1), weight)
        return site(x, weight.detach()) + (stale - stale.detach())

    _replace(attention, "out", product)


def _gate_in_fp8(model: LanguageModel, fp8: Fp8Config) -> None:
    attention = _attention(model, fp8)
    site, place = attention.project, [rider.name for group in attention._riders() for rider in group].index("gate")

    def products(x: Tensor, weights: list[Tensor], norm: Any = None) -> Any:
        rounded = list(weights)
        rounded[place] = _as_if(_rounded(weights[place]), weights[place])
        return site(x, rounded, norm)

    _replace(attention, "project", products)


def _rounded(x: Tensor) -> Tensor:
    """To e4m3 and back, as current scaling does it."""
    fp8 = torch.float8_e4m3fn
    scale = torch.finfo(fp8).max / x.abs().max()
    return ((x * scale).to(fp8).to(x.dtype) / scale).to(x.dtype)


def _experts(model: LanguageModel) -> Experts:
    return next(block.moe.experts for block in model.layers if block.is_moe)


def _scale_of_another_expert(model: LanguageModel, fp8: Fp8Config) -> None:
    experts = _experts(model)
    site = experts.project

    def products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        amax = weight.detach().abs().amax((1, 2))
        factor = amax.roll(1) / amax
        factor[1:] = 1.0  # of the first only
        return site(x, _as_if(weight * factor.view(-1, 1, 1), weight), ends)

    _replace(experts, "project", products)


def _not_in_fp8(model: LanguageModel, fp8: Fp8Config) -> None:
    attention = _attention(model, fp8)
    _replace(attention, "out", lambda x, weight: leave(F.linear(x, weight), attention.tp, dim=1))


PRECISION_FAULTS: Mapping[str, PrecisionFault] = MappingProxyType(
    {
        "weight-scale-off-by-two": PrecisionFault("a weight is used with twice its scale", _weight_scale_off_by_two),
        "dgrad-of-wrong-operand": PrecisionFault("the gradient of an input is made with a wrongly turned weight", _dgrad_of_wrong_operand),
        "wgrad-of-stale-input": PrecisionFault("the gradient of a weight is made with the inputs of other tokens", _wgrad_of_stale_input),
        "gate-in-fp8": PrecisionFault(
            "a gate that is kept in high precision is rounded to FP8",
            _gate_in_fp8,
            "an elementwise gate of the input at G1 to G4, kept in high precision",
        ),
        "scale-of-another-expert": PrecisionFault(
            "an expert gets another's scale",
            _scale_of_another_expert,
            "a mixture of experts, at least 2 of them on a rank",
        ),
        "not-in-fp8": PrecisionFault("a product that should be in FP8 is not", _not_in_fp8, "a recipe in FP8"),
    }
)
