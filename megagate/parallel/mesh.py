"""The grid of ranks: dense layers read it as data x tensor, experts read the same ranks as expert-data x expert."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megagate.parallel.traffic import Traffic

Table = list[list[int]]


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as one rank sees it.

    Args:
        name: `tp`, `dp`, `ep`, `edp` or `world`.
        ranks: Global ranks of this rank's group, in order.
        rank: Position of this rank in `ranks`.
        group: The process group; None when the axis has size 1, where every collective returns its input.
        traffic: Counts what this rank sends, where there is one.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: dist.ProcessGroup | None = None
    traffic: Traffic | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.ranks)


def grid(world_size: int, *, tp: int, ep: int) -> dict[str, Table]:
    """Every group of every axis as a pure table of global ranks.

    `dense[d][t] = d * tp + t`; experts fold over both axes: `expert[i][j] = i * ep + j`, so that an expert group is `ep`
    neighbouring ranks and may span tensor-parallel ranks.

    Args:
        world_size: Number of ranks; a multiple of `tp` and of `ep`.
        tp: Tensor-parallel size.
        ep: Expert-parallel size.

    Raises:
        ValueError: A size does not divide the world (`config/rules.py` reports this to users).
    """
    for name, size in (("tp", tp), ("ep", ep)):
        if size < 1 or world_size % size:
            raise ValueError(f"{name} ({size}) must divide the world size ({world_size})")
    world = list(range(world_size))
    return {
        "tp": _rows(world, tp),
        "dp": _columns(world, tp),
        "ep": _rows(world, ep),
        "edp": _columns(world, ep),
        "world": [world],
    }


def _rows(world: Sequence[int], width: int) -> Table:
    return [list(world[i : i + width]) for i in range(0, len(world), width)]


def _columns(world: Sequence[int], width: int) -> Table:
    return [list(world[i::width]) for i in range(width)]


@dataclass(frozen=True)
class ParallelMesh:
    """The five axes of one rank. Passed down through constructors, never looked up.

    `tp` and `dp` shard dense layers, `ep` and `edp` experts; `world` is all ranks. Under sequence parallelism every rank of the
    world owns distinct tokens.
    """

    tp: Axis
    dp: Axis
    ep: Axis
    edp: Axis
    world: Axis

    @classmethod
    def single(cls, *, traffic: Traffic | None = None) -> "ParallelMesh":
        """The mesh of one process without a process group."""
        return cls(**{name: Axis(name, traffic=traffic) for name in ("tp", "dp", "ep", "edp", "world")})

    @classmethod
    def build(cls, *, tp: int, ep: int, timeout: timedelta | None = None, traffic: Traffic | None = None) -> "ParallelMesh":
        """Make the groups of the default process group's world. Collective: every rank calls it with the same arguments.

        Args:
            tp: Tensor-parallel size.
            ep: Expert-parallel size.
            timeout: Of each group's collectives; None is the backend's default.
            traffic: Counts what this rank sends on all axes; None counts nothing.
        """
        me, made = dist.get_rank(), {tuple(range(dist.get_world_size())): dist.group.WORLD}
        axes = {}
        for name, table in grid(dist.get_world_size(), tp=tp, ep=ep).items():
            for ranks in map(tuple, table):
                # Equal groups are made once: a communicator costs memory on GPUs. All ranks make all groups, in the same order.
                if len(ranks) > 1 and ranks not in made:
                    made[ranks] = dist.new_group(list(ranks), timeout=timeout)
                if me in ranks:
                    group = made[ranks] if len(ranks) > 1 else None
                    axes[name] = Axis(name, ranks, ranks.index(me), group, traffic)
        return cls(**axes)
