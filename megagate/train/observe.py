"""What the records say of the gate, attention, hidden states, experts and gradients: one more forward pass, now and then."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from megagate.config.run import RunConfig
from megagate.engine.base import Engine, StepDetail
from megagate.probe.figures import LayerFigures
from megagate.probe.look import look
from megagate.train.metrics import Record


class Observer:
    """Looks at the model before the steps that `observe.every` names; what it finds goes into their records.

    A look is a validation's forward pass of the step's first micro-batch with the weights that the step begins with, without gradients:
    neither parameters, the optimizer, random numbers nor what FP8's scaling keeps notice it.

    Args:
        config: The run.
        engine: Its engine.
    """

    def __init__(self, config: RunConfig, engine: Engine):
        self.config, self.engine = config, engine

    def due(self, step: int) -> bool:
        """Whether this step, counted from 1, is one to look at."""
        every = self.config.observe.every
        return every > 0 and step % every == 0

    def look(self, tokens: Tensor, labels: Tensor) -> Record:
        """The fields of what one forward pass shows, and `observe_seconds`, what it took. Collective.

        Shapes: tokens and labels [b, s], a micro-batch of this data-parallel rank.
        """
        began, engine = time.perf_counter(), self.engine
        found = look(engine.model, lambda: engine.evaluate([(tokens, labels)]), queries=self.config.observe.queries)
        return figure_fields(found) | {"observe_seconds": time.perf_counter() - began}

    def detail_fields(self, detail: StepDetail) -> Record:
        """The fields of what the step itself told."""
        model = self.config.model
        layers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
        loads = load_fields(dict(zip(layers, detail.counts, strict=True)))
        return loads | {f"grad_norm/{part}": norm for part, norm in detail.norms.items()}


class _Field(NamedTuple):
    """A key of the record.

    Args:
        of_layer: Its value in a layer; None where the layer has none.
        joined: Its value in the model, from those of the layers that have one.
    """

    of_layer: Callable[[LayerFigures], float | None]
    joined: Callable[[Sequence[float]], float]


def _nan_as_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _largest(values: Sequence[float]) -> float:
    return max(values, key=_nan_as_largest)


_FIELDS: Mapping[str, _Field] = {
    "gate_mean": _Field(lambda layer: layer.gate and layer.gate.mean, fmean),
    "gate_below_0.1": _Field(lambda layer: layer.gate and layer.gate.below_01, fmean),
    "gate_dead_heads": _Field(lambda layer: layer.gate and layer.gate.dead_heads, sum),
    "gate_saturated_heads": _Field(lambda layer: layer.gate and layer.gate.saturated_heads, sum),
    "first_token_attention": _Field(lambda layer: layer.attention.first_token, fmean),
    "uniform_attention": _Field(lambda layer: layer.attention.uniform, fmean),
    "attention_logit_max": _Field(lambda layer: layer.attention.max_logit, _largest),
    "hidden_max": _Field(lambda layer: layer.hidden.max_abs, _largest),
    "router_entropy": _Field(lambda layer: layer.router and layer.router.entropy, fmean),
}
"""What is recorded of a forward pass, but for `hidden_max_channel`; definitions stand at the figures."""


def figure_fields(figures: Mapping[int, LayerFigures]) -> Record:
    """`KEY` of the model, and `KEY/LAYER` of each of its layers that has it, by layers counted from 0."""
    record: Record = {}
    for key, field in _FIELDS.items():
        values = {layer: field.of_layer(one) for layer, one in figures.items()}
        record |= _of_layers(key, {layer: value for layer, value in values.items() if value is not None}, field.joined)
    channels = {layer: one.hidden.channel for layer, one in figures.items()}
    widest = max(figures, key=lambda layer: _nan_as_largest(figures[layer].hidden.max_abs))
    return record | _of_layers("hidden_max_channel", channels, lambda _: channels[widest])


def load_fields(counts: Mapping[int, Sequence[float]]) -> Record:
    """Rows of the fullest and of the emptiest expert of a step, over the mean of its layer's experts.

    Args:
        counts: Rows of each expert, by layer.
    """
    loads = {layer: [rows * len(of_layer) / sum(of_layer) for rows in of_layer] for layer, of_layer in counts.items()}
    fullest = _of_layers("expert_load_max", {layer: max(load) for layer, load in loads.items()}, max)
    return fullest | _of_layers("expert_load_min", {layer: min(load) for layer, load in loads.items()}, min)


def _of_layers(key: str, values: Mapping[int, float], joined: Callable[[Sequence[float]], float]) -> Record:
    if not values:
        return {}
    return {key: joined(list(values.values()))} | {f"{key}/{layer}": value for layer, value in values.items()}
