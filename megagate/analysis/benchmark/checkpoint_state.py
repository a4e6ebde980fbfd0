"""How a model's state is cut over the ranks of a layout: what the rows of checkpoints save and load, without a model or an engine.

Parameters are cut as layers cut them: projections by rows or by columns over tp, experts over ep, norms and routers not at all. Ranks that
hold alike then share it as ZeRO has them: at stage 1 each takes one range of all parameters laid end to end, at stage 3 a range of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from megagate.checkpoint.box import Box, Shape
from megagate.parallel.mesh import grid

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""Logical tensors of each parameter."""
_BY_COLUMNS = (".o.weight", ".down.weight")


@dataclass(frozen=True)
class Layout:
    """Ranks and the sizes of their axes."""

    world_size: int
    tp: int = 1
    ep: int = 1
    zero_stage: int = 1


@dataclass(frozen=True)
class Cut:
    """What one rank holds of a parameter: the elements [start, stop) of `shard`, a box of the full shape, in row-major order."""

    name: str
    full_shape: Shape
    shard: Box
    start: int
    stop: int


def cut(shapes: Mapping[str, Shape], layout: Layout) -> list[list[Cut]]:
    """What each rank holds of the parameters of these full shapes; together each element once.

    Raises:
        ValueError: tp or ep does not divide a dim that it cuts.
    """
    table = grid(layout.world_size, tp=layout.tp, ep=layout.ep)
    experts = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    dense = {name: shape for name, shape in shapes.items() if len(shape) != 3}
    ranks: list[list[Cut]] = [[] for _ in range(layout.world_size)]
    for parameters, groups in ((dense, table["dp"]), (experts, table["edp"])):
        for part, group in enumerate(groups):
            shards = [(name, shape, _shard(name, shape, part, len(groups))) for name, shape in parameters.items()]
            for one in _ranges(shards, len(group)) if layout.zero_stage < 3 else _each(shards, len(group)):
                owner, piece, replicated = one
                if not replicated or part == 0:  # the first of several tp ranks gives what they all hold
                    ranks[group[owner]].append(piece)
    return ranks


def _shard(name: str, shape: Shape, part: int, parts: int) -> Box:
    dim = _dim(name, shape)
    if dim is None:
        return Box((0,) * len(shape), shape)
    if shape[dim] % parts:
        raise ValueError(f"{name}: dim {dim} of {shape} cannot be cut in {parts}")
    size = shape[dim] // parts
    return Box(tuple(part * size * (d == dim) for d in range(len(shape))), (*shape[:dim], size, *shape[dim + 1 :]))


def _dim(name: str, shape: Shape) -> int | None:
    """The dim that is cut; None for what every rank has whole."""
    if len(shape) < 2 or "router" in name or shape[0] == 1:
        return None
    return 1 if name.endswith(_BY_COLUMNS) else 0


def _each(shards: Sequence[tuple[str, Shape, Box]], owners: int) -> Iterator[tuple[int, Cut, bool]]:
    """(owner, cut, whether all parts hold it) with every shard cut evenly over all owners."""
    for name, shape, shard in shards:
        places = [shard.volume * i // owners for i in range(owners + 1)]
        for owner in range(owners):
            if places[owner] < places[owner + 1]:
                yield owner, Cut(name, shape, shard, places[owner], places[owner + 1]), shard.shape == shape


def _ranges(shards: Sequence[tuple[str, Shape, Box]], owners: int) -> Iterator[tuple[int, Cut, bool]]:
    """(owner, cut, whether all parts hold it) with all shards laid end to end, and that cut evenly over the owners."""
    total = sum(shard.volume for _, _, shard in shards)
    borders = [total * i // owners for i in range(1, owners + 1)]
    owner, position = 0, 0
    for name, shape, shard in shards:
        start = 0
        while start < shard.volume:
            while borders[owner] <= position + start:
                owner += 1
            stop = min(shard.volume, borders[owner] - position)
            yield owner, Cut(name, shape, shard, start, stop), shard.shape == shape and prod(shape) > 0
            start = stop
        position += shard.volume


def made_up_shapes(megabytes: float) -> dict[str, Shape]:
    """Parameters of a mixture of experts whose masters and moments in fp32 take about so many MB of 10^6 bytes (0.8 at least)."""
    hidden = max(1, round((megabytes * 1e6 / (4 * len(KINDS)) / 68) ** 0.5 / 32)) * 32
    shapes: dict[str, Shape] = {"embedding.weight": (4 * hidden, hidden)}
    for layer in range(4):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}attention.{name}.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}attention_norm.weight": (hidden,), f"{prefix}moe.router.weight": (8, hidden)}
        shapes |= {f"{prefix}moe.experts.gate_up": (8, hidden, hidden), f"{prefix}moe.experts.down": (8, hidden, hidden // 2)}
    return shapes
