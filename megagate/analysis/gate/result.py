"""What an analysis finds: the figures of several models on the same text."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import exp, inf, isfinite, isnan, nan, sqrt
from statistics import fmean
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megagate.probe.figures import GateFigures, LayerFigures

AttentionMap = tuple[tuple[float, ...], ...]
"""[queries][keys], averaged over heads."""


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Every property is a mean over layers, each counting alike, where not said otherwise; those of the gate are None where no layer scores.

    Args:
        name: As the user calls it.
        path: Where it lies.
        kind: What lies there, in words.
        gate: Its gate, in words.
        parameters: How many it has.
        loss: Mean cross-entropy over the targets, nats.
        targets: Tokens that were predicted.
        layers: The figures of each.
        maps: Of chosen layers, counted from 0: attention of the first tokens of the first sequence, averaged over heads.
        map_tokens: Those tokens, as text.
    """

    name: str
    path: str
    kind: str
    gate: str
    parameters: int
    loss: float
    targets: int
    layers: tuple[LayerFigures, ...]
    maps: Mapping[int, AttentionMap]
    map_tokens: tuple[str, ...]

    @property
    def ppl(self) -> float:
        """Perplexity, exp(loss); infinite beyond what a number can be."""
        try:
            return exp(self.loss)
        except OverflowError:
            return inf

    @property
    def gate_mean(self) -> float | None:
        """Mean gate score."""
        return self._of_gates(lambda gate: gate.mean)

    @property
    def gate_std(self) -> float | None:
        """Standard deviation of all gate scores of all layers, about their common mean."""
        squares = self._of_gates(lambda gate: gate.std**2 + gate.mean**2)
        # nan first: of nan and a number, max gives the first.
        return None if squares is None else sqrt(max(squares - self.gate_mean**2, 0.0))

    @property
    def gate_below_01(self) -> float | None:
        """Share of gate scores below 0.1; nan where scores are nan, which are below nothing."""
        return self._of_gates(lambda gate: nan if isnan(gate.mean) else gate.below_01)

    @property
    def gate_below_05(self) -> float | None:
        """Share of gate scores below 0.5; nan likewise."""
        return self._of_gates(lambda gate: nan if isnan(gate.mean) else gate.below_05)

    @property
    def m_act(self) -> float:
        """The largest absolute hidden state of each sequence, averaged over sequences and layers."""
        return fmean(layer.hidden.mean_max_abs for layer in self.layers)

    @property
    def m_act_max(self) -> float:
        """The largest absolute hidden state of all."""
        return max(layer.hidden.max_abs for layer in self.layers)

    @property
    def f_attn(self) -> float:
        """Share of attention on the first token, averaged over layers, heads and queries; with query 0, as in the paper."""
        return fmean(layer.attention.first_token_with_0 for layer in self.layers)

    @property
    def f_attn_without_0(self) -> float:
        """The same without query 0, which sees nothing but itself."""
        return fmean(layer.attention.first_token for layer in self.layers)

    @property
    def uniform(self) -> float:
        """What `f_attn` were if every query attended to all its keys alike."""
        return fmean(layer.attention.uniform_with_0 for layer in self.layers)

    def _of_gates(self, figure: Callable[[GateFigures], float]) -> float | None:
        found = [figure(layer.gate) for layer in self.layers if layer.gate is not None]
        return fmean(found) if found else None


@dataclass(frozen=True)
class Analysis:
    """Several models on the same text.

    Args:
        models: In the order in which they were named.
        data: What was read, in words.
        sequences: How many.
        seq_len: Tokens of each.
        dtype: In which it was computed.
        device: On which.
    """

    models: tuple[ModelResult, ...]
    data: str
    sequences: int
    seq_len: int
    dtype: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """As values of JSON: `from_json` gives the same back. Numbers that are not finite are told in words, since JSON has none."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Analysis":
        """What `to_json` gave."""
        return _made(cls, value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _made(kind: Any, value: Any) -> Any:
    """A value of a type that a field here may have."""
    if get_origin(kind) is UnionType:
        return None if value is None else _made(get_args(kind)[0], value)
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{field.name: _made(kinds[field.name], value[field.name]) for field in fields(kind)})
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = (kinds[0],) * len(value) if kinds[-1] is ... else kinds
        return tuple(_made(one, part) for one, part in zip(kinds, value, strict=True))
    if get_origin(kind) is Mapping:
        key, item = get_args(kind)
        return {key(name): _made(item, one) for name, one in value.items()}
    return kind(value)
