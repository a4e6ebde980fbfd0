"""Masters, moments and step counters through a checkpoint, to the same layout and to others: the next AdamW step is the same."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import ranks
import torch
from parity.engines import Layout, Outcome, Run, assemble, batch, build_engine, load, outcome, save, train
from parity.sharded import assert_all_close

from megagate.checkpoint import store
from megagate.checkpoint.store import Checkpoint
from megagate.config.count import parameter_shapes
from megagate.engine.base import Engine
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext

STEPS = 2
RUN = Run(optimizer="adamw")


def mesh_of(layout: Layout) -> ParallelMesh:
    return ParallelMesh.build(tp=layout.tp, ep=layout.ep)


def train_and_save(context: RankContext, run: Run, layout: Layout, root: Path) -> Outcome:
    """Save after two steps, go on for one."""
    engine = build_engine(run, layout, mesh_of(layout))
    save(engine, root, 0)
    steps = train(engine, range(STEPS), lr=run.lr)
    save(engine, root, STEPS)
    seen = evaluate(engine)
    return outcome(engine, steps + train(engine, [STEPS], lr=run.lr), next_step=STEPS + 1, seen=seen)


def load_and_train(context: RankContext | None, run: Run, layout: Layout, root: Path, step: int = STEPS, warm: bool = False) -> Outcome:
    """From other initial weights; `warm`: with other moments and another step count too."""
    mesh = mesh_of(layout) if context else ParallelMesh.single()
    engine = build_engine(run, layout, mesh, key="other weights")
    if warm:
        train(engine, range(7, 10), lr=run.lr)
    load(engine, root, step)
    assert engine.applied_steps == step
    seen = evaluate(engine)
    return outcome(engine, train(engine, range(step, STEPS + 1), lr=run.lr), next_step=STEPS + 1, seen=seen)


def evaluate(engine: Engine) -> float:
    """As a run that has nothing left to train does after it was resumed."""
    return engine.evaluate(zip(*batch(STEPS, engine.mesh), strict=True))


def assert_same_bits(outcomes: list[Outcome], expected: list[Outcome], *, steps: int = 1) -> None:
    for one, other in zip(outcomes, expected, strict=True):
        assert one.steps == other.steps[-steps:] and one.digest == other.digest and one.val_loss == other.val_loss
        assert steps > 1 or one.seen == other.seen
    state, expected_state = assemble(outcomes), assemble(expected)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(value, expected_state[name]) for name, value in state.items())


def assert_each_byte_once(root: Path, run: Run, layout: Layout) -> None:
    """All ranks' files together hold as many bytes as the logical tensors, and none of them nothing, or much more than its share."""
    folder = store.step_path(root, STEPS)
    data = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in sorted(folder.glob("rank-*"))]
    kinds = 3 if run.optimizer == "adamw" else 1
    assert sum(data) == 4 * kinds * sum(map(prod, parameter_shapes(run.model).values()))
    assert len(data) == layout.world_size
    if layout.zero_stage:
        assert min(data) > 0 and max(data) < 1.6 * sum(data) / len(data), data


def assert_same_state(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    """To rounding: the loss of the step that follows, and the weights and moments after it."""
    for one in outcomes:
        assert one.steps[-1].loss == pytest.approx(expected[0].steps[-1].loss, rel=1e-6)
        assert one.steps[-1].grad_norm == pytest.approx(expected[0].steps[-1].grad_norm, rel=3e-6)
        assert one.seen == pytest.approx(expected[0].seen, rel=1e-6)
    assert_all_close(outcomes[0].weights, expected[0].weights, to=2e-5)
    state, expected_state = assemble(outcomes), assemble(expected)
    assert_all_close(dict(sorted(state.items())), dict(sorted(expected_state.items())), to=2e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """Of dp2 x tp2 ep4."""
    root, layout = tmp_path_factory.mktemp("folded"), Layout(4, tp=2, ep=4)
    outcomes = ranks.run_ranks(train_and_save, 4, RUN, layout, root)
    assert_each_byte_once(root, RUN, layout)
    return root, outcomes


def test_the_checkpoint_holds_every_logical_tensor_once(saved):
    shapes = parameter_shapes(RUN.model)
    for step, kinds in {0: ("master",), STEPS: ("master", "exp_avg", "exp_avg_sq")}.items():
        with Checkpoint.open(store.step_path(saved[0], step)) as checkpoint:
            assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
                f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()
            }
            assert all(tensor.dtype == torch.float32 for tensor in checkpoint.tensors.values())


def test_the_same_layout_goes_on_with_the_same_bits(saved):
    root, expected = saved
    assert_same_bits(ranks.run_ranks(load_and_train, 4, RUN, Layout(4, tp=2, ep=4), root), expected)


def test_what_the_engine_held_before_is_gone(saved):
    root, expected = saved
    assert_same_bits(ranks.run_ranks(load_and_train, 4, RUN, Layout(4, tp=2, ep=4), root, STEPS, True), expected)


def test_the_initial_state_can_be_loaded(saved):
    root, expected = saved
    assert_same_bits(ranks.run_ranks(load_and_train, 4, RUN, Layout(4, tp=2, ep=4), root, 0), expected, steps=STEPS + 1)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, tp=2, ep=4, zero_stage=2),
        Layout(2, tp=1, ep=2),
        Layout(2, tp=2, ep=2, zero_stage=2),
        Layout(4, tp=4, ep=4),
        Layout(4, tp=1, ep=1),
        Layout(1),
        Layout(4, tp=2, ep=4, zero_stage=3),
        Layout(4, tp=4, ep=2, zero_stage=3),
        Layout(2, tp=1, ep=1, zero_stage=3),
    ],
    ids=str,
)
def test_other_layouts_go_on_with_the_same_numbers(saved, layout):
    root, expected = saved
    assert_same_state(ranks.run_ranks(load_and_train, layout.world_size, RUN, layout, root), expected)


def test_the_reference_goes_on_with_the_same_numbers(saved):
    root, expected = saved
    assert_same_state([load_and_train(None, RUN, Layout(), root)], expected)


def test_zero_goes_on_from_the_reference(saved, tmp_path):
    _, expected = saved
    engine = build_engine(RUN, Layout(), ParallelMesh.single())
    train(engine, range(STEPS), lr=RUN.lr)
    save(engine, tmp_path, STEPS)
    for layout in (Layout(4, tp=2, ep=2, zero_stage=2), Layout(4, tp=2, ep=2, zero_stage=3)):
        assert_same_state(ranks.run_ranks(load_and_train, 4, RUN, layout, tmp_path), expected)


DENSE = Run(optimizer="adamw", dense=True)


@pytest.mark.parametrize(
    ("run", "first", "second"),
    [
        (RUN, Layout(4, tp=4, ep=4, zero_stage=2), Layout(4, tp=1, ep=4)),
        (RUN, Layout(4, tp=2, ep=4, zero_stage=3), Layout(4, tp=2, ep=2)),
        (Run(optimizer="sgd"), Layout(2, tp=2, ep=2), Layout(2, tp=1, ep=2, zero_stage=2)),
        (DENSE, Layout(4, tp=2), Layout(2, tp=1, zero_stage=2)),
        (DENSE, Layout(4, tp=2, zero_stage=3), Layout(2, tp=1, zero_stage=0)),
        (DENSE, Layout(4, tp=2, zero_stage=0), Layout(4, tp=4, zero_stage=3)),
        (replace(DENSE, recompute=True), Layout(2, tp=1, zero_stage=3), Layout(2, tp=2)),
    ],
    ids=["kv replication", "stage 3", "sgd", "tied dense", "tied dense 3", "tied dense 0", "recompute"],
)
def test_other_models_and_back(run, first, second, tmp_path):
    expected = ranks.run_ranks(train_and_save, first.world_size, run, first, tmp_path)
    assert_each_byte_once(tmp_path, run, first)
    assert_same_bits(ranks.run_ranks(load_and_train, first.world_size, run, first, tmp_path), expected)
    assert_same_state(ranks.run_ranks(load_and_train, second.world_size, run, second, tmp_path), expected)


def test_ranks_that_hold_only_padding_of_a_parameter(tmp_path):
    """Of the 2 weights of a q_norm two of four ranks get one each in stage 3."""
    run, layout, other = Run(optimizer="adamw", head_dim=2), Layout(4, tp=1, ep=2, zero_stage=3), Layout(2, tp=2, ep=2, zero_stage=3)
    expected = ranks.run_ranks(train_and_save, 4, run, layout, tmp_path)
    holders = [index for index, one in enumerate(expected) if any("layers.0.attention.q_norm" in piece[0] for piece in one.pieces)]
    assert holders == [0, 1]
    assert_same_bits(ranks.run_ranks(load_and_train, 4, run, layout, tmp_path), expected)
    assert_same_state(ranks.run_ranks(load_and_train, 2, run, other, tmp_path), expected)


def test_the_reference_goes_on_from_stage_3(tmp_path):
    layout = Layout(4, tp=1, ep=4, zero_stage=3)
    expected = ranks.run_ranks(train_and_save, 4, RUN, layout, tmp_path)
    assert_each_byte_once(tmp_path, RUN, layout)
    assert_same_state([load_and_train(None, RUN, Layout(), tmp_path)], expected)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_goes_on_with_the_same_bits(zero_stage, tmp_path):
    run, layout = Run(optimizer="adamw", dtype="bf16"), Layout(4, tp=2, ep=2, zero_stage=zero_stage)
    expected = ranks.run_ranks(train_and_save, 4, run, layout, tmp_path)
    assert_each_byte_once(tmp_path, run, layout)
    assert_same_bits(ranks.run_ranks(load_and_train, 4, run, layout, tmp_path), expected)
    assert_same_bits(ranks.run_ranks(load_and_train, 4, run, layout, tmp_path, STEPS, True), expected)


def test_the_state_matters(saved):
    """A resumed run whose moments or step count were lost would be far from the tolerances above."""
    root, expected = saved
    engine = build_engine(RUN, Layout(), ParallelMesh.single(), key="other weights")
    with Checkpoint.open(store.step_path(root, STEPS)) as checkpoint:
        engine.load_state(checkpoint, applied_steps=STEPS + 1)
    forgetful = outcome(engine, train(engine, [STEPS], lr=RUN.lr), next_step=STEPS + 1)
    with pytest.raises(AssertionError, match="differs by"):
        assert_all_close(forgetful.weights, expected[0].weights, to=2e-5)
