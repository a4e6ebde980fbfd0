"""One state, loaded and saved again under other layouts, exports to the same bytes each time."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import ranks
from checkpoint_helpers import contents
from parity.engines import Layout, Run, build_engine, load, run_config, train

from megagate.checkpoint import store
from megagate.checkpoint.hf.export import export
from megagate.checkpoint.store import Checkpoint
from megagate.config.keys import to_dict
from megagate.config.run import DataConfig
from megagate.engine.base import Engine
from megagate.parallel.comm import barrier
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

STEP = 2
RUNS = {"qwen3_next": Run(optimizer="adamw"), "remote-code": Run(optimizer="adamw", bias_update_rate=0.02)}
LAYOUTS = [Layout(4, tp=tp, ep=ep, zero_stage=stage) for (tp, ep), stage in product([(2, 2), (1, 4), (4, 1)], (1, 2, 3))]


def save(engine: Engine, run: Run, root: Path) -> None:
    """A checkpoint that knows its config. Collective."""
    world = engine.mesh.world
    config = replace(run_config(run, Layout()), data=DataConfig(path="synthetic"))
    metadata = {"config": to_dict(config), "applied_steps": engine.applied_steps}
    if world.rank == 0:
        store.begin(root, STEP)
    barrier(world)
    store.write_rank(store.staging_path(root, STEP), world.rank, engine.state_pieces())
    barrier(world)
    if world.rank == 0:
        store.publish(root, STEP, world_size=world.size, metadata=metadata)
    barrier(world)


def save_again(context: RankContext, run: Run, layout: Layout, source: Path, root: Path) -> None:
    """Load into an engine of other weights, and save."""
    engine = build_engine(run, layout, ParallelMesh.build(tp=layout.tp, ep=layout.ep), key="other weights")
    load(engine, source, STEP)
    save(engine, run, root)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """By target: a checkpoint of one process, trained for two steps, and the files of its export."""
    found = {}
    for target, run in RUNS.items():
        root = tmp_path_factory.mktemp(target)
        engine = build_engine(run, Layout(), ParallelMesh.single())
        train(engine, range(STEP), lr=run.lr)
        save(engine, run, root)
        done = export(root, root / "hf", dtype="fp32", max_shard_size="40KB")
        assert done.target == target and len(done.files) > 3
        found[target] = root, contents(done.folder)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_exports_are_the_same_bytes(layout: Layout, first: dict[str, tuple[Path, dict[str, bytes]]], tmp_path: Path) -> None:
    # The router's bias is the one state beside the masters: one layout of each kind shows that it is cut and joined like them.
    for target in RUNS if layout.zero_stage == 1 else ("qwen3_next",):
        source, expected = first[target]
        ranks.run_ranks(save_again, 4, RUNS[target], layout, source, tmp_path / target)
        files = {piece.file for tensor in cut(tmp_path / target) for piece in tensor.pieces}
        assert len(files) == 4, "every rank wrote a part"
        done = export(tmp_path / target, tmp_path / f"{target}-hf", dtype="fp32", max_shard_size="40KB")
        assert contents(done.folder) == expected


def cut(root: Path) -> list[store.StoredTensor]:
    with Checkpoint.open(root) as checkpoint:
        return list(checkpoint.tensors.values())
