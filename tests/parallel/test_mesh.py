"""The grid of ranks: pure tables, the rules, and the groups that are made of them."""

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megagate.parallel.mesh import Axis, ParallelMesh, grid
from megagate.parallel.spawn import RankContext

AXES = ("tp", "dp", "ep", "edp", "world")


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(world_size: int) -> list[tuple[int, int]]:
    return [(tp, ep) for tp in divisors(world_size) for ep in divisors(world_size)]


@pytest.mark.parametrize("world_size", [*range(1, 33), 48, 64, 96, 256, 1000, 1024, 4096])
def test_the_tables_equal_those_of_deepspeed(world_size):
    from deepspeed.module_inject.auto_ep_folding import build_folding_spec, expected_folding_group_tables

    for tp, ep in layouts(world_size):
        theirs = expected_folding_group_tables(build_folding_spec(world_size=world_size, pp_size=1, tp_size=tp, ep_size=ep))
        expected = {"tp": theirs.tp_groups, "dp": theirs.dense_dp_groups, "ep": theirs.ep_groups, "edp": theirs.edp_groups}
        ours = grid(world_size, tp=tp, ep=ep)
        assert ours.pop("world") == [list(range(world_size))]
        assert {name: tuple(map(tuple, table)) for name, table in ours.items()} == expected, (tp, ep)


@given(st.integers(1, 64), st.data())
def test_every_axis_splits_the_world_and_its_partner_crosses_it(world_size, data):
    tp, ep = (data.draw(st.sampled_from(divisors(world_size))) for _ in range(2))
    tables = grid(world_size, tp=tp, ep=ep)
    for inner, outer, size in (("tp", "dp", tp), ("ep", "edp", ep)):
        for name, width in ((inner, size), (outer, world_size // size)):
            assert sorted(sum(tables[name], [])) == list(range(world_size))
            assert all(len(row) == width and row == sorted(row) for row in tables[name])
        assert all(len(set(a) & set(b)) == 1 for a in tables[inner] for b in tables[outer])
        assert all(row == list(range(row[0], row[0] + size)) for row in tables[inner])


def test_the_grid_of_the_design_on_8_ranks():
    tables = grid(8, tp=2, ep=4)
    assert tables["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert tables["dp"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert tables["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert tables["edp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(("tp", "ep", "name"), [(3, 1, "tp"), (1, 3, "ep"), (0, 1, "tp"), (1, -1, "ep"), (16, 1, "tp"), (1, 16, "ep")])
def test_a_size_that_does_not_divide_the_world_is_refused(tp, ep, name):
    with pytest.raises(ValueError, match=rf"{name} \({tp if name == 'tp' else ep}\) must divide the world size \(8\)"):
        grid(8, tp=tp, ep=ep)


def test_the_mesh_of_one_process_has_no_group():
    mesh = ParallelMesh.single()
    for name in AXES:
        assert getattr(mesh, name) == Axis(name, (0,), 0, None) and getattr(mesh, name).size == 1


def build(context: RankContext, tp: int, ep: int) -> dict[str, tuple]:
    """Each axis as this rank sees it, with what a sum of 2**rank over its group gives, and how many groups were made."""
    made = []
    new_group = dist.new_group
    dist.new_group = lambda group_ranks, **kwargs: made.append(tuple(group_ranks)) or new_group(group_ranks, **kwargs)
    try:
        mesh = ParallelMesh.build(tp=tp, ep=ep)
    finally:
        dist.new_group = new_group
    seen = {"made": tuple(made)}
    for name in AXES:
        axis = getattr(mesh, name)
        value = torch.tensor(2**context.rank)
        if axis.group is not None:
            dist.all_reduce(value, group=axis.group)
        seen[name] = (axis.name, axis.ranks, axis.rank, axis.group is None, int(value))
    return seen


@pytest.mark.parametrize(("world_size", "tp", "ep"), [(size, tp, ep) for size in (1, 2, 4) for tp, ep in layouts(size)])
def test_the_groups_are_those_of_the_tables(world_size, tp, ep):
    tables = grid(world_size, tp=tp, ep=ep)
    for rank, seen in enumerate(ranks.run_ranks(build, world_size, tp, ep)):
        made = seen.pop("made")
        assert len(set(made)) == len(made) and tuple(range(world_size)) not in made and all(len(group) > 1 for group in made)
        for name in AXES:
            row = next(tuple(row) for row in tables[name] if rank in row)
            assert seen[name] == (name, row, row.index(rank), len(row) == 1, sum(2**other for other in row)), (rank, name)
