"""From forward passes to `LayerFigures`: sums on every rank, joined once."""

from collections.abc import Sequence
from math import nan, sqrt

import torch
from torch import Tensor

from megagate.config.model import ModelConfig
from megagate.parallel.comm import maximum, total
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.probe.attention import row_sums
from megagate.probe.figures import GATE_BINS, AttentionFigures, GateFigures, HiddenFigures, LayerFigures, OutputFigures, RouterFigures
from megagate.probe.sums import Fields, entropy_sum, gate_sums, largest, output_sums
from megagate.probe.taps import Seen

DEAD, SATURATED = 0.01, 0.99
"""A head whose mean score is below the one is dead, above the other saturated."""


class Probe:
    """Sums over what forward passes show; `look` is a `Look`, `close` gives the figures.

    `look` neither sends anything nor waits for a device: sums are of fp64, maxima as they are, on the device of the hidden states.

    Parallel: sums go over the world, maxima of channels and logits too, those of sequences, which are cut over tp, over tp. What several
        tp ranks have alike (shared scores, key/value heads where there are more tp ranks than those) is counted by one of them.

    Args:
        model: The model's config.
        mesh: Its layout.
        queries: Rows of attention that are looked at in each sequence, at (i + 1) * s // queries - 1; 0 is all.
        layers: The blocks that are looked at, counted from 0; None is all.
    """

    def __init__(self, model: ModelConfig, mesh: ParallelMesh, *, queries: int = 0, layers: Sequence[int] | None = None):
        self.model, self.mesh, self.queries = model, mesh, queries
        self.layers = tuple(range(model.num_layers) if layers is None else layers)
        self.gate_heads = _GateHeads(model, mesh.tp)
        self.fields = Fields(
            {
                "gate_heads": self.gate_heads.total,
                "gate_count": 1,
                "gate_squares": 1,
                "gate_below_01": 1,
                "gate_below_05": 1,
                "gate_histogram": GATE_BINS,
                "first": 1,
                "first_with_0": 1,
                "uniform": 1,
                "uniform_with_0": 1,
                "rows": 1,
                "rows_with_0": 1,
                "output_count": 1,
                "output_abs": 2,
                "output_below_001": 2,
                "output_below_0001": 2,
                "sequences": 1,
                "sequence_maxima": 1,
                "tokens": 1,
                "entropy": 1,
                "hidden_is_nan": 1,
                "logit_is_nan": 1,
            }
        )
        self._sums: dict[int, Tensor] = {}
        self._maxima: dict[int, Tensor] = {}  # of each channel, then of the logits
        self._sequences: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    def look(self, layer: int, seen: Seen) -> None:
        """Add what a block's forward pass showed.

        Raises:
            ValueError: A layer that is none of this probe's.
        """
        if layer not in self._sequences:
            raise ValueError(f"block {layer} is none of {list(self.layers)}, which this probe looks at")
        device = seen.hidden.device
        of_sequences, of_channels = largest(seen.hidden)
        rows = row_sums(seen.q, seen.k, self.queries, seen.documents)
        values = rows._asdict()
        max_logit = values.pop("max_logit").double()
        values |= output_sums(seen.attended, seen.projected)
        values |= self._gate_values(seen.scores)
        values |= {"hidden_is_nan": of_channels.isnan().any(), "logit_is_nan": max_logit.isnan()}
        counts = {"output_count": seen.attended.numel()}
        if seen.shares is not None:
            values["entropy"] = entropy_sum(seen.shares)
            counts["tokens"] = seen.shares[..., 0].numel()
        values |= {name: torch.full((), count, dtype=torch.float64, device=device) for name, count in counts.items()}
        # A maximum over ranks must not meet nan, of which it makes anything; that there was one goes with the sums.
        maxima = torch.cat([of_channels, max_logit.reshape(1)]).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        sums = self.fields.join(values, device)
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums
        self._maxima[layer] = torch.maximum(self._maxima[layer], maxima) if layer in self._maxima else maxima
        self._sequences[layer].append(of_sequences)

    def close(self) -> dict[int, LayerFigures]:
        """The figures of every layer, over all ranks' sequences. Collective, and it waits for the device: three messages for all layers.

        Raises:
            ValueError: A layer of which no forward pass was seen.
        """
        if missing := [layer for layer in self.layers if layer not in self._sums]:
            raise ValueError(f"no forward pass of blocks {missing} was seen; run the model inside `taps` before closing")
        of_sequences = self._of_sequences()
        sums = total(torch.stack([self._sums[layer] + of_sequences[layer] for layer in self.layers]), self.mesh.world)
        maxima = maximum(torch.stack([self._maxima[layer] for layer in self.layers]), self.mesh.world).cpu()
        return {
            layer: self._figures(self.fields.split(of_layer), of_maxima)
            for layer, of_layer, of_maxima in zip(self.layers, sums.cpu(), maxima, strict=True)
        }

    def _gate_values(self, scores: Tensor | None) -> dict[str, Tensor]:
        heads = self.gate_heads
        if scores is None or not heads.counts:
            return {}
        values = gate_sums(scores)
        of_all = values["gate_heads"].new_zeros(heads.total)
        of_all[heads.first : heads.first + scores.shape[2]] = values["gate_heads"]
        return values | {"gate_heads": of_all, "gate_count": of_all.new_full((), scores.numel())}

    def _of_sequences(self) -> dict[int, Tensor]:
        """The sum of each layer's maxima of sequences and their number, the same on all tp ranks, where the tokens of a sequence lie."""
        joined = {layer: torch.cat(maxima) for layer, maxima in self._sequences.items()}
        over_tp = maximum(torch.cat([joined[layer] for layer in self.layers]), self.mesh.tp)
        parts = over_tp.split([len(joined[layer]) for layer in self.layers])
        return {
            layer: self.fields.join({"sequence_maxima": part.sum(), "sequences": part.new_full((), len(part))}, part.device)
            for layer, part in zip(self.layers, parts, strict=True)
        }

    def _figures(self, sums: dict[str, list[float]], maxima: Tensor) -> LayerFigures:
        one = {name: values[0] for name, values in sums.items() if values}
        channels = maxima[:-1]
        channel = int(channels.argmax())
        outputs = (sums[name] for name in ("output_abs", "output_below_001", "output_below_0001"))
        return LayerFigures(
            gate=self._gate_figures(sums) if one.get("gate_count") else None,
            attention=AttentionFigures(
                first_token=_share(one["first"], one["rows"]),
                first_token_with_0=_share(one["first_with_0"], one["rows_with_0"]),
                uniform=_share(one["uniform"], one["rows"]),
                uniform_with_0=_share(one["uniform_with_0"], one["rows_with_0"]),
                max_logit=nan if one["logit_is_nan"] else float(maxima[-1]),
                rows=round(one["rows_with_0"]),
            ),
            hidden=HiddenFigures(
                max_abs=nan if one["hidden_is_nan"] else float(channels[channel]),
                channel=channel,
                mean_max_abs=nan if one["hidden_is_nan"] else _share(one["sequence_maxima"], one["sequences"]),
            ),
            output=OutputFigures(*(tuple(_share(value, one["output_count"]) for value in pair) for pair in outputs)),
            router=RouterFigures(_share(one["entropy"], one["tokens"])) if one["tokens"] else None,
        )

    def _gate_figures(self, sums: dict[str, list[float]]) -> GateFigures:
        count = sums["gate_count"][0]
        mean = sum(sums["gate_heads"]) / count
        head_means = tuple(value * self.gate_heads.total / count for value in sums["gate_heads"])
        return GateFigures(
            mean=mean,
            std=sqrt(max(sums["gate_squares"][0] / count - mean**2, 0.0)),
            below_01=sums["gate_below_01"][0] / count,
            below_05=sums["gate_below_05"][0] / count,
            head_means=head_means,
            dead_heads=sum(value < DEAD for value in head_means),
            saturated_heads=sum(value > SATURATED for value in head_means),
            histogram=tuple(round(value) for value in sums["gate_histogram"]),
        )


class _GateHeads:
    """Which heads' scores a tp rank has, and whether it is the one that counts them.

    Args:
        model: Its gate.
        tp: The tensor axis.
    """

    def __init__(self, model: ModelConfig, tp: Axis):
        gate, heads = model.attention.gate, model.gate_scores[0]
        if gate.head_shared and heads:
            self.total, self.first, self.counts = 1, 0, tp.rank == 0
        elif gate.position == "G5":  # of this rank's own tokens
            self.total, self.first, self.counts = heads, 0, True
        else:
            self.total, self.first = heads, tp.rank * heads // tp.size
            self.counts = tp.rank * heads % tp.size == 0 if heads < tp.size else True


def _share(value: float, count: float) -> float:
    return value / count if count else nan
