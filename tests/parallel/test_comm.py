"""Tensor collectives: values, gradients as adjoints, untouched inputs, and nothing at all on an axis of size 1."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from megagate.parallel import comm
from megagate.parallel.mesh import Axis, ParallelMesh
from megagate.parallel.spawn import RankContext, RankError

# (world size, tp, axis): whole worlds, neighbours, strided ranks, and an axis of size 1 in a larger world
AXES = [(1, 1, "tp"), (2, 2, "tp"), (2, 1, "tp"), (2, 1, "dp"), (4, 4, "tp"), (4, 2, "tp"), (4, 2, "dp")]
SHAPE = (4, 8, 12)
DIMS = (0, 1, 2, -1, -2)
COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "all_gather_object",
    "barrier",
)
over_axes = pytest.mark.parametrize(("world_size", "tp", "name"), AXES)


# ---- functions that run in ranks


def numbers(rank: int, shape: tuple[int, ...], *, salt: int = 0, strided: bool = False) -> Tensor:
    """Of one rank; whether strided or not, the same values."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * salt + rank))
    return values.transpose(0, -1).contiguous().transpose(0, -1) if strided else values


def apply(axis: Axis, function: Callable[[Tensor], Tensor], x: Tensor, seed: int) -> dict[str, Tensor]:
    """Forward and backward, with inputs that must stay as they are; `y` is the gradient that comes in."""
    kept = x.clone()
    x.requires_grad_()
    out = function(x)
    y = numbers(seed, tuple(out.shape), salt=1)
    kept_y = y.clone()
    (grad,) = torch.autograd.grad(out, x, y)
    assert torch.equal(x.detach(), kept) and torch.equal(y, kept_y)
    assert (out is x) == (axis.size == 1)
    out.detach().fill_(7)  # nor may the result share memory that others read
    assert axis.size == 1 or torch.equal(y, kept_y)
    return {"x": kept, "y": y, "out": function(kept), "grad": grad}


def the_axis(tp: int, name: str) -> Axis:
    return getattr(ParallelMesh.build(tp=tp, ep=1), name)


def differentiable(context: RankContext, tp: int, name: str, strided: bool) -> tuple[tuple[int, ...], dict]:
    """Every differentiable function on this rank. What is replicated has the same seed in the whole group."""
    axis, rank = the_axis(tp, name), context.rank
    group = axis.ranks[0]
    cases = {
        "enter": apply(axis, lambda x: comm.enter(x, axis), numbers(group, SHAPE, strided=strided), rank),
        "leave": apply(axis, lambda x: comm.leave(x, axis), numbers(rank, SHAPE, strided=strided), group),
    }
    for dim in DIMS:
        for function in (comm.enter, comm.leave):
            x = numbers(rank, SHAPE, strided=strided)
            cases[function.__name__, dim] = apply(axis, lambda x, f=function, d=dim: f(x, axis, d), x, rank)
    return axis.ranks, cases


def exchange(context: RankContext, tp: int, name: str, table: list[list[int]]) -> tuple[tuple[int, ...], dict]:
    """Rank i of the axis sends `table[i][j]` rows to rank j."""
    axis = the_axis(tp, name)
    send, receive = table[axis.rank], [row[axis.rank] for row in table]
    x = numbers(context.rank, (sum(send), 3))
    return axis.ranks, apply(axis, lambda x: comm.all_to_all(x, axis, send=send, receive=receive), x, context.rank)


def without_gradient(context: RankContext, tp: int, name: str, strided: bool) -> tuple[tuple[int, ...], dict]:
    axis = the_axis(tp, name)
    cases = {}
    functions = {"total": comm.total, "maximum": comm.maximum, "broadcast": comm.broadcast}
    functions |= {("gather", dim): lambda x, axis, d=dim: comm.gather(x, axis, d) for dim in DIMS}
    for case, function in functions.items():
        x = numbers(context.rank, SHAPE, strided=strided)
        kept = x.clone()
        out = function(x, axis)
        assert (out is x) == (axis.size == 1)
        assert axis.size == 1 or not function(x.clone().requires_grad_(), axis).requires_grad
        cases[case] = (kept, out.clone())
        if axis.size > 1:
            out.fill_(7)
        assert torch.equal(x, kept)
    counts = torch.arange(3) * (context.rank + 1)
    cases["integers"] = (counts, comm.total(counts, axis))
    cases["objects"] = comm.gather_objects({"rank": context.rank}, axis)
    comm.barrier(axis)
    return axis.ranks, cases


def alone(context: RankContext, tp: int, name: str) -> bool:
    """All functions on an axis of size 1, in a world where any collective is an error."""
    axis, x = the_axis(tp, name), torch.ones(2, 2, requires_grad=True)

    refuse = Mock(side_effect=AssertionError("a collective on an axis of size 1"))
    with patch.multiple(dist, **dict.fromkeys(COLLECTIVES, refuse)):
        outs = [comm.enter(x, axis), comm.leave(x, axis), comm.enter(x, axis, 0), comm.leave(x, axis, 1), comm.total(x, axis)]
        outs += [comm.maximum(x, axis), comm.gather(x, axis, 0), comm.broadcast(x, axis)]
        outs += [comm.all_to_all(x, axis, send=[2], receive=[2])]
        comm.barrier(axis)
        assert comm.gather_objects("a", axis) == ["a"]
    return all(out is x for out in outs)


def lone_barrier(context: RankContext, tp: int, name: str, folder: Path) -> bool:
    """Rank 0 comes to it once ranks 2 and 3, on another axis, are through. -> Whether it had come when this rank was through."""
    axis, until = the_axis(tp, name), time.monotonic() + 30
    while context.rank == 0 and not all((folder / other).exists() for other in "23"):
        assert time.monotonic() < until, "the others wait, too"
        time.sleep(0.01)
    if context.rank == 0:
        (folder / "0").touch()
    comm.barrier(axis)
    come = (folder / "0").exists()
    (folder / str(context.rank)).touch()
    return come


# ---- tests


def by_group(results: list[tuple[tuple[int, ...], dict]]) -> list[list[dict]]:
    """The ranks' cases, one list for each group of the axis, in the order of the axis."""
    groups = defaultdict(list)
    for rank, (members, cases) in enumerate(results):
        assert rank in members
        groups[members].append(cases)
    assert all(len(members) == len(cases) for members, cases in groups.items())
    return list(groups.values())


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def product(cases: list[dict[str, Tensor]], a: str, b: str) -> Tensor:
    return torch.stack([(case[a] * case[b]).sum() for case in cases]).sum()


def expected(case: str | tuple[str, int], xs: list[Tensor], index: int) -> Tensor:
    """What `enter` or `leave`, with or without a dimension, gives rank `index` of the axis."""
    total = torch.stack(xs).sum(0)
    match case:
        case "enter":
            return xs[index]
        case "leave":
            return total
        case "enter", dim:
            return torch.cat(xs, dim)
        case "leave", dim:
            return total.chunk(len(xs), dim)[index]


@pytest.mark.parametrize("strided", [False, True])
@over_axes
def test_values_and_gradients_of_enter_and_leave(world_size, tp, name, strided):
    for group in by_group(ranks.run_ranks(differentiable, world_size, tp, name, strided)):
        for case in group[0]:
            ranks_cases = [cases[case] for cases in group]
            for index, one in enumerate(ranks_cases):
                assert close(one["out"], expected(case, [other["x"] for other in ranks_cases], index)), (case, index)
            # The adjoint: <A x, y> == <x, A' y>. What is replicated is one vector, and counts once.
            left = product(ranks_cases[:1] if case == "leave" else ranks_cases, "out", "y")
            right = product(ranks_cases[:1] if case == "enter" else ranks_cases, "x", "grad")
            assert close(left, right), case
            if case == "enter":
                assert all(torch.equal(one["grad"], ranks_cases[0]["grad"]) for one in ranks_cases)


TABLES = {
    1: [[[3]], [[0]]],
    2: [[[2, 3], [1, 4]], [[0, 5], [0, 0]], [[0, 0], [0, 0]], [[2, 0], [0, 2]]],
    4: [[[1, 2, 3, 4], [0, 0, 0, 0], [5, 0, 1, 0], [0, 3, 0, 2]], [[0] * 4] * 4, [[7, 0, 0, 0]] * 4],
}


@over_axes
def test_rows_are_exchanged_and_their_gradients_return(world_size, tp, name):
    size = tp if name == "tp" else world_size // tp
    for table in TABLES[size]:
        for group in by_group(ranks.run_ranks(exchange, world_size, tp, name, table)):
            parts = [case["x"].split(row) for case, row in zip(group, table, strict=True)]
            for index, case in enumerate(group):
                assert torch.equal(case["out"], torch.cat([part[index] for part in parts]))
            assert close(product(group, "out", "y"), product(group, "x", "grad"))


@pytest.mark.parametrize("strided", [False, True])
@over_axes
def test_values_without_gradient(world_size, tp, name, strided):
    results = ranks.run_ranks(without_gradient, world_size, tp, name, strided)
    members = [ranks_ for ranks_, _ in results]
    for group in by_group(results):
        stack = {case: torch.stack([cases[case][0] for cases in group]) for case in group[0] if case != "objects"}
        for cases in group:
            assert close(cases["total"][1], stack["total"].sum(0))
            assert torch.equal(cases["maximum"][1], stack["maximum"].amax(0))
            assert torch.equal(cases["broadcast"][1], stack["broadcast"][0])
            assert torch.equal(cases["integers"][1], stack["integers"].sum(0))
            for dim in DIMS:
                assert torch.equal(cases["gather", dim][1], torch.cat(list(stack["gather", dim]), dim))
    for rank, (_, cases) in enumerate(results):
        assert cases["objects"] == [{"rank": other} for other in members[rank]]


@pytest.mark.parametrize(("world_size", "tp", "name"), [(1, 1, "tp"), (1, 1, "dp"), (2, 1, "tp"), (2, 2, "dp"), (4, 4, "dp")])
def test_an_axis_of_size_1_returns_its_input_without_a_collective(world_size, tp, name):
    assert all(ranks.run_ranks(alone, world_size, tp, name))


def test_a_barrier_waits_for_the_ranks_of_its_axis_only(tmp_path):
    assert ranks.run_ranks(lone_barrier, 4, 2, "tp", tmp_path) == [True, True, False, False]


@pytest.mark.parametrize("function", [comm.leave, comm.enter, comm.gather])
def test_the_dimension_must_exist(function):
    with pytest.raises(RankError):
        ranks.run_ranks(call_with_dim, 2, function.__name__, 3)


def call_with_dim(context: RankContext, function: str, dim: int) -> None:
    getattr(comm, function)(torch.ones(SHAPE), the_axis(2, "tp"), dim)
