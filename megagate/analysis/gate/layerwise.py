"""A model's forward pass with the weights of one block in memory at a time: blocks in the outer loop, sequences in the inner one."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megagate.analysis.gate.result import AttentionMap
from megagate.analysis.gate.source import Source
from megagate.analysis.gate.text import Windows
from megagate.backend.native import NativeBackend
from megagate.data.loader import IGNORE_INDEX
from megagate.model.lm import LanguageModel
from megagate.nn.loss import cross_entropy_sum
from megagate.parallel.mesh import ParallelMesh
from megagate.probe.attention import attention_rows
from megagate.probe.figures import LayerFigures
from megagate.probe.probe import Probe
from megagate.probe.taps import Look, Seen, taps

GROUP_BYTES = 1 << 30
"""Of hidden states that are kept between blocks; more sequences go in several groups, each of which reads the weights again."""

Report = Callable[[int], None]
"""Told of passes of a sequence through a block, or through the output projection."""


class Looked(NamedTuple):
    """What was seen of a model.

    Args:
        loss: Mean cross-entropy over the targets, nats.
        targets: How many there were.
        layers: The figures of each.
        maps: Of chosen layers, attention of the first tokens of the first sequence, averaged over heads.
    """

    loss: float
    targets: int
    layers: tuple[LayerFigures, ...]
    maps: Mapping[int, AttentionMap]


def passes(source: Source, windows: Windows) -> int:
    """What `look_through` reports in total."""
    return len(windows.tokens) * (source.model.num_layers + 1)


@torch.no_grad()
def look_through(
    source: Source,
    windows: Windows,
    *,
    within_documents: bool,
    device: torch.device,
    map_layers: Collection[int] = (),
    map_tokens: int = 0,
    report: Report = lambda passed: None,
    group_bytes: int = GROUP_BYTES,
) -> Looked:
    """Run a model over windows, in fp32, and measure it.

    Args:
        source: The model.
        windows: What it reads.
        within_documents: Attention stays within documents.
        device: Where it is computed.
        map_layers: Layers, counted from 0, of which attention is kept.
        map_tokens: Of how many tokens.
        report: See `Report`.
        group_bytes: See `GROUP_BYTES`.

    Raises:
        CheckpointError: The weights are damaged.
    """
    model = LanguageModel(
        source.model,
        dtype=torch.float32,
        backend=NativeBackend(device),
        mesh=ParallelMesh.single(),
        eod_id=windows.eod_id if within_documents else None,
    ).eval()
    probe, maps = Probe(source.model, model.mesh, queries=0), _Maps(map_layers, map_tokens)
    size = max(1, group_bytes // (4 * windows.tokens.shape[1] * source.model.hidden_size))
    loss = 0.0
    for first in range(0, len(windows.tokens), size):
        rows = slice(first, first + size)
        looks = [probe.look] if first else [probe.look, maps.look]
        loss += _group(model, source, windows.tokens[rows].to(device), windows.labels[rows].to(device), looks, report)
    targets = int((windows.labels != IGNORE_INDEX).sum())
    figures = probe.close()
    return Looked(loss / targets, targets, tuple(figures[layer] for layer in range(source.model.num_layers)), maps.found)


def _group(model: LanguageModel, source: Source, tokens: Tensor, labels: Tensor, looks: list[Look], report: Report) -> float:
    """The summed cross-entropy of some sequences, [sequences, s]."""
    device = tokens.device

    def look(layer: int, seen: Seen) -> None:
        for one in looks:
            one(layer, seen)

    with _held(model.embedding, source, "embedding.", device):
        hidden = [model.embedding(row) for row in tokens.split(1)]  # [1, s, h] each
    for number, block in enumerate(model.layers):
        with _held(block, source, f"layers.{number}.", device), taps({number: block}, look):
            for place, row in enumerate(tokens.split(1)):
                hidden[place] = block(hidden[place], *model.places(row))[0]
                report(1)
    total = 0.0
    last, part = (model.embedding, "embedding.") if model.config.tie_embeddings else (model.head, "head.")
    with _held(model.final_norm, source, "final_norm.", device), _held(last, source, part, device):
        for row, x in zip(labels.split(1), hidden, strict=True):
            normed = model.final_norm(x)
            total += float(
                cross_entropy_sum(normed, model.output_weight, row, vocab_size=model.config.vocab_size, tp=model.mesh.tp)
            )
            report(1)
    return total


@contextmanager
def _held(module: nn.Module, source: Source, prefix: str, device: torch.device) -> Iterator[None]:
    """In the block a part of the model has its weights."""
    weights = source.read(prefix)
    # One by one, so that a device need not hold them twice, nor the host while the device does.
    module.load_state_dict({name: weights.pop(name).to(device) for name in list(weights)}, assign=True)
    try:
        yield
    finally:
        module.to("meta")


class _Maps:
    """Attention between the first tokens of the first sequence that each layer shows, averaged over heads.

    Args:
        layers: Of which.
        count: How many tokens.
    """

    def __init__(self, layers: Collection[int], count: int):
        self._layers, self._count = layers, count
        self.found: dict[int, AttentionMap] = {}

    def look(self, layer: int, seen: Seen) -> None:
        """See `Look`."""
        if layer not in self._layers or layer in self.found or not self._count:
            return
        count = min(self._count, seen.q.shape[1])
        rows = torch.arange(count, device=seen.q.device)
        attention = attention_rows(seen.q, seen.k, rows, seen.documents)[0, :, :, :count].mean(0)
        self.found[layer] = tuple(tuple(row) for row in attention.tolist())
