"""What the tests of FP8 under layouts share: models whose shards are whole blocks, a smooth rounding, a reference that quantises pieces."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from megagate.backend.base import ColumnLinears, GroupedLinear, Norm, Part, Permuted, RowLinear
from megagate.backend.fp8 import backend, operand
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.fp8.extent import Grouped
from megagate.backend.fp8.product import Fp8Product
from megagate.backend.fp8.quantize import BLOCK, MX_BLOCK, Quantized, Tile, by_tiles, from_tiles, largest, scale_of, to_tiles
from megagate.backend.native import NativeBackend
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import Fp8Config
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import Axis, ParallelMesh

CPU = torch.device("cpu")


def model_of(unit: int, *, heads: int = 4, kv_heads: int = 4) -> ModelConfig:
    """A dense model each of whose shards over up to `heads` tensor-parallel ranks is a multiple of `unit`."""
    return ModelConfig(
        vocab_size=250,
        hidden_size=max(64, unit),
        num_layers=2,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=unit, gate=GateConfig("G1", "elementwise")),
        ffn_size=unit * heads,
    )


def mixture_of(unit: int, **sizes: int) -> ModelConfig:
    """The same with experts, and a shared one."""
    model = model_of(unit, **sizes)
    moe = MoEConfig(num_experts=4, top_k=2, ffn_size=unit, shared_ffn_size=model.ffn_size, balance_coef=0.1, z_loss_coef=0.01)
    return replace(model, ffn_size=0, moe=moe)


MODELS = {
    "fp8 dense 16": model_of(16),
    "fp8 dense 16, few kv heads": model_of(16, kv_heads=2),
    "fp8 moe 16": mixture_of(16),
    "fp8 moe 16, few kv heads": mixture_of(16, kv_heads=2),
    "fp8 dense 32": model_of(32),
    "fp8 moe 32": mixture_of(32),
    "fp8 dense 128": model_of(128, heads=2, kv_heads=2),
    "fp8 dense 128, few kv heads": model_of(128, heads=2, kv_heads=1),
    "fp8 moe 128": mixture_of(128, heads=2, kv_heads=2),
}


# ---- rounding without steps


def smooth(x: Tensor, fp8: torch.dtype) -> Tensor:
    """A stand-in for the cast: up to 12 % off, by an amount that depends on the scaled number, continuously."""
    bent = x * (1 + 0.125 * x.abs().clamp(min=1e-30).log2().sin())
    return bent.clamp(-largest(fp8), largest(fp8)).double()  # another dtype than what comes out of it, as FP8 is


def _with_scale(x: Tensor, scale: Tensor, fp8: torch.dtype) -> Quantized:
    return Quantized(smooth(x.float() * scale, fp8), scale.reciprocal())


def _by_tiles(x: Tensor, tile: Tile, *, mx: bool = False, together: Tensor | None = None) -> Quantized:
    made = by_tiles(x, tile, mx=mx, together=together)
    scaled = to_tiles(x.float(), tile) / made.inverse[..., :, None, :, None]
    return made._replace(data=from_tiles(smooth(scaled, made.data.dtype), x.shape))


@contextmanager
def smooth_rounding() -> Iterator[None]:
    """Inside the context FP8 operands have the scales that they have, and `smooth` instead of the cast."""
    with patch.object(operand, "with_scale", _with_scale), patch.object(operand, "by_tiles", _by_tiles):
        yield


# ---- mistakes


def _twice(self: operand.Delayed, amax: Tensor, *, update=operand.Delayed.update) -> None:
    update(self, amax)
    update(self, amax)


def _of_all_that_comes(*args, unit: int, own=operand.operands, **kwargs) -> dict[str, operand.Operand]:
    return own(*args, unit=1, **kwargs)


MISTAKES = {
    "scales of dp times the gradient": (backend, "operands", _of_all_that_comes),
    "scales of each rank's own amaxes": (backend, "maximum", lambda x, axis: x),
    "history that rolls twice": (operand.Delayed, "update", _twice),
    "a scale that is 10 % off": (operand, "scale_of", lambda amax, fp8: scale_of(1.1 * amax, fp8)),
    "blocks of half the size": (operand, "BLOCK", BLOCK // 2),
    "MXFP8's blocks of half the size": (operand, "MX_BLOCK", MX_BLOCK // 2),
}
"""What is replaced by what."""


# ---- one process that quantises what each rank would have


@dataclass(frozen=True)
class Partition:
    """How a layout cuts a micro-step.

    Args:
        dp: Parts of the samples.
        tp: Parts of the sequence between blocks, of column-parallel weights' rows and of row-parallel weights' columns.
        ep: Ranks that share the experts; the others hold replicas.
        seq_len: Of the samples.
    """

    dp: int
    tp: int
    ep: int
    seq_len: int

    def rank(self, token: Tensor, samples: int) -> Tensor:
        """Of the tokens of a micro-step of so many samples, counted along the sequences."""
        sample, position = token // self.seq_len, token % self.seq_len
        return sample // (samples // self.dp) * self.tp + position // (self.seq_len // self.tp)


class PartitionedBackend(EmulatedBackend):
    """One process that quantises, for each rank of a layout, what that rank would have, by itself. For recipes without state."""

    def __init__(self, config: Fp8Config, partition: Partition):
        super().__init__(NativeBackend(CPU), config, device=CPU, mesh=ParallelMesh.single())
        self.partition = partition
        self.routed: tuple[Tensor, Tensor, int] | None = None
        """Token and expert of each row of the running layer, and the micro-step's samples."""

    def column_linears(
        self, width: int, parts: Sequence[Part], *, tp: Axis, eps: float | None = None, gives_normed: bool = True
    ) -> ColumnLinears:
        return _Columns(self._operands(), [self.config.rounds(part.role) for part in parts], self.partition)

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        return _Row(self._operands(), self.partition)

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        return _Grouped(self._operands(num_experts), self)

    def permute(self, x: Tensor, probs: Tensor, ids: Tensor, *, num_experts: int) -> Permuted:
        made = super().permute(x, probs, ids, num_experts=num_experts)
        self.routed = (made.restore.token, ids.flatten().sort(stable=True).values, len(x) // self.partition.seq_len)
        return made


class _Columns(Fp8Product):
    def __init__(self, operands, rounded: list[bool], partition: Partition):
        super().__init__(operands, reduced=ParallelMesh.single().world)
        self.rounded, self.partition = rounded, partition

    def forward(self, x: Tensor, weights: Sequence[Tensor], norm: Norm | None = None) -> tuple[list[Tensor], Tensor]:
        normed = x if norm is None else norm(x)
        outputs = [None if rounded else F.linear(normed, weight) for rounded, weight in zip(self.rounded, weights, strict=True)]
        places = [i for i, rounded in enumerate(self.rounded) if rounded]
        cut = [weights[i].chunk(self.partition.tp) for i in places]
        of_samples = []
        for samples in normed.chunk(self.partition.dp):
            of_ranks = [self.multiply(samples, torch.cat(own)).split([len(w) for w in own], dim=-1) for own in zip(*cut, strict=True)]
            of_samples.append([torch.cat(parts, dim=-1) for parts in zip(*of_ranks, strict=True)])
        for i, parts in zip(places, zip(*of_samples, strict=True), strict=True):
            outputs[i] = torch.cat(parts)
        return outputs, normed


class _Row(Fp8Product):
    def __init__(self, operands, partition: Partition):
        super().__init__(operands, reduced=ParallelMesh.single().world)
        self.partition = partition

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        tp = self.partition.tp
        cut = [samples.chunk(tp, dim=-1) for samples in x.chunk(self.partition.dp)]
        return torch.cat([sum(self.multiply(part, w) for part, w in zip(parts, weight.chunk(tp, dim=1), strict=True)) for parts in cut])


class _Grouped(Fp8Product):
    def __init__(self, operands, owner: PartitionedBackend):
        super().__init__(operands, reduced=ParallelMesh.single().world)
        self.owner = owner

    def forward(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """Each replica of the experts by itself: its tokens' rows, by expert, source rank and token, padded as dispatch does."""
        partition, multiple = self.owner.partition, self.owner.row_multiple
        token, expert, samples = self.owner.routed
        rank, experts = partition.rank(token, samples), len(weight)
        position = _places(expert, ends)
        out = x.new_zeros(len(x), weight.shape[1])
        for replica in range(partition.dp * partition.tp // partition.ep):
            mine = (rank // partition.ep == replica).nonzero().flatten()
            mine = mine[torch.argsort(expert[mine] * partition.dp * partition.tp + rank[mine], stable=True)]
            padded = (torch.bincount(expert[mine], minlength=experts).clamp(min=1) + multiple - 1) // multiple * multiple
            own_ends = padded.cumsum(0)
            places = _places(expert[mine], own_ends)
            rows = x.new_zeros(int(own_ends[-1]), x.shape[1]).index_copy(0, places, x[position[mine]])
            made = self.multiply(rows, weight, Grouped(own_ends.to(torch.int32), rows=len(rows), granule=multiple))
            out = out.index_copy(0, position[mine], made[places])
        return out


def _places(expert: Tensor, ends: Tensor) -> Tensor:
    """Where rows that are sorted by expert lie among padded ones."""
    counts = torch.bincount(expert, minlength=len(ends))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]).long()
    return starts[expert] + torch.arange(len(expert)) - (counts.cumsum(0) - counts)[expert]


def repeat_kv_heads(model: LanguageModel, copies: int) -> None:
    """As with more tensor-parallel ranks than kv heads: each rank's k and v are products of their own, each gradient is rounded."""
    for block in model.layers:
        block.attention._riders = MethodType(_repeated(block.attention._riders, copies), block.attention)


def _repeated(riders, copies: int):
    def made(attention):
        groups = riders()
        for group in groups[1:3]:
            heads = group[0].weight.unflatten(0, (attention.config.num_kv_heads, -1))
            group[0] = group[0]._replace(weight=heads.repeat_interleave(copies, 0).flatten(0, 1))
        return groups

    return made
